"""`tidegate extender`."""


def extender() -> None:
    """Not built yet."""
    raise NotImplementedError
