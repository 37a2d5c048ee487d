"""`tidegate load`."""


def load() -> None:
    """Not built yet."""
    raise NotImplementedError
