"""The controller's own metrics."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tidegate.controller.poolreport import PoolReport


class Telemetry:
    """Every metric of the controller, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        pool_class = ["pool", "qos_class"]
        self.borrows = Counter(
            "tidegate_borrows", "Pods that began to borrow GPUs.", pool_class, registry=registry
        )
        self.reclaims = Counter(
            "tidegate_reclaims", "Borrowed pods that were taken back.", pool_class, registry=registry
        )
        self.rebalances = Counter(
            "tidegate_rebalances", "Changes of replicas or weights by the plan.", ["pool"], registry=registry
        )
        self.errors = Counter(
            "tidegate_reconcile_errors",
            "Rounds or objects that failed.",
            ["kind", "reason"],
            registry=registry,
        )
        self.writes = Counter(
            "tidegate_writes", "Objects changed in the cluster.", ["kind"], registry=registry
        )
        self.kopf_restarts = Counter(
            "tidegate_kopf_restarts", "Times that kopf ended and was started again.", registry=registry
        )
        self.seconds = Histogram(
            "tidegate_reconcile_seconds",
            "Duration of one round of the loop, by phase.",
            ["phase"],
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
            registry=registry,
        )
        self.last_success = Gauge(
            "tidegate_reconcile_last_success_timestamp_seconds",
            "End of the last whole round.",
            registry=registry,
        )
        self.pool_gpus = Gauge(
            "tidegate_pool_gpus",
            "GPUs of a pool: capacity, allocated, foreign or idle.",
            ["pool", "state"],
            registry=registry,
        )
        self.class_gpus = Gauge(
            "tidegate_pool_class_gpus",
            "GPUs of a class: used or borrowed.",
            [*pool_class, "state"],
            registry=registry,
        )
        self.reservation_gpus = Gauge(
            "tidegate_pool_reservation_gpus",
            "GPUs of a reservation: reserved, in_use, lent or unmet.",
            ["pool", "reservation", "qos_class", "state"],
            registry=registry,
        )

    def show_pools(self, reports: Mapping[str, PoolReport]) -> None:
        """Set the gauges; what is gone shows no more."""
        for gauge in (self.pool_gpus, self.class_gpus, self.reservation_gpus):
            gauge.clear()
        for pool, r in reports.items():
            for state in ("capacity", "allocated", "foreign", "idle"):
                self.pool_gpus.labels(pool, state).set(getattr(r, state))
            for qos_class in {*r.used, *(x.qos_class for x in r.reservations)}:
                self.class_gpus.labels(pool, qos_class, "used").set(r.used.get(qos_class, 0))
                self.class_gpus.labels(pool, qos_class, "borrowed").set(r.borrowed.get(qos_class, 0))
            for x in r.reservations:
                for state in ("reserved", "in_use", "lent", "unmet"):
                    value = getattr(x, state)
                    self.reservation_gpus.labels(pool, x.name, x.qos_class, state).set(value)
