"""A scenario of a cluster as it is: what was seen in, a document for `tidegate simulate` out. Pure.

Where something could not be seen, a default stands for it and a note says so. Nothing of what
people wrote goes in: no prompts, no tokens, no callers, no tenants; only names of objects.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Final, NamedTuple

from tidegate.adapters.metrics import Sample
from tidegate.api.gpupool import GPUPool
from tidegate.api.modeldeployment import ModelDeployment
from tidegate.api.qosclass import QoSClass
from tidegate.core.flowtypes import ModelKey
from tidegate.facts.classes import default_class, qos_class
from tidegate.facts.endpoints import world
from tidegate.facts.lanes import served
from tidegate.sim.build import SHIPPED, shown
from tidegate.sim.cluster.survey import plan_of
from tidegate.sim.scenario import Engine

SECONDS: Final = 600
WARM_UP: Final = "60s"
DEFAULT_PER_REPLICA: Final = 1.0
"""Requests a second for each replica of a lane whose arrivals are not known."""
_SHAPE: Final = "chat"
"""Lengths of a lane of which nothing is known."""
_COUNTERS: Final = ("tidegate_arrivals_total", "tidegate_prompt_tokens_total", "tidegate_output_tokens_total")
_QUEUED: Final = "tidegate_queue_requests"
_IN_FLIGHT: Final = "tidegate_inflight_requests"

LaneName = tuple[str, str, str]
"""Namespace, model and class."""


class Traffic(NamedTuple):
    """What came for a model and class. Lengths are means, None where nothing ever came."""

    per_second: float
    prompt: float | None = None
    output: float | None = None
    queued: int = 0
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """What could be read. `pods`, `traffic`, `nodes` None: nobody could say; `kv_tokens` is by address."""

    classes: Sequence[QoSClass]
    models: Sequence[ModelDeployment]
    pools: Sequence[GPUPool] = ()
    pods: Sequence[Mapping[str, Any]] | None = None
    traffic: Mapping[LaneName, Traffic] | None = None
    kv_tokens: Mapping[str, int] = field(default_factory=dict)
    idle_gpus: Mapping[str, float] = field(default_factory=dict)
    window_s: float = 0.0
    nodes: Sequence[Mapping[str, Any]] | None = None


class NothingToSimulateError(ValueError):
    """The cluster has no classes, or no model with a replica; the message says which."""


# ── what pickers say ────────────────────────────────────────────────────────────────────────────


def by_lane(samples: Iterable[Sample], name: str) -> dict[LaneName, float]:
    """A metric summed over all labels but namespace, model and class."""
    total: dict[LaneName, float] = {}
    for s in samples:
        if s.name == name and {"namespace", "model", "qos_class"} <= s.labels.keys():
            key = (s.labels["namespace"], s.labels["model"], s.labels["qos_class"])
            total[key] = total.get(key, 0.0) + s.value
    return total


def traffic(before: Sequence[Sample], after: Sequence[Sample], span_s: float) -> dict[LaneName, Traffic]:
    """Rates between two looks at one picker, and mean lengths since it began.

    A counter that fell began again at zero. A queue counts where it was there both times.
    """
    first = by_lane(before, _COUNTERS[0])
    arrived, prompts, outputs = (by_lane(after, name) for name in _COUNTERS)
    queues = [by_lane(samples, _QUEUED) for samples in (before, after)]
    in_flight = by_lane(after, _IN_FLIGHT)
    result = {}
    for key in sorted({*arrived, *queues[1], *in_flight}):
        count = arrived.get(key, 0.0)
        came = count - first.get(key, 0.0)
        result[key] = Traffic(
            per_second=(came if came >= 0 else count) / span_s,
            prompt=prompts.get(key, 0.0) / count if count else None,
            output=outputs.get(key, 0.0) / count if count else None,
            queued=round(min(q.get(key, 0.0) for q in queues)),
            in_flight=round(in_flight.get(key, 0.0)),
        )
    return result


def together(seen: Sequence[Mapping[LaneName, Traffic]]) -> dict[LaneName, Traffic]:
    """What several pickers saw; means of lengths weigh as the rates do."""
    result: dict[LaneName, Traffic] = {}
    for key in sorted({key for one in seen for key in one}):
        parts = [one[key] for one in seen if key in one]
        result[key] = Traffic(
            per_second=sum(p.per_second for p in parts),
            prompt=_mean((p.prompt, p.per_second) for p in parts),
            output=_mean((p.output, p.per_second) for p in parts),
            queued=sum(p.queued for p in parts),
            in_flight=sum(p.in_flight for p in parts),
        )
    return result


def _mean(values: Iterable[tuple[float | None, float]]) -> float | None:
    known = [(value, weight + 1e-9) for value, weight in values if value is not None]
    return sum(v * w for v, w in known) / sum(w for _, w in known) if known else None


# ── the scenario ────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Lane:
    """Replicas of a model's lane that serve now."""

    model: ModelDeployment
    lane: str
    count: int = 0
    slots: int | None = None
    kv_tokens: int | None = None

    @property
    def key(self) -> ModelKey:
        return (self.model.metadata.namespace or "default", self.model.metadata.name)


def document(seen: Seen) -> dict[str, Any]:
    """The scenario, as plain values in the order in which they are to be written.

    Raises:
        NothingToSimulateError: There is no class, or no replica serves.
    """
    if not seen.classes:
        raise NothingToSimulateError("there is no QoSClass, so there is nothing to simulate")
    notes: list[str] = []
    lanes = [lane for lane in _lanes(seen, notes) if lane.count]
    if not lanes:
        raise NothingToSimulateError(
            f"no replica of {len(seen.models)} ModelDeployments serves now, so there is nothing to simulate"
        )
    streams = list(_streams(seen, lanes, notes))
    serving = list({lane.key: lane.model for lane in lanes}.values())
    names = [c.metadata.name for c in _ranked(seen)]
    plan = plan_of(seen.pools, seen.nodes, serving, names, default_class(seen.classes), notes)
    engines = _alike(lanes, notes) if plan else [_engine(lane) for lane in lanes]
    common = Counter(tuple(e.items()) for e in engines).most_common(1)[0][0]
    notes += [*_engine_notes(lanes), *_pool_notes(seen)]
    return {
        "notes": notes,
        "seconds": SECONDS,
        "warmUp": WARM_UP,
        "classes": {c.metadata.name: _class(c, notes) for c in _ranked(seen)},
        "replicas": [
            _group(lane) | ({} if tuple(own.items()) == common else {"engine": own})
            for lane, own in zip(lanes, engines, strict=True)
        ],
        "engine": dict(common),
        **({"plan": plan} if plan else {}),
        "streams": streams,
    }


def _alike(lanes: Sequence[_Lane], notes: list[str]) -> list[dict[str, int]]:
    """Engines of lanes where the plan moves replicas: those of a model are its first lane's."""
    first: dict[ModelKey, dict[str, int]] = {}
    for lane in lanes:
        own = _engine(lane)
        if first.setdefault(lane.key, own) != own:
            notes.append(f"{shown(lane.key)}: engines of its lanes differ; all are as the highest's here")
    return [first[lane.key] for lane in lanes]


def _ranked(seen: Seen) -> list[QoSClass]:
    return sorted(seen.classes, key=lambda c: (-c.spec.priority, c.metadata.name))


def _class(obj: QoSClass, notes: list[str]) -> dict[str, Any]:
    """The spec without what names namespaces and tenants: nothing here is decided by them."""
    spec = obj.spec.to_json()
    spec.pop("allowedNamespaces", None)
    if spec.pop("tenant", {}).get("from", "None") != "None":
        notes.append(
            f"class {obj.metadata.name} is shared by tenants; metrics do not tell them, so all are one here"
        )
    return spec


def _lanes(seen: Seen, notes: list[str]) -> list[_Lane]:
    """Every lane of every model with its replicas that serve: by pods, else by the models' status."""
    default = default_class(seen.classes)
    names = [c.metadata.name for c in _ranked(seen)]
    lanes = {
        (m.metadata.namespace or "default", m.metadata.name, name): _Lane(m, name)
        for m in sorted(seen.models, key=lambda m: (m.metadata.namespace or "default", m.metadata.name))
        for name in sorted(served(m, default), key=lambda n: names.index(n) if n in names else len(names))
        if name in names
    }
    if seen.pods is None:
        notes.append("pods could not be listed: replicas are those that ModelDeployments' status calls ready")
        for lane in lanes.values():
            ready = (c.ready for c in lane.model.status.classes if c.qos_class == lane.lane)
            lane.count = next(ready, 0)
        return list(lanes.values())
    classes = {c.metadata.name: qos_class(c) for c in seen.classes}
    found = world(seen.models, seen.pods, classes, default)
    left_out = 0
    for endpoint in found.endpoints:
        first = next((key[2] for key in lanes if key[:2] == endpoint.model), "")
        own = lanes.get((*endpoint.model, endpoint.lane)) or lanes.get((*endpoint.model, first))
        if own is None or not endpoint.ready or endpoint.draining:
            left_out += 1
            continue
        own.count += 1
        own.slots = endpoint.slots
        own.kv_tokens = seen.kv_tokens.get(endpoint.address, own.kv_tokens)
    if left_out:
        notes.append(
            f"{left_out} pods are left out: they are not ready, draining, or of no class that exists"
        )
    return list(lanes.values())


def _group(lane: _Lane) -> dict[str, Any]:
    gpus = lane.model.gpus_per_replica
    return {"model": shown(lane.key), "lane": lane.lane, "count": lane.count} | (
        {"gpus": gpus} if gpus > 1 else {}
    )


# ── engines ─────────────────────────────────────────────────────────────────────────────────────


def _flags(args: Iterable[str]) -> dict[str, str]:
    """Flags of a command line, `--flag value` and `--flag=value`, dashed."""
    words = list(args)
    result = {}
    for index, word in enumerate(words):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            result[flag[2:].replace("_", "-")] = value if equals else "".join(words[index + 1 : index + 2])
    return result


def _engine(lane: _Lane) -> dict[str, int]:
    """Settings of vLLM: by the pods, the arguments, what the engine said of its cache, and defaults."""
    flags, default = _flags(lane.model.spec.engine.args or ()), Engine()
    given = {name: int(v) for name, v in flags.items() if re.fullmatch(r"[1-9][0-9]{0,8}", v)}
    seqs = lane.slots or given.get("max-num-seqs", default.max_num_seqs)
    block = given.get("block-size", default.block_size)
    blocks = given.get("num-gpu-blocks-override") or (lane.kv_tokens // block if lane.kv_tokens else 0)
    # A step without room for a prompt beside its decodes could not be simulated.
    budget = max(given.get("max-num-batched-tokens", default.max_num_batched_tokens), seqs + 1)
    return {
        "max-num-seqs": seqs,
        "max-num-batched-tokens": budget,
        "block-size": block,
        "num-gpu-blocks": max(2, blocks or default.num_gpu_blocks),
    }


def _engine_notes(lanes: Iterable[_Lane]) -> Iterator[str]:
    default = Engine()
    models = {lane.key: lane for lane in lanes}
    for key, lane in models.items():
        name, flags = shown(key), _flags(lane.model.spec.engine.args or ())
        kind = lane.model.spec.engine.type
        if kind == "Triton":
            yield f"{name} runs in Triton; it is simulated as vLLM"
        if "max-num-batched-tokens" not in flags:
            yield f"{name}: max-num-batched-tokens is not set; {default.max_num_batched_tokens} is assumed"
        if "num-gpu-blocks-override" not in flags and lane.kv_tokens is None:
            yield f"{name}: its KV cache is not known; {default.num_gpu_blocks} blocks are assumed"
        if lane.model.spec.profile_ref:
            yield f"{name} names a step-time profile, which is not read here: set stepTime to a copy of it"
        if any(c.objectives for c in lane.model.spec.classes):
            yield f"{name} overrides objectives of its classes; the classes' own are used"
    yield "stepTime is the default, of Llama-3-8B on one A100: nothing here says how fast these engines are"


def _pool_notes(seen: Seen) -> Iterator[str]:
    for pool in sorted(seen.pools, key=lambda p: p.metadata.name):
        status, name = pool.status, pool.metadata.name
        idle = seen.idle_gpus.get(name, status.capacity - status.allocated - status.foreign)
        yield f"pool {name}: {status.capacity} GPUs, {idle:.0f} of them idle when this was taken"


# ── streams ─────────────────────────────────────────────────────────────────────────────────────


def _streams(seen: Seen, lanes: Sequence[_Lane], notes: list[str]) -> Iterator[dict[str, Any]]:
    """One for each class of a model that has a replica; one for each lane where nothing is known."""
    serving = {lane.key for lane in lanes}
    known = {c.metadata.name: c for c in _ranked(seen)}
    came = {k: t for k, t in (seen.traffic or {}).items() if k[2] in known and (t.per_second > 0 or t.queued)}
    without = sorted({shown(key[:2]) for key in came if key[:2] not in serving})
    if without:
        notes.append(f"requests for {', '.join(without)} are left out: no replica of it serves")
    found = {key: flow for key, flow in came.items() if key[:2] in serving}
    if not found:
        why = (
            "no picker could be asked" if seen.traffic is None else "nothing came while pickers were watched"
        )
        notes.append(
            f"{why}: arrivals are {DEFAULT_PER_REPLICA:g} request/s for each replica of a lane, lengths those"
            f" of the {_SHAPE} trace"
        )
        yield from (_assumed(lane) for lane in lanes)
        return
    notes.append(
        f"arrivals were counted for {seen.window_s:g} s; mean lengths are the pickers' estimates since they"
        " began, outputs what clients allowed; their spread is that of the trace named"
    )
    order = list(known)
    for key in sorted(found, key=lambda k: (k[:2], order.index(k[2]))):
        flow, promised = found[key], known[key[2]].spec.objectives
        # A queue that people wait in is a burst; one that nobody waits in is a backlog that refills.
        backlog = flow.queued > 0 and promised.time_to_first_token is None
        yield _stream(key, flow, backlog=backlog)
        if backlog:
            notes.append(
                f"class {key[2]} of {shown(key[:2])} had {flow.queued} requests waiting all the time: it is"
                " simulated as a backlog that refills"
            )


def _assumed(lane: _Lane) -> dict[str, Any]:
    rate = DEFAULT_PER_REPLICA * lane.count
    return {
        "name": f"{shown(lane.key)}/{lane.lane}",
        "class": lane.lane,
        "model": shown(lane.key),
        "lengths": _SHAPE,
        "arrivals": {"poisson": {"perSecond": rate}},
    }


def _stream(key: LaneName, flow: Traffic, *, backlog: bool) -> dict[str, Any]:
    model = shown(key[:2])
    lengths: dict[str, Any] = {"trace": _SHAPE}
    if flow.prompt and flow.output:
        lengths = {
            "trace": _nearest(flow.prompt),
            "meanPrompt": round(max(1.0, flow.prompt), 1),
            "meanOutput": round(max(1.0, flow.output), 1),
        }
    return {
        "name": f"{model}/{key[2]}",
        "class": key[2],
        "model": model,
        "lengths": lengths,
        **(
            {"outstanding": flow.queued + flow.in_flight}
            if backlog
            else {"arrivals": {"poisson": {"perSecond": max(0.001, round(flow.per_second, 3))}}}
        ),
        **({"expectedOutput": max(1, round(flow.output))} if flow.output else {}),
    }


def _nearest(prompt: float) -> str:
    """The shipped trace that has to be stretched least to this mean prompt."""

    def stretch(name: str) -> float:
        mean = fmean(length.prompt for length in SHIPPED[name]())
        return abs(math.log(max(1.0, prompt) / mean))

    return min(SHIPPED, key=stretch)
