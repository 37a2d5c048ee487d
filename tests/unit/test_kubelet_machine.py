"""The pod state machine, as scripts of events and the actions and states they must give."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from tidegate.local.kubelet.machine import decide, observe, over
from tidegate.local.kubelet.model import Container, Exec, HttpGet, Pod, Probe, RestartPolicy
from tidegate.local.kubelet.state import (
    Action,
    ContainerState,
    Decision,
    Deleted,
    Event,
    Exited,
    Finalize,
    HookDone,
    ImageChanged,
    NotStarted,
    Phase,
    PodState,
    Probed,
    ProbeKind,
    Rejection,
    RunHook,
    RunProbe,
    Signal,
    Start,
    Started,
)
from tidegate.local.kubelet.status import phase

HTTP = HttpGet(port=8000)


def pod(*containers: Container, policy: str = "Always", grace_s: float = 30) -> Pod:
    named = containers or (Container("c", "tidegate/shell"),)
    return Pod("u", "p", "ns", "gpu-node-1", named, RestartPolicy(policy), grace_s)


class World:
    """A pod, its state, and a clock that is turned by hand."""

    def __init__(self, spec: Pod, states: Mapping[str, ContainerState] | None = None) -> None:
        self.pod, self.now = spec, 100.0
        containers = {c.name: ContainerState(since_s=self.now) for c in spec.containers}
        self.state = PodState({**containers, **(states or {})}, admitted_s=self.now)

    def step(self, *events: Event, at: float | None = None) -> list[str]:
        """Take in events at a time (seconds after the start); returns what is done, in words."""
        if at is not None:
            self.now = 100.0 + at
        for event in events:
            self.state = observe(self.pod, self.state, event, self.now)
        decision = decide(self.pod, self.state, self.now)
        self.state = decision.state
        self.wake = None if decision.wake_s is None else round(decision.wake_s - 100.0, 3)
        return [word(action) for action in decision.actions]

    def run(self, name: str = "c") -> None:
        assert f"start {name}" in " ".join(self.step())
        self.step(Started(name, f"id-{name}"))

    def __getitem__(self, name: str) -> ContainerState:
        return self.state.containers[name]

    @property
    def c(self) -> ContainerState:
        return self["c"]


def word(action: Action) -> str:
    match action:
        case Start():
            return f"start {action.container.name} {action.run}"
        case RunProbe():
            return f"{action.kind} {action.container.name}"
        case RunHook():
            return f"hook {action.container.name} {action.timeout_s:g}"
        case Signal():
            return f"{'kill' if action.kill else 'term'} {action.container}"
        case Finalize():
            return "finalize"


def test_a_container_without_probes_is_ready_once_it_stands() -> None:
    world = World(pod())
    assert world.step() == ["start c 0"]
    assert world.step() == [], "a start is asked for once"
    assert world.step(Started("c", "id")) == []
    assert (world.c.phase, world.c.ready, world.c.started, world.c.runs) == (Phase.RUNNING, True, True, 1)
    assert phase(world.pod, world.state) == "Running"


@pytest.mark.parametrize(
    ("policy", "code", "restarts", "ends"),
    [
        ("Always", 0, True, ""),
        ("Always", 1, True, ""),
        ("OnFailure", 0, False, "Succeeded"),
        ("OnFailure", 137, True, ""),
        ("Never", 0, False, "Succeeded"),
        ("Never", 2, False, "Failed"),
    ],
)
def test_restart_policy(policy: str, code: int, restarts: bool, ends: str) -> None:
    world = World(pod(policy=policy))
    world.run()
    actions = world.step(Exited("c", code), at=1)
    assert actions == (["start c 1"] if restarts else [])
    assert over(world.pod, world.state) is not restarts
    if ends:
        assert phase(world.pod, world.state) == ends
    else:
        assert world.c.ended is not None
        assert world.c.ended.exit_code == code


def test_back_off_doubles_from_the_second_crash_and_is_forgotten_after_a_long_run() -> None:
    world = World(pod())
    world.run()
    now, delays = 0.0, []
    for _ in range(8):
        now += 0.5
        actions = world.step(Exited("c", 1), at=now)
        delays.append(world.c.delay_s)
        if not actions:
            assert world.c.reason == "CrashLoopBackOff"
            assert "restarting failed container=c pod=p_ns(u)" in world.c.message
            assert world.wake == pytest.approx(now + delays[-1])
            assert world.step(at=now + delays[-1] - 0.01) == []
            now += delays[-1]
            actions = world.step(at=now)
        assert actions == [f"start c {len(delays)}"]
        world.step(Started("c", "id"))
    assert delays == [0, 1, 2, 4, 8, 16, 30, 30]
    assert world.step(Exited("c", 1), at=now + 61) == ["start c 9"]


@pytest.mark.parametrize(
    ("reason", "later", "retried"),
    [
        ("CreateContainerConfigError", "CreateContainerConfigError", True),
        ("ErrImagePull", "ImagePullBackOff", False),
    ],
)
def test_a_container_that_cannot_be_made_waits_with_its_reason(
    reason: str, later: str, retried: bool
) -> None:
    world = World(pod())
    world.step()
    assert world.step(NotStarted("c", reason, "why")) == []
    assert (world.c.phase, world.c.reason, world.c.message, world.c.runs) == (Phase.WAITING, reason, "why", 0)
    assert phase(world.pod, world.state) == "Pending"
    actions = world.step(at=world.wake)
    assert actions == (["start c 0"] if retried else [])
    assert world.c.reason == later


def test_a_new_image_is_tried_at_once() -> None:
    world = World(pod())
    world.step()
    world.step(NotStarted("c", "ErrImagePull", "why"))
    assert world.step(ImageChanged("c"), at=1) == ["start c 0"]


def test_a_new_image_restarts_a_running_container() -> None:
    world = World(pod())
    world.run()
    assert world.step(ImageChanged("c"), at=1) == ["term c"]
    assert world.step(Exited("c", 143), at=2) == ["start c 1"]


def test_a_program_that_cannot_be_executed_counts_as_a_run() -> None:
    world = World(pod(policy="Never"))
    world.step()
    world.step(Exited("c", 128, "StartError", 'exec: "x": executable file not found in $PATH'))
    assert world.c.runs == 1
    assert world.c.ended is not None
    assert (world.c.ended.exit_code, world.c.ended.reason) == (128, "StartError")
    assert phase(world.pod, world.state) == "Failed"


def test_startup_probe_holds_back_the_others_and_their_delays_count_from_the_start() -> None:
    startup = Probe(HTTP, period_s=1, failure_threshold=5)
    spec = Container(
        "c",
        "i",
        startup=startup,
        readiness=Probe(HTTP, period_s=2),
        liveness=Probe(HTTP, initial_delay_s=10, period_s=5),
    )
    world = World(pod(spec))
    world.step()
    assert world.step(Started("c", "id"), at=0) == ["startup c"]
    assert world.step(Probed("c", 1, ProbeKind.STARTUP, ok=False), at=0.2) == []
    assert world.wake == 1, "the period counts from when the probe was due"
    assert world.step(at=1) == ["startup c"]
    assert world.step(Probed("c", 1, ProbeKind.STARTUP, ok=True), at=1.1) == ["readiness c"]
    assert world.c.started
    assert not world.c.ready
    assert world.step(Probed("c", 1, ProbeKind.READINESS, ok=True), at=1.2) == []
    assert world.c.ready
    assert world.wake == pytest.approx(3.1)
    assert world.step(at=10) == ["readiness c", "liveness c"]


def test_liveness_restarts_after_its_threshold_and_uses_its_own_grace() -> None:
    spec = Container("c", "i", liveness=Probe(HTTP, period_s=1, failure_threshold=2, grace_s=3))
    world = World(pod(spec))
    world.run()
    assert world.step(Probed("c", 1, ProbeKind.LIVENESS, ok=False), at=0.1) == []
    assert world.step(at=1) == ["liveness c"]
    assert world.step(Probed("c", 1, ProbeKind.LIVENESS, ok=False), at=1) == ["term c"]
    assert world.wake == 4
    assert world.step(at=4) == ["kill c"]
    assert world.step(at=5) == [], "killed once"
    assert world.step(Exited("c", 137), at=5) == ["start c 1"]


def test_a_failing_startup_probe_restarts() -> None:
    world = World(pod(Container("c", "i", startup=Probe(HTTP, period_s=1, failure_threshold=1)), grace_s=0))
    world.run()
    assert world.step(Probed("c", 1, ProbeKind.STARTUP, ok=False), at=1) == ["kill c"]


def test_readiness_goes_and_comes_by_thresholds() -> None:
    spec = Container("c", "i", readiness=Probe(HTTP, period_s=1, failure_threshold=2, success_threshold=2))
    world = World(pod(spec))
    world.run()
    seen = []
    for second, ok in enumerate([True, True, False, True, False, False, True, True]):
        world.step(Probed("c", 1, ProbeKind.READINESS, ok=ok), at=second)
        seen.append(world.c.ready)
    assert seen == [False, True, True, True, True, False, False, True]
    assert world.c.runs == 1, "readiness never restarts"


def test_results_of_an_earlier_run_are_ignored() -> None:
    world = World(pod(Container("c", "i", readiness=Probe(HTTP))))
    world.run()
    world.step(Exited("c", 1), at=1)
    world.step(Started("c", "id-2"))
    world.step(Probed("c", 1, ProbeKind.READINESS, ok=True), at=1.1)
    assert not world.c.ready


def test_deletion_without_a_hook() -> None:
    world = World(pod())
    world.run()
    assert world.step(Deleted(10), at=0) == ["term c"]
    assert world.wake == 10
    assert world.step(Exited("c", 0), at=2) == ["finalize"]
    assert world.step() == [], "finalized once"


def test_deletion_with_a_hook_that_ends() -> None:
    world = World(pod(Container("c", "i", pre_stop=Exec(("true",)))))
    world.run()
    assert world.step(Deleted(10), at=0) == ["hook c 10"]
    assert world.step(at=1) == []
    assert world.step(HookDone("c", 1), at=4) == ["term c"]
    assert world.wake == 10
    assert world.step(at=10) == ["kill c"]
    assert world.step(Exited("c", 137), at=10) == ["finalize"]


def test_a_hook_that_uses_up_the_grace_period_leaves_two_seconds_after_sigterm() -> None:
    world = World(pod(Container("c", "i", pre_stop=Exec(("sleep",)))))
    world.run()
    world.step(Deleted(5), at=0)
    assert world.step(at=5) == ["term c"]
    assert world.wake == 7
    assert world.step(at=6) == []
    assert world.step(at=7) == ["kill c"]


def test_deletion_without_grace_kills_without_asking() -> None:
    world = World(pod(Container("c", "i", pre_stop=Exec(("sleep",)))))
    world.run()
    assert world.step(Deleted(0), at=0) == ["kill c"]


def test_a_shorter_grace_wins_and_a_longer_one_does_not() -> None:
    world = World(pod())
    world.run()
    world.step(Deleted(30), at=0)
    world.step(Deleted(60), at=1)
    assert world.wake == 30
    world.step(Deleted(2), at=2)
    assert world.wake == 4


def test_readiness_is_probed_while_the_pod_ends_and_liveness_is_not() -> None:
    spec = Container("c", "i", readiness=Probe(HTTP, period_s=1), liveness=Probe(HTTP, period_s=1))
    world = World(pod(spec))
    world.run()
    for kind in (ProbeKind.READINESS, ProbeKind.LIVENESS):
        world.step(Probed("c", 1, kind, ok=True), at=0.1)
    assert world.step(Deleted(30), at=1) == ["term c", "readiness c"]
    for second in (2, 3, 4):
        world.step(Probed("c", 1, ProbeKind.LIVENESS, ok=False), at=second)
    assert world.c.stop is not None
    assert world.c.stop.deadline_s == 131, "a liveness verdict does not touch a pod that ends"


def test_a_pod_deleted_before_its_start_is_finalized_at_once() -> None:
    world = World(pod())
    assert world.step(Deleted(30)) == ["finalize"]


def test_a_pod_deleted_while_it_starts_waits_for_the_process() -> None:
    world = World(pod())
    world.step()
    assert world.step(Deleted(30), at=0) == []
    assert world.step(Started("c", "id")) == ["term c"]


def test_a_pod_deleted_in_its_back_off_is_finalized_at_once() -> None:
    world = World(pod())
    world.run()
    world.step(Exited("c", 1), at=1)
    world.step(Started("c", "id"))
    world.step(Exited("c", 1), at=2)
    assert world.c.reason == "CrashLoopBackOff"
    assert world.step(Deleted(30)) == ["finalize"]


def test_a_rejected_pod_is_never_run() -> None:
    world = World(pod())
    world.state = replace(world.state, rejection=Rejection("OutOfnvidia.com/gpu", "too many"))
    assert world.step() == []
    assert over(world.pod, world.state)
    assert phase(world.pod, world.state) == "Failed"
    assert world.step(Deleted(30)) == ["finalize"]


def test_init_containers_run_one_after_the_other() -> None:
    inits = (Container("a", "i", init=True), Container("b", "i", init=True))
    world = World(pod(*inits, Container("c", "i"), Container("d", "i")))
    assert world.step() == ["start a 0"]
    assert world["c"].reason == "PodInitializing"
    world.step(Started("a", "id"))
    assert world.step(Exited("a", 0)) == ["start b 0"]
    world.step(Started("b", "id"))
    assert world.step(Exited("b", 1), at=1) == ["start b 1"], "a failed init container is tried again"
    world.step(Started("b", "id"))
    assert phase(world.pod, world.state) == "Pending"
    assert world.step(Exited("b", 0), at=2) == ["start c 0", "start d 0"]


def test_an_init_container_that_fails_for_good_fails_the_pod() -> None:
    world = World(pod(Container("a", "i", init=True), Container("c", "i"), policy="Never"))
    world.run("a")
    assert world.step(Exited("a", 1)) == []
    assert over(world.pod, world.state)
    assert phase(world.pod, world.state) == "Failed"


def test_a_pod_of_two_ends_when_both_have() -> None:
    world = World(pod(Container("c", "i"), Container("d", "i"), policy="Never"))
    assert world.step() == ["start c 0", "start d 0"]
    world.step(Started("c", "1"), Started("d", "2"))
    world.step(Exited("c", 0))
    assert not over(world.pod, world.state)
    assert phase(world.pod, world.state) == "Running"
    world.step(Exited("d", 1))
    assert phase(world.pod, world.state) == "Failed"


def test_deciding_twice_does_nothing_twice() -> None:
    world = World(pod(Container("c", "i", readiness=Probe(HTTP), pre_stop=Exec(("true",)))))
    world.run()
    for event in (Deleted(10), HookDone("c", 1)):
        world.step(event)
        again: Decision = decide(world.pod, world.state, world.now)
        assert (again.state, again.actions) == (world.state, ())
