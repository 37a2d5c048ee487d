"""How many GPUs a shared pool saves against silos, each sized for its objectives, over a mixed day.

Interactive chat follows a day of ServeGen in ten-minute bins, Gamma arrivals of CV 3.5 within. The
day's batch, summaries, is handed in at its beginning and due at its end; it is as much as silo
replicas of the idle share u of the interactive silo compute, so by the fluid measure it just fits into
what is idle there. Silos are fixed replicas under the best arm for one class alone. The shared pool
starts with one interactive replica and batch on all others, and production's planner, placement and
queue do the rest. A day may be scaled: bins are shorter then, and everything else takes as long as ever.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, floor
from typing import Final, NamedTuple

from tidegate.core.flowtypes import ModelKey
from tidegate.core.plan.types import Lane, LaneKey, Model
from tidegate.core.types import Node, Objectives, Pool, QoSClass, Reclaim
from tidegate.sim.cluster.run import PlannedFleet
from tidegate.sim.cluster.spec import ClusterSpec
from tidegate.sim.fleet import Fleet, Replica, Run, Setting
from tidegate.sim.fleet_arms.registry import arm
from tidegate.sim.headline import CONFIG, mean_computed
from tidegate.sim.records import figures
from tidegate.sim.workload import Stream, chat_lengths, day_rates, rates, summary_lengths

MODEL: Final[ModelKey] = ("saving", "llama-3-8b")
REAL_DAY_S: Final = 86_400.0
CV: Final = 3.5
"""Of interactive gaps (ServeGen's bursty categories)."""
KEPT: Final = 0.99
NODE_GPUS: Final = 8
_WIDE: Final = 1_000_000
_ALONE_S: Final = 300.0
"""How long one replica is given batch alone to see how much it computes; the first minute is not counted."""
_WARM_UP_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Day:
    """One mixed day. `peak_per_s` is the interactive rate of the busiest bin; `seconds` its length here."""

    category: str
    seconds: float = 3600.0
    peak_per_s: float = 40.0
    cv: float = CV
    seed: int = 1

    @property
    def idle(self) -> float:
        """u: 1 − mean ÷ peak of the interactive rate in the bins."""
        bins = day_rates(self.category)
        return 1 - sum(bins) / len(bins) / max(bins)

    @property
    def ceiling(self) -> float:
        """The most that sharing saves by the fluid measure: u ÷ (1 + u)."""
        return self.idle / (1 + self.idle)

    def classes(self) -> dict[str, QoSClass]:
        """Both classes, with queues so wide that nothing is refused."""
        people = QoSClass(
            "interactive",
            1000,
            objectives=Objectives(ttft_s=1.0, tpot_s=0.05),
            queue_max_requests=_WIDE,
            queue_max_wait_s=REAL_DAY_S,
        )
        batch = QoSClass(
            "batch",
            0,
            Reclaim.ALWAYS,
            objectives=Objectives(completion_s=self.seconds),
            queue_max_requests=_WIDE,
            queue_max_wait_s=REAL_DAY_S,
        )
        return {c.name: c for c in (people, batch)}

    def chat(self) -> Stream:
        """The day's interactive requests."""
        bins = day_rates(self.category)
        phases = [(self.peak_per_s * rate / max(bins), self.seconds / len(bins)) for rate in bins]
        return Stream("chat", MODEL, "interactive", chat_lengths(), times=rates(phases, self.cv))

    def summaries(self, count: int) -> Stream:
        """So many summaries at the beginning."""

        def times(_rng: random.Random) -> Iterator[float]:
            return itertools.repeat(0.0, count)

        return Stream("summaries", MODEL, "batch", summary_lengths(), times=times, streamed=False)

    def setting(self, streams: list[Stream], replicas: int = 0) -> Setting:
        """The whole day with fixed replicas, or none."""
        fixed = [Replica(f"10.0.0.{i + 1}:8000", MODEL, "batch") for i in range(replicas)]
        return Setting(self.classes(), fixed, streams, self.seconds, config=CONFIG, models=[MODEL])


class Tried(NamedTuple):
    """What came of so many GPUs: attainment by class, nan for one that was not there; pods started."""

    replicas: int
    people: float
    batch: float
    starts: int = 0

    @property
    def kept(self) -> bool:
        """Whether the classes that were there met their objectives."""
        return not (self.people < KEPT or self.batch < KEPT)


class Saving(NamedTuple):
    """What was found. `requests` is the day's batch."""

    people: int
    batch: int
    shared: int
    requests: int
    tries: tuple[tuple[str, Tried], ...]

    @property
    def saving(self) -> float:
        """1 − shared ÷ (both silos), in GPUs."""
        return 1 - self.shared / (self.people + self.batch)


def least(low: int, high: int, kept: Callable[[int], bool]) -> int:
    """The least number above `low` and up to `high` that keeps what is promised, by bisection.

    `high` is taken to: more GPUs never keep less. Neither end is tried.
    """
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if kept(middle) else (middle, high)
    return high


def saving(day: Day, tell: Callable[[str], None] = lambda _line: None) -> Saving:
    """Size both silos and the shared pool for a day. Runs for minutes; `tell` hears of every try."""
    tries: list[tuple[str, Tried]] = []

    def keeps(what: str, run: Callable[[int], Tried]) -> Callable[[int], bool]:
        def one(replicas: int) -> bool:
            tried = run(replicas)
            tries.append((what, tried))
            tell(
                f"{day.category}, seed {day.seed}: {what} on {replicas}: people {tried.people:.2%}, batch"
                f" {tried.batch:.2%}, {tried.starts} starts"
            )
            return tried.kept

        return one

    # A replica serves 2.5 to 4 chats a second within the objectives, and never 5 nor as few as 1.25.
    bounds = floor(day.peak_per_s / 5), ceil(day.peak_per_s / 1.25)
    people = least(*bounds, keeps("people's silo", lambda n: _silo(day, n, [day.chat()], "alone")))
    requests = round(day.idle * people * _alone_per_s(day.seed) * day.seconds)
    work = [day.summaries(requests)]
    need = day.idle * people
    batch = least(
        floor(need) - 1, ceil(need) + 3, keeps("batch's silo", lambda n: _silo(day, n, work, "packing-0"))
    )
    both = [day.chat(), *work]
    shared = least(people - 1, people + batch, keeps("shared", lambda n: planned(day, n, both)))
    return Saving(people, batch, shared, requests, tuple(tries))


def planned(day: Day, gpus: int, streams: list[Stream]) -> Tried:
    """A day of the shared pool."""
    whole, rest = divmod(gpus, NODE_GPUS)
    sizes = [NODE_GPUS] * whole + [rest] * (rest > 0)
    nodes = tuple(Node(f"gpu-{i}", size) for i, size in enumerate(sizes))
    lanes = (
        Lane(LaneKey(*MODEL, "interactive"), 1, min_replicas=1, replicas=1),
        Lane(LaneKey(*MODEL, "batch"), 1, replicas=gpus - 1),
    )
    spec = ClusterSpec([Pool("gpus", nodes)], [Model(*MODEL, "gpus", lanes)])
    run, usage = PlannedFleet(day.setting(streams), spec, arm("ours"), day.seed).run()
    return _tried(run, gpus)._replace(starts=sum(usage.starts.values()))


def _silo(day: Day, replicas: int, streams: list[Stream], name: str) -> Tried:
    return _tried(Fleet(day.setting(streams, replicas), arm(name), day.seed).run(), replicas)


def _tried(run: Run, replicas: int) -> Tried:
    setting = run.setting
    people, batch = (
        figures(
            (r for r in run.records if r.qos_class == name),
            setting.classes[name].objectives,
            0.0,
            setting.seconds,
        ).attainment
        for name in ("interactive", "batch")
    )
    return Tried(replicas, people, batch)


def _alone_per_s(seed: int) -> float:
    """Summaries a second that one replica computes which never runs dry of them."""
    stream = Stream(
        "backlog", MODEL, "batch", summary_lengths(), outstanding=CONFIG.max_num_seqs, streamed=False
    )
    day = Day("m-mid", seconds=_ALONE_S)
    setting = Setting(
        day.classes(), day.setting([], 1).replicas, [stream], _ALONE_S, warm_up_s=_WARM_UP_S, config=CONFIG
    )
    run = Fleet(setting, arm("packing-0"), seed).run()
    found = figures(run.records, Objectives(), _WARM_UP_S, _ALONE_S)
    return found.tokens_per_s / mean_computed(summary_lengths())
