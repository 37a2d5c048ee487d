"""A fleet whose replicas production's planner and placement make, move and take away."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from tidegate.sim.cluster.controller import Controller
from tidegate.sim.cluster.kube import Kube
from tidegate.sim.cluster.metrics import Counted
from tidegate.sim.cluster.spec import ClusterSpec
from tidegate.sim.cluster.usage import Usage
from tidegate.sim.fleet import Fleet, Run, Setting
from tidegate.sim.router import Arm


class PlannedFleet:
    """Runs one arm on a cluster with a seed. The setting's replicas are left empty: the plan makes them."""

    def __init__(self, setting: Setting, spec: ClusterSpec, arm: Arm, seed: int) -> None:
        """Lay it out.

        Raises:
            ValueError: The arm parts replicas by a rule of its own, or the setting has some already.
        """
        if arm.lanes is not None:
            raise ValueError("it parts the replicas itself, and here the plan does")
        if setting.replicas:
            raise ValueError("replicas are planned, so none can be given")
        self.spec, self._counted = spec, Counted(arm.router())
        deaths = [f for f in setting.faults if f.kind == "death"]
        rest = [f for f in setting.faults if f.kind != "death"]
        models = [(m.namespace, m.name) for m in spec.models]
        own = replace(setting, faults=rest, models=models)
        self._fleet = Fleet(own, replace(arm, router=lambda: self._counted), seed)
        self.usage = Usage(setting.warm_up_s, setting.seconds)
        self._kube = Kube(spec, setting.classes, self._fleet, seed, self.usage)
        self._controller = Controller(self._kube, self._fleet)
        for fault in deaths:
            self._fleet.at(fault.start_s, partial(self._kube.fail, fault.address))
        self._fleet.at(0.0, self._begin)

    def run(self, progress: Callable[[float], None] | None = None) -> tuple[Run, Usage]:
        """Run to the end; `progress` is told the virtual time now and then."""
        run = self._fleet.run(progress)
        self.usage.close(self._fleet.setting.seconds)
        return run, self.usage

    def _begin(self) -> None:
        self._kube.begin()
        self._period()

    def _period(self) -> None:
        """Ask the picker; the round is made when its answer is there."""
        now, delays = self._fleet.now, self.spec.delays
        counters, gauges = dict(self._counted.counters), dict(self._counted.gauges)
        self._fleet.at(now + delays.metric_age_s, partial(self._controller.hear, now, counters, gauges))
        self._fleet.at(now + delays.period_s, self._period)
