"""Who had which GPUs, and when: seconds used, borrowed and idle, and every change over time."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from tidegate.core.plan.types import LaneKey
from tidegate.core.quota import Ground, standings
from tidegate.core.types import Pod, QoSClass
from tidegate.sim.cluster.spec import ClusterSpec


class Moment(NamedTuple):
    """How it was from a time on. GPUs by class; replicas by lane: planned, on a node, and ready."""

    time_s: float
    used: Mapping[str, int]
    borrowed: Mapping[str, int]
    starting: Mapping[str, int]
    idle: int
    planned: Mapping[LaneKey, int]
    placed: Mapping[LaneKey, int]
    ready: Mapping[LaneKey, int]


@dataclass(slots=True)
class Usage:
    """Sums over the window [begin, end], and what led to them.

    GPU seconds: `used` from when a pod was bound until it was gone, of which `starting` before it was
    ready, and `borrowed` on GPUs that others reserved and left idle (`core.quota`). `evictions` are
    pods that gave way to a claim, `thrown_away` the tokens that were computed for requests on
    replicas that ended before these did, both by the class of the replica.
    """

    begin_s: float
    end_s: float
    used: defaultdict[str, float] = field(default_factory=partial(defaultdict, float))
    borrowed: defaultdict[str, float] = field(default_factory=partial(defaultdict, float))
    starting: defaultdict[str, float] = field(default_factory=partial(defaultdict, float))
    idle: float = 0.0
    evictions: Counter[str] = field(default_factory=Counter)
    thrown_away: Counter[str] = field(default_factory=Counter)
    starts: Counter[str] = field(default_factory=Counter)
    timeline: list[Moment] = field(default_factory=list)

    def add(self, moment: Moment) -> None:
        """It is so from now on."""
        self._sum(moment.time_s)
        if self.timeline and self.timeline[-1].time_s == moment.time_s:
            self.timeline.pop()
        if not self.timeline or self.timeline[-1][1:] != moment[1:]:
            self.timeline.append(moment)

    def close(self, time_s: float) -> None:
        """The run is over."""
        self._sum(time_s)
        self._summed_s = time_s

    _summed_s: float = 0.0

    def _sum(self, until_s: float) -> None:
        """Count what has been since the last change."""
        span_s = min(until_s, self.end_s) - max(self._summed_s, self.begin_s)
        if self.timeline and span_s > 0:
            last = self.timeline[-1]
            for into, gpus in (
                (self.used, last.used),
                (self.borrowed, last.borrowed),
                (self.starting, last.starting),
            ):
                for name, count in gpus.items():
                    into[name] += count * span_s
            self.idle += last.idle * span_s
        self._summed_s = until_s

    def to_json(self) -> dict[str, Any]:
        """Plain values, by class where that applies."""
        by_class = ("used", "borrowed", "starting", "evictions", "thrown_away", "starts")
        names = sorted({name for kind in by_class for name in getattr(self, kind)})
        return {
            "gpu_seconds": {
                "idle": self.idle,
                **{kind: {n: getattr(self, kind)[n] for n in names} for kind in by_class[:3]},
            },
            **{kind: {n: getattr(self, kind)[n] for n in names} for kind in by_class[3:]},
            "timeline": [_plain(m) for m in self.timeline],
        }


def _plain(moment: Moment) -> dict[str, Any]:
    lanes = {
        name: {str(key): n for key, n in getattr(moment, name).items()}
        for name in ("planned", "placed", "ready")
    }
    gpus = {name: dict(getattr(moment, name)) for name in ("used", "borrowed", "starting")}
    return {"time_s": moment.time_s, **gpus, "idle": moment.idle, **lanes}


def moment(
    now: float,
    spec: ClusterSpec,
    classes: Mapping[str, QoSClass],
    pods: Iterable[Pod],
    planned: Mapping[LaneKey, int],
) -> Moment:
    """How it is now. A pod that is going holds its GPUs until it is gone."""
    bound = [p for p in pods if p.node is not None]
    lent = set()
    for pool in spec.pools:
        names = {n.name for n in pool.nodes}
        here = [p for p in bound if p.node in names and not p.terminating]
        stands = standings(here, pool.reservations, classes, pool.capacity)
        lent |= {uid for uid, stand in stands.items() if stand.ground is Ground.LENT}
    used, borrowed, starting = Counter[str](), Counter[str](), Counter[str]()
    placed, ready = Counter[LaneKey](), Counter[LaneKey]()
    for pod in bound:
        name, key = pod.qos_class or "", LaneKey(*pod.lane)  # type: ignore[arg-type]  # each has a lane
        used[name] += pod.gpus
        placed[key] += 1
        if pod.uid in lent:
            borrowed[name] += pod.gpus
        if pod.ready:
            ready[key] += 1
        elif not pod.terminating:
            starting[name] += pod.gpus
    idle = spec.capacity - sum(used.values())
    return Moment(now, used, borrowed, starting, idle, dict(planned), placed, ready)
