"""Applies what exposes a model to gateways. What goes wrong here stands in its own condition only."""

import logging
from typing import Any

from tidegate.adapters.kube import ApiError, Kind
from tidegate.adapters.kube import kinds as k
from tidegate.api.modeldeployment import ModelDeployment
from tidegate.controller.apply import Children, Outcome
from tidegate.controller.gather import Facts, ModelFacts, Problem
from tidegate.controller.world import OPTIONAL_KINDS, World, owned
from tidegate.core import reasons
from tidegate.render.exposure import NotExposableError, exposed, http_route, inference_pool

log = logging.getLogger(__name__)

Object = dict[str, Any]
Wanted = list[tuple[Kind, Object]]


async def apply_exposure(
    children: Children, world: World, facts: Facts, found: ModelFacts, outcome: Outcome
) -> None:
    """InferencePool and HTTPRoute of one model, or nothing of them where they are not asked for.

    The pods of an External engine are not touched by it, so theirs are written too; a paused model,
    and one in a pool that only observes, is left as it is.
    """
    if found.obj is None or found.deleting or found.hands_off in (reasons.PAUSED, reasons.OBSERVED):
        return
    pool = facts.pools.get(found.pool)
    if found.problem or (pool is not None and not pool.enforced):
        return
    wanted, problem = rendered(found.obj)
    own = Outcome(problem)
    for kind, obj in wanted:
        if own.problem is None:
            own.problem = await _apply(children, world, kind, obj, found.obj.metadata.uid, own)
    await _remove(children, world, found, wanted, own)
    outcome.unexposed = own.problem
    outcome.conflicts += own.conflicts
    outcome.repaired += own.repaired


def rendered(model: ModelDeployment) -> tuple[Wanted, Problem | None]:
    """What exposes a model, in the order to apply it, and why it cannot be exposed."""
    exposure = exposed(model)
    if exposure is None:
        return [], None
    try:
        wanted: Wanted = [(k.INFERENCE_POOL, inference_pool(model))]
        if exposure.parent_refs:
            wanted.append((k.HTTP_ROUTE, http_route(model)))
    except NotExposableError as error:
        return [], Problem(reasons.NOT_EXPOSABLE, str(error), final=True)
    return wanted, None


async def _apply(
    children: Children, world: World, kind: Kind, obj: Object, uid: str, own: Outcome
) -> Problem | None:
    name = obj["metadata"]["name"]
    if not world.installed(kind):
        text = (
            f"the cluster has no {kind.name} ({kind.api_version}), which spec.exposure needs; install its CRD"
        )
        return Problem(reasons.CRD_NOT_INSTALLED, text)
    try:
        await children.ensure(kind, obj, uid, own)
    except ApiError as error:
        log.warning("applying %s %s: %s; again in the next period", kind.name, name, error)
        return Problem(reasons.APPLY_FAILED, f"{kind.name} {name}: {error.message}")
    return own.problem


async def _remove(children: Children, world: World, found: ModelFacts, wanted: Wanted, own: Outcome) -> None:
    """Delete what is rendered no more, the route before the pool that it leads to."""
    keep = {(kind, obj["metadata"]["name"]) for kind, obj in wanted}
    for kind in reversed(OPTIONAL_KINDS):
        for child in owned(world.objects(kind), found.raw["metadata"]["uid"]):
            if (kind, child["metadata"]["name"]) not in keep:
                try:
                    await children.remove(kind, child)
                except ApiError as error:
                    own.problem = Problem(reasons.APPLY_FAILED, f"deleting a {kind.name}: {error.message}")
