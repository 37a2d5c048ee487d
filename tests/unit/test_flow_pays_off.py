"""The demo's promise, with the queue that is shipped and the engine model, in virtual time."""

from support.flow_sim import Result, Simulation

RATES = {"interactive": [(15.0, 2.0), (30.0, 6.0), (45.0, 2.0)], "standard": [(45.0, 0.5)]}


def run(*, qos: bool) -> Result:
    return Simulation(qos=qos, seed=1, seconds=45).run(RATES, outstanding=128)


def test_people_wait_a_third_at_most_and_batch_keeps_85_percent() -> None:
    qos, fifo = run(qos=True), run(qos=False)
    assert qos.p99("interactive") <= fifo.p99("interactive") / 3
    assert qos.tokens["batch"] >= 0.85 * fifo.tokens["batch"]
