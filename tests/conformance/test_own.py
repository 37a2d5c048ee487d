"""Tidegate's own picker against the suite: every rule, in both body modes, with and without fallbacks."""

import pytest

from support.own_picker import own_picker
from support.small_picker import POOL
from tidegate.conformance.probe import Target
from tidegate.conformance.rules import all_rules
from tidegate.conformance.run import Verdict, run
from tidegate.conformance.wire import BodyMode


@pytest.mark.parametrize("fallbacks", [0, 2])
@pytest.mark.parametrize("mode", BodyMode)
async def test_it_keeps_every_rule(mode: BodyMode, fallbacks: int) -> None:
    target = Target("m", endpoints=POOL, mode=mode, timeout_s=5.0, overload=150)
    async with own_picker(fallbacks=fallbacks) as (address, desk):
        results = await run(address, target, all_rules(), health=address)
        assert [(r.rule.id, r.message) for r in results if r.verdict is Verdict.BROKEN] == []
        # It reads the model from the body, and refuses what is no JSON.
        assert {r.rule.id for r in results if r.verdict is Verdict.NOT_RUN} == {"body.binary"}
        assert desk.flow.bytes == 0
    held = [desk.flow.held(one) for one in POOL]
    assert held == [(0, 0)] * len(POOL)


async def test_with_fallbacks_a_list_is_named() -> None:
    from tidegate.conformance.probe import Probe
    from tidegate.conformance.wire import Picker, connect

    async with own_picker(fallbacks=2) as (address, _), connect(address) as channel:
        probe = Probe(Picker(channel, BodyMode.FULL_DUPLEX, 5.0), Target("m"))
        answer = await probe.chosen(probe.request())
        assert sorted(answer.endpoints) == sorted(POOL)
        assert answer.header == answer.metadata
