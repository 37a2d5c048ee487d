"""The suite itself: who keeps every rule passes, and who breaks one is caught by its name."""

import asyncio
import json
import sys

import pytest
from typer.testing import CliRunner

from support.ports import free_port
from support.small_picker import POOL, SmallPicker, serving
from tidegate.cli.main import app
from tidegate.conformance.probe import Target
from tidegate.conformance.rules import Level, all_rules, select
from tidegate.conformance.run import Result, Verdict, run
from tidegate.conformance.wire import BodyMode

TIME_S = 3.0
"""As long as those that are silent make a test; much longer than any answer takes on a busy machine."""


async def broken(fault: str, *rules: str, mode: BodyMode = BodyMode.FULL_DUPLEX, **more) -> list[Result]:
    """The rules that a picker with this fault does not keep, of those that are asked for."""
    unhealthy = more.pop("unhealthy", ())
    target = Target("m", endpoints=POOL, mode=mode, timeout_s=TIME_S, overload=100, **more)
    async with serving(SmallPicker(fault), unhealthy=unhealthy) as address:
        results = await run(address, target, select(rules), health=address)
    return [r for r in results if r.verdict is not Verdict.KEPT]


@pytest.mark.parametrize("mode", BodyMode)
async def test_a_picker_that_keeps_every_rule_passes(mode: BodyMode) -> None:
    assert [(r.rule.id, r.message) for r in await broken("", mode=mode)] == []


SUBSET, STREAM = ({r.id for r in select([group])} for group in ("subset", "stream"))
# What is wrong with it → the rules that must name it, of their groups.
FAULTS = {
    "sets no header": {"destination.header", "destination.overwrites"},
    "sets no metadata": {"destination.metadata"},
    "contradicts itself": {"destination.same"},
    "names no port": {"destination.format", "destination.known"},
    "repeats itself": {"destination.once"},
    "names a stranger": {"destination.known"},
    "obeys a client's destination": {"destination.forged"},
    "appends the header": {"destination.overwrites"},
    "ignores hints": SUBSET - {"subset.absent", "subset.header"},
    "falls back outside the hint": {"subset.only", "subset.fallbacks", "subset.mixed", "subset.text"},
    "wants the whole hint": {"subset.mixed", "subset.text"},
    "says 404 for 503": {"subset.strangers", "subset.empty", "subset.text", "subset.malformed"},
    "takes an empty hint for none": {"subset.empty"},
    "takes a bad hint for none": {"subset.malformed"},
    "reads no text": {"subset.text"},
    "reads any namespace": SUBSET - {"subset.header"},
    "obeys a client's subset": {"subset.header"},
    "loses a byte": {"body.whole", "body.pieces", "body.large", "body.trailers", "body.binary"},
    "takes bodies for text": {"body.binary"},
    "stops at an empty piece": {"body.pieces"},
    "sends large pieces": {"body.large"},
    "answers bodies first": {f"body.{n}" for n in ("order", "whole", "pieces", "empty", "garbage", "binary")},
    "ends before the trailers": {"body.trailers"},
    "gives a GET a body": {"body.none"},
    "is silent on GET": {"body.none"},
    "mixes bodies": {"stream.parallel"},
    "dies of aborted streams": STREAM - {"stream.parallel"},
    "reads twenty headers": {"stream.headers"},
    "reads raw values": {"stream.values"},
    "ends badly": {"stream.closes"},
    "is silent on responses": {r.id for r in select(["response"])},
    "cuts responses": {"response.body"},
    "holds tokens back": {"response.flows"},
    "is silent on trailers": {"response.trailers"},
    "fails on what was served": {"response.served", "response.stranger"},
    "trusts what was served": {"response.stranger"},
    "sheds with 500": {"refusal.shed"},
    "gives no Retry-After": {"refusal.retry"},
}  # fmt: skip


@pytest.mark.parametrize(("fault", "expected"), FAULTS.items(), ids=list(FAULTS))
async def test_a_fault_is_caught_by_the_rule_s_name(fault: str, expected: set[str]) -> None:
    groups = {name.partition(".")[0] for name in expected}
    results = await broken(fault, *groups)
    assert {r.rule.id: r.message for r in results}.keys() == expected
    assert all(r.message for r in results)


@pytest.mark.parametrize(
    ("service", "rule"),
    [
        ("liveness", "health.liveness"),
        ("readiness", "health.readiness"),
        ("envoy.service.ext_proc.v3.ExternalProcessor", "health.ext-proc"),
        ("every name", "health.unknown"),
    ],
)
async def test_health_that_is_not_as_it_should_be_is_caught(service: str, rule: str) -> None:
    results = await broken("", "health", unhealthy=(service,))
    assert [r.rule.id for r in results] == [rule]


def test_every_rule_is_broken_by_some_fault() -> None:
    """A rule that nothing can break proves nothing."""
    caught = set().union(*FAULTS.values())
    assert {r.id for r in all_rules() if not r.id.startswith("health.")} <= caught


async def test_what_cannot_be_checked_is_said_and_is_no_failure() -> None:
    target = Target("m", timeout_s=1.0)
    async with serving(SmallPicker()) as address:
        results = await run(address, target, select(["destination.known", "refusal", "health"]))
    assert {r.verdict for r in results} == {Verdict.NOT_RUN}
    assert not any(r.failed for r in results)
    assert "--endpoint" in results[0].message


async def test_without_endpoints_what_the_picker_chooses_is_hinted_at() -> None:
    async with serving(SmallPicker("ignores hints")) as address:
        results = await run(address, Target("m", timeout_s=1.0), select(["subset.only"]))
    assert [r.verdict for r in results] == [Verdict.BROKEN]


# ── the command ─────────────────────────────────────────────────────────────────────────────────


async def command(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tidegate", "conformance", "epp", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_a_picker_that_conforms_is_exit_0() -> None:
    async with serving(SmallPicker()) as address:
        code, out, err = await command(
            address, "--model", "m", "--health", address, "--skip", "refusal", "--header", "x-a: b",
            *(word for one in POOL for word in ("--endpoint", one)),
        )  # fmt: skip
    assert code == 0, out + err
    assert out.splitlines()[-1] == f"{len(all_rules()) - 2} rules kept"


async def test_a_must_that_is_broken_is_exit_1_and_a_should_is_not() -> None:
    async with serving(SmallPicker("sets no metadata")) as address:
        code, out, _ = await command(address, "--model", "m", "--rule", "destination")
        assert code == 1
        assert "BROKEN  MUST   destination.metadata" in out
        assert "1 MUST broken: destination.metadata" in out
    async with serving(SmallPicker("repeats itself")) as address:
        code, out, _ = await command(address, "--model", "m", "--rule", "destination.once", "-o", "json")
    assert code == 0
    said = json.loads(out)
    assert said["conforms"]
    assert said["rules"][0]["level"] == Level.SHOULD
    assert said["rules"][0]["verdict"] == "broken"
    assert said["rules"][0]["message"]


async def test_nobody_there_is_exit_2_and_says_so() -> None:
    nobody = f"127.0.0.1:{free_port()}"
    code, out, err = await command(nobody, "--model", "m", "--timeout", "0.5")
    assert code == 2
    assert out == ""
    assert nobody in err
    assert "--tls" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["here:9002"], "--model"),
        (["here", "--model", "m"], "HOST:PORT"),
        (["here:1", "--model", "m", "--rule", "subsets"], "groups are"),
        (["here:1", "--model", "m", "--skip", "no.such"], "no.such"),
        (["here:1", "--model", "m", "--header", "no colon"], "name: value"),
        (["here:1", "--model", "m", "--endpoint", "a-name:80"], "IP address"),
        (["here:1", "--model", "m", "--endpoint", "10.0.0.1"], "port"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_what_was_asked_wrongly_is_said(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["conformance", "epp", *arguments])
    assert result.exit_code == 2
    assert said in "".join(result.output.split()) or said in " ".join(result.output.replace("│", "").split())


def test_the_rules_can_be_listed() -> None:
    result = CliRunner().invoke(app, ["conformance", "epp", "--list", "-o", "json"])
    assert [r["id"] for r in json.loads(result.output)] == [r.id for r in all_rules()]
    text = CliRunner().invoke(app, ["conformance", "epp", "--list", "--rule", "subset"]).output
    assert text.splitlines()[0].startswith("MUST   subset.only")
    assert len(text.splitlines()) == len(select(["subset"]))


@pytest.mark.parametrize("rule", all_rules(), ids=lambda r: r.id)
def test_each_rule_says_what_must_hold(rule) -> None:
    assert rule.text.endswith(".")
    assert len(rule.text) < 200
