"""What a request was promised, and whether it was kept."""

from dataclasses import dataclass
from math import inf

from tidegate.sim.drive import Outcome


@dataclass(frozen=True, slots=True)
class Promise:
    """Deadlines of a class of requests, in seconds after arrival; `inf` where there is none.

    `token_s` is the time between output tokens that a dynamic chunk leaves room for: a hint to
    the scheduler, by which nobody is judged.
    """

    name: str
    ttft_s: float = inf
    finish_s: float = inf
    token_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse deadlines that nobody could keep."""
        if self.ttft_s <= 0 or self.finish_s <= 0 or self.token_s < 0:
            raise ValueError(f"{self.name}: deadlines must be positive, and token_s not negative")

    @property
    def due_s(self) -> float:
        """The first of its deadlines."""
        return min(self.ttft_s, self.finish_s)

    def kept(self, outcome: Outcome) -> bool:
        """Whether a request of this class met all its deadlines; what did not happen is late."""
        first, finish = outcome.first_token_s, outcome.finish_s
        if first is None or finish is None:
            return False
        return first - outcome.arrival_s <= self.ttft_s and finish - outcome.arrival_s <= self.finish_s


ANYTIME = Promise("anytime")
