"""`tidegate picker`."""


def picker() -> None:
    """Not built yet."""
    raise NotImplementedError
