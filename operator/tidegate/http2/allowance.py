"""How much of something a peer may do: a bucket of tokens that fills with time and with good work."""


class Allowance:
    """Pure: the time is told. `most` in a burst, `per_s` steadily."""

    def __init__(self, most: float, per_s: float) -> None:
        self._most, self._per_s = most, per_s
        self._left, self._at = most, 0.0

    def take(self, now: float, cost: float = 1.0) -> bool:
        """Whether this may be done too; `now` in seconds of any clock that does not go back."""
        gained = max(0.0, now - self._at) * self._per_s
        self._left = min(self._most, self._left + gained) - cost
        self._at = now
        return self._left >= 0

    def give(self, much: float = 1.0) -> None:
        """Something useful was done meanwhile."""
        self._left = min(self._most, self._left + much)
