"""Where pods may stand, and who gives way: pure decisions over one view of a pool.

`feasible` answers kube-scheduler's filter, `victims` its preemption. Both read the same `View`,
and what they answered counts in it at once, so that neither promises what the other refuses.
"""

from tidegate.core.place.cover import blocks, shortfalls
from tidegate.core.place.decide import Feasible, Preemption, Why
from tidegate.core.place.filter import SHORT_LIST, feasible
from tidegate.core.place.preempt import MAX_GRANTS, victims
from tidegate.core.place.view import ASSUME_S, GRANT_SLACK_S, Assumed, Grant, View

__all__ = [
    "ASSUME_S",
    "GRANT_SLACK_S",
    "MAX_GRANTS",
    "SHORT_LIST",
    "Assumed",
    "Feasible",
    "Grant",
    "Preemption",
    "View",
    "Why",
    "blocks",
    "feasible",
    "shortfalls",
    "victims",
]
