"""What the extender counts."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)


class Metrics:
    """One registry for each server, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.decisions = Counter(
            "tidegate_extender_decisions",
            "Answers to kube-scheduler, by verb and reason",
            ["verb", "reason"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "tidegate_extender_seconds",
            "Time from a call's body to its answer",
            ["verb"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.assumed = Gauge(
            "tidegate_extender_assumed_pods",
            "Placements that were answered and not seen yet",
            ["pool"],
            registry=self.registry,
        )
        self.grants = Gauge(
            "tidegate_extender_grants",
            "Nodes that are promised to pods while others leave them",
            ["pool"],
            registry=self.registry,
        )
        self.preemptions = Counter(
            "tidegate_extender_preemptions",
            "Pods given up for a reservation",
            ["pool", "qos_class"],
            registry=self.registry,
        )
        self.woken = Counter(
            "tidegate_extender_woken",
            "Waiting pods that kube-scheduler was told to look at again",
            registry=self.registry,
        )
        self.stale = Gauge(
            "tidegate_extender_stale",
            "1 while the watch of a kind is lost: decisions are made on its last copy",
            ["kind"],
            registry=self.registry,
        )
