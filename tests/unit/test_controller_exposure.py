"""What is applied and deleted to expose a model, and kinds that a cluster may not have: no API server."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from support.builders import external, mdep
from support.wait import becomes
from tidegate.adapters.kube import ApiError, Kind
from tidegate.adapters.kube import kinds as k
from tidegate.api.modeldeployment import ModelDeployment
from tidegate.controller import optional
from tidegate.controller.apply import Children, Outcome
from tidegate.controller.exposure import apply_exposure
from tidegate.controller.gather import ModelFacts, Problem
from tidegate.controller.optional import OptionalKinds
from tidegate.controller.world import World

Object = dict[str, Any]
BOTH = {k.INFERENCE_POOL, k.HTTP_ROUTE}


class Api:
    """An API server as far as these children go: remembers what was applied."""

    def __init__(self) -> None:
        self.objects: dict[tuple[Kind, str], Object] = {}
        self.version, self.refuses = 0, ""

    async def get(self, kind: Kind, name: str, _namespace: str | None = None) -> Object:
        if (kind, name) not in self.objects:
            raise ApiError(404, "NotFound", f"{kind.plural} {name} not found")
        return self.objects[kind, name]

    async def apply(self, kind: Kind, obj: Object, **_: Any) -> Object:
        if self.refuses == kind.name:
            raise ApiError(403, "Forbidden", f"{kind.plural} is forbidden")
        self.version += 1
        meta = {**obj["metadata"], "resourceVersion": str(self.version), "uid": f"uid-{kind.name}"}
        self.objects[kind, meta["name"]] = {**obj, "metadata": meta}
        return self.objects[kind, meta["name"]]

    async def delete(self, kind: Kind, name: str, *_: Any, **__: Any) -> None:
        del self.objects[kind, name]

    @property
    def there(self) -> set[str]:
        return {kind.name for kind, _ in self.objects}


class Round:
    """The controller's step for one model, again and again."""

    def __init__(self, installed: set[Kind]) -> None:
        self.api, self.installed = Api(), installed
        self.world: Any = World(self.api, lambda: None)  # type: ignore[arg-type]
        self.world._optional = SimpleNamespace(
            installed=lambda kind: kind in self.installed, objects=self._of
        )
        self.children = Children(self.api, self.world, lambda _kind: None)  # type: ignore[arg-type]

    def _of(self, kind: Kind) -> dict[tuple[str, str], Object]:
        return {("default", name): o for (of, name), o in self.api.objects.items() if of is kind}

    async def run(self, raw: Object, *, enforced: bool = True, **more: Any) -> Outcome:
        raw = {**raw, "metadata": {**raw["metadata"], "uid": "u"}}
        found = replace(ModelFacts(raw, ModelDeployment.from_object(raw), pool="p"), **more)
        facts: Any = SimpleNamespace(pools={"p": SimpleNamespace(enforced=enforced)})
        outcome = Outcome()
        await apply_exposure(self.children, self.world, facts, found, outcome)
        return outcome


EXPOSED = mdep(exposure={"parentRefs": [{"name": "front"}]})


async def test_pool_and_route_are_applied_once_and_deleted_when_they_are_not_asked_for() -> None:
    one = Round(BOTH)
    assert (await one.run(EXPOSED)).unexposed is None
    assert one.api.there == {"InferencePool", "HTTPRoute"}
    before = one.api.version
    await one.run(EXPOSED)
    assert one.api.version == before
    await one.run(mdep(exposure={"endpointPicker": {}}))
    assert one.api.there == {"InferencePool"}
    await one.run(mdep())
    assert one.api.there == set()


@pytest.mark.parametrize(
    ("installed", "named", "there"),
    [
        (set(), "InferencePool", set()),
        ({k.HTTP_ROUTE}, "InferencePool", set()),  # a route to nowhere helps nobody
        ({k.INFERENCE_POOL}, "HTTPRoute", {"InferencePool"}),
    ],
)
async def test_a_crd_that_is_not_there_is_named(installed: set[Kind], named: str, there: set[str]) -> None:
    one = Round(installed)
    outcome = await one.run(EXPOSED)
    assert outcome.unexposed is not None
    assert outcome.unexposed.reason == "CRDNotInstalled"
    assert f"no {named} (" in outcome.unexposed.message
    assert outcome.problem is None
    assert one.api.there == there


async def test_a_refusal_stands_in_its_own_condition() -> None:
    one = Round(BOTH)
    one.api.refuses = "HTTPRoute"
    outcome = await one.run(EXPOSED)
    assert outcome.unexposed is not None
    assert outcome.unexposed.reason == "ApplyFailed"
    assert "httproutes is forbidden" in outcome.unexposed.message
    assert outcome.problem is None
    one.api.refuses = ""
    assert (await one.run(EXPOSED)).unexposed is None


async def test_somebody_else_s_pool_is_left_and_no_route_leads_to_it() -> None:
    one = Round(BOTH)
    theirs = {
        "metadata": {"name": "m", "namespace": "default", "uid": "x", "resourceVersion": "1"},
        "spec": {},
    }
    one.api.objects[k.INFERENCE_POOL, "m"] = theirs
    outcome = await one.run(EXPOSED)
    assert outcome.unexposed is not None
    assert outcome.unexposed.reason == "NameTaken"
    assert one.api.objects == {(k.INFERENCE_POOL, "m"): theirs}
    await one.run(mdep())
    assert one.api.objects == {(k.INFERENCE_POOL, "m"): theirs}


LEFT = {
    "paused": {"hands_off": "Paused"},
    "only observed": {"hands_off": "Observed"},
    "of others, in a pool that only observes": {"hands_off": "External", "enforced": False},
    "wrong": {"problem": Problem("NoClass", "no class")},
}


@pytest.mark.parametrize("how", LEFT.values(), ids=LEFT)
async def test_what_is_not_to_be_touched_is_neither_exposed_nor_withdrawn(how: Object) -> None:
    one = Round(BOTH)
    await one.run(EXPOSED, **how)
    assert one.api.there == set()
    await one.run(EXPOSED)
    await one.run(mdep(), **how)
    assert one.api.there == {"InferencePool", "HTTPRoute"}


async def test_engines_of_others_are_exposed() -> None:
    one = Round(BOTH)
    raw = external()
    raw["spec"]["exposure"] = {"endpointPicker": {}}
    await one.run(raw, hands_off="External")
    [pool] = one.api.objects.values()
    assert pool["spec"]["selector"] == {"matchLabels": {"app": "x"}}


# ── kinds that may not be there ─────────────────────────────────────────────────────────────────


class Discovery:
    """An API server that serves a kind, or does not, or does not answer."""

    def __init__(self) -> None:
        self.state = "absent"
        self.watching = 0

    async def request(self, _method: str, path: str) -> Object:
        assert path == "/apis/inference.networking.k8s.io/v1"
        if self.state == "absent":
            raise ApiError(404, "NotFound", "not found")
        if self.state == "away":
            raise ApiError(0, "ConnectionFailed", "away")
        return {"resources": [{"name": "inferencepools/status"}, {"name": "inferencepools"}]}

    async def list(self, kind: Kind, *_: Any, **__: Any) -> tuple[list[Object], str]:
        assert kind is k.INFERENCE_POOL
        pool = {"metadata": {"name": "m", "namespace": "ns", "uid": "1", "resourceVersion": "1"}}
        return [pool], "1"

    async def watch(self, *_: Any, **__: Any) -> Any:
        self.watching += 1
        try:
            await asyncio.Event().wait()
            yield "never", {}
        finally:
            self.watching -= 1


async def test_a_kind_is_watched_from_when_it_is_served_until_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optional, "LOOK_S", 0.01)
    api, told = Discovery(), []
    kinds = OptionalKinds(api, (k.INFERENCE_POOL,), "", lambda event, _obj: told.append(event))  # type: ignore[arg-type]
    task = asyncio.create_task(kinds.run())

    async def seen(installed: bool) -> None:
        await becomes(lambda: kinds.installed(k.INFERENCE_POOL) is installed, "the kind", within_s=10)

    try:
        await asyncio.sleep(0.05)
        assert not kinds.installed(k.INFERENCE_POOL)
        assert kinds.objects(k.INFERENCE_POOL) == {}
        api.state = "there"
        await seen(True)
        assert list(kinds.objects(k.INFERENCE_POOL)) == [("ns", "m")]
        api.state = "away"  # no answer is no sign that it went
        await asyncio.sleep(0.05)
        assert kinds.installed(k.INFERENCE_POOL)
        api.state = "absent"
        await seen(False)
        assert kinds.objects(k.INFERENCE_POOL) == {}
        api.state = "there"
        await seen(True)
        assert "" in told
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert api.watching == 0
