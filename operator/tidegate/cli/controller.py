"""`tidegate controller`."""


def controller() -> None:
    """Not built yet."""
    raise NotImplementedError
