"""From a scenario to what a fleet runs: names checked against each other, traces read."""

import difflib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from tidegate.api.common import ObjectMeta
from tidegate.api.qosclass import QoSClass as ApiClass
from tidegate.core.flowtypes import ModelKey
from tidegate.core.steptime import LLAMA2_70B_H100_TP8, LLAMA3_8B_A100, StepFit
from tidegate.core.types import QoSClass
from tidegate.facts.classes import qos_class
from tidegate.sim import traces, workload
from tidegate.sim.fleet import Fault, Replica, Setting
from tidegate.sim.pipeline import StepTime
from tidegate.sim.scenario import TRACES, Arrivals, Lengths, Scenario, ScenarioError, StreamSpec
from tidegate.sim.traces import Row, Trace
from tidegate.sim.workload import Length, Stream, Times

STEP_TIMES: Final = {fit.name: fit for fit in (LLAMA3_8B_A100, LLAMA2_70B_H100_TP8)}
"""The fits that ship, by name."""
SHIPPED: Final[dict[str, Callable[[], tuple[Length, ...]]]] = {
    "chat": workload.chat_lengths,
    "code": workload.code_lengths,
    "summaries": workload.summary_lengths,
}
"""Lengths that ship (`scenario.TRACES`)."""
_DEFAULT_NAMESPACE: Final = "default"


def setting(scenario: Scenario) -> Setting:
    """Make the setting of a scenario.

    Raises:
        ScenarioError: A name that is not there, a file that cannot be used, a request that fits in
            no engine; the message names the field and the fix.
    """
    warm_up_s = scenario.warm_up.total_seconds()
    if warm_up_s >= scenario.seconds:
        raise ScenarioError(
            f"warmUp of {warm_up_s:g} s leaves nothing to measure in {scenario.seconds:g} s: make it"
            " shorter, or seconds longer"
        )
    found = classes(scenario)
    fleet = replicas(scenario)
    streams = [s for index, spec in enumerate(scenario.streams) for s in _streams(scenario, index, spec)]
    _unique(streams)
    _fit(scenario, streams)
    return Setting(
        classes=found,
        replicas=[] if scenario.plan else fleet,
        streams=streams,
        seconds=scenario.seconds,
        warm_up_s=warm_up_s,
        config=scenario.engine.config(),
        step_time=step_time(scenario.step_time),
        scrape_age_s=scenario.scrape_age.total_seconds(),
        faults=_faults(scenario, fleet),
        models=[group_model(scenario, i) for i in range(len(scenario.replicas))] if scenario.plan else (),
    )


def classes(scenario: Scenario) -> dict[str, QoSClass]:
    """The classes as decisions see them, by name."""
    return {
        name: qos_class(ApiClass(metadata=ObjectMeta(name=name), spec=spec))
        for name, spec in scenario.classes.items()
    }


def step_time(name: str) -> StepTime:
    """A step time by the name of a shipped fit, or by the path of a profile. Raises ScenarioError."""
    if name in STEP_TIMES:
        return STEP_TIMES[name].seconds
    if not name.endswith(".json"):
        shipped = ", ".join(sorted(STEP_TIMES))
        raise ScenarioError(f"stepTime {name!r} is not known; there is {shipped}, or a profile's .json")
    try:
        return StepFit.from_json(json.loads(Path(name).read_text())).seconds
    except OSError as error:
        raise ScenarioError(f"stepTime: {name}: {error.strerror}") from error
    except ValueError as error:  # not JSON, or no profile
        raise ScenarioError(f"stepTime: {name}: {error}") from error


# ── replicas ────────────────────────────────────────────────────────────────────────────────────


def highest(scenario: Scenario) -> str:
    """The class with the highest priority; of several the first by name."""
    return min(scenario.classes, key=lambda name: (-scenario.classes[name].priority, name))


def only_model(scenario: Scenario) -> str | None:
    """The one model that replicas and streams name; "model" where they name none, None if several."""
    named = {g.model for g in scenario.replicas if g.model} | {s.model for s in scenario.streams if s.model}
    if len(named) > 1 or (not named and any(s.csv for s in scenario.streams)):
        return None
    return next(iter(named), "model")


def key(model: str) -> ModelKey:
    """`namespace/name`, or `name` in the default namespace."""
    namespace, _, name = model.rpartition("/")
    return (namespace or _DEFAULT_NAMESPACE, name)


def shown(model: ModelKey) -> str:
    """As it is written in a scenario."""
    return model[1] if model[0] == _DEFAULT_NAMESPACE else "/".join(model)


def group_model(scenario: Scenario, index: int) -> ModelKey:
    """The model that a group of replicas serves. Raises ScenarioError."""
    model = scenario.replicas[index].model or only_model(scenario)
    if model is None:
        raise ScenarioError(f"replicas[{index}].model is required: the scenario has more than one model")
    return key(model)


def replicas(scenario: Scenario) -> list[Replica]:
    """Every replica, named MODEL-LANE-0, MODEL-LANE-1, … Raises ScenarioError."""
    result: list[Replica] = []
    counts: dict[str, int] = {}
    for index, group in enumerate(scenario.replicas):
        model, lane = group_model(scenario, index), group.lane or highest(scenario)
        if lane not in scenario.classes:
            raise unknown(f"replicas[{index}].lane", lane, scenario.classes, "classes")
        stem = f"{shown(model)}-{lane}"
        config = group.engine.config() if group.engine else None
        for _ in range(group.count):
            number = counts.get(stem, 0)
            counts[stem] = number + 1
            result.append(Replica(f"{stem}-{number}", model, lane, group.speed, config))
    return result


def _faults(scenario: Scenario, fleet: Iterable[Replica]) -> list[Fault]:
    names = [r.address for r in fleet]
    result = []
    for index, fault in enumerate(scenario.faults):
        if fault.replica not in names:
            raise unknown(f"faults[{index}].replica", fault.replica, names, "replicas")
        result.append(
            Fault(
                kind=fault.kind,
                address=fault.replica,
                start_s=fault.start.total_seconds(),
                end_s=fault.end.total_seconds(),
                factor=fault.factor or 1.0,
            )
        )
    return result


# ── streams ─────────────────────────────────────────────────────────────────────────────────────


def _streams(scenario: Scenario, index: int, spec: StreamSpec) -> Iterator[Stream]:
    """The streams of one entry: one, or one for each class, tenant and model of its CSV."""
    field = f"streams[{index}]"
    trace = _read(f"{field}.csv", spec.csv) if spec.csv else None
    parts = _parts(scenario, field, spec, trace)
    if spec.outstanding and len(parts) > 1:
        raise ScenarioError(
            f"{field}.outstanding counts requests of one class, tenant and model: set all three, since"
            f" {spec.csv} holds {len(parts)} combinations"
        )
    for (name, tenant, model), rows in parts.items():
        if name not in scenario.classes:
            raise unknown(f"{field}.class", name, scenario.classes, "classes")
        serving = {shown(group_model(scenario, i)) for i in range(len(scenario.replicas))}
        if shown(key(model)) not in serving:
            raise unknown(f"{field}.model", model, serving, "the models of replicas")
        own = (name, tenant, model) if len(parts) > 1 else ()
        paired = trace is not None and spec.lengths is None
        yield Stream(
            name="/".join((spec.name, *own)),
            model=key(model),
            qos_class=name,
            lengths=[row.length for row in rows] if paired else _lengths(field, spec.lengths),
            times=_times(field, spec.arrivals, trace, rows) if spec.outstanding is None else None,
            outstanding=spec.outstanding or 0,
            expected_output=spec.expected_output,
            streamed=spec.streamed,
            tenant=tenant,
            # Recorded lengths stay with their times; anything else is dealt anew for every seed.
            shuffled=not (paired and _as_recorded(spec)),
        )


def _as_recorded(spec: StreamSpec) -> bool:
    return spec.outstanding is None and (spec.arrivals is None or spec.arrivals.trace is not None)


Part = tuple[str, str, str]
"""Class, tenant and model of some requests."""


def _parts(scenario: Scenario, field: str, spec: StreamSpec, trace: Trace | None) -> dict[Part, list[Row]]:
    """Who the requests are of: from the entry, and from the trace's columns where that is silent."""

    def given(name: str, value: str | None, default: str | None) -> str | None:
        if value is not None or (trace is not None and name in trace.columns):
            return value
        if default is None:
            where = f", or a column {name} in {spec.csv}" if trace is not None else ""
            raise ScenarioError(f"{field}.{name} is required{where}")
        return default

    name = given("class", spec.qos_class, None)
    tenant = given("tenant", spec.tenant, "")
    model = given("model", spec.model, only_model(scenario))
    if trace is None:
        return {(name or "", tenant or "", model or ""): []}
    parts: dict[Part, list[Row]] = {}
    for number, row in enumerate(trace.rows, 1):
        part = (
            row.qos_class if name is None else name,
            row.tenant if tenant is None else tenant,
            row.model if model is None else model,
        )
        if not part[0] or not part[2]:
            raise ScenarioError(f"{field}.csv: {trace.path}: row {number} has no class or no model")
        parts.setdefault(part, []).append(row)
    return dict(sorted(parts.items()))


def _times(field: str, arrivals: Arrivals | None, trace: Trace | None, rows: list[Row]) -> Times:
    """When the requests of a part come; a rate is that of the whole entry, shared by rows."""
    share = len(rows) / len(trace.rows) if trace is not None else 1.0
    if arrivals is not None and arrivals.poisson:
        return workload.poisson(arrivals.poisson.per_second * share)
    if arrivals is not None and arrivals.gamma:
        return workload.gamma(arrivals.gamma.per_second * share, arrivals.gamma.cv)
    if arrivals is not None and arrivals.phases:
        return workload.rates([(p.per_second * share, p.seconds) for p in arrivals.phases])
    if trace is None:
        per_second = arrivals.trace.per_second if arrivals is not None and arrivals.trace else 1.0
        return workload.replay(workload.chat_arrivals(), per_second)
    try:
        period_s = trace.period_s
    except ScenarioError as error:
        raise ScenarioError(f"{field}.csv: {error}") from error
    stretch = 1.0
    if arrivals is not None and arrivals.trace:
        stretch = len(trace.rows) / period_s / arrivals.trace.per_second
    first = trace.rows[0].time_s or 0.0
    return traces.recorded([(row.time_s or 0.0) - first for row in rows], period_s, stretch)


def _lengths(field: str, spec: Lengths | None) -> list[Length]:
    """Prompts and outputs of a shipped trace or a file, scaled where other means are given."""
    if spec is None:
        raise ScenarioError(f"{field}.lengths is required")
    if spec.trace in SHIPPED:
        found = SHIPPED[spec.trace]()
    else:
        path = Path(spec.trace)
        if not path.exists():
            raise ScenarioError(
                f"{field}.lengths: {path} is not there; it is {', '.join(TRACES)} or the path of a CSV"
            )
        found = _read(f"{field}.lengths", path).lengths
    prompt = _factor(spec.mean_prompt, [x.prompt for x in found])
    output = _factor(spec.mean_output, [x.output for x in found])
    return [Length(max(1, round(x.prompt * prompt)), max(1, round(x.output * output))) for x in found]


def _factor(mean: float | None, values: list[int]) -> float:
    return mean * len(values) / sum(values) if mean is not None else 1.0


def _read(field: str, path: Path) -> Trace:
    try:
        return traces.read(path)
    except ScenarioError as error:
        raise ScenarioError(f"{field}: {error}") from error


# ── checks ──────────────────────────────────────────────────────────────────────────────────────


def _unique(streams: Iterable[Stream]) -> None:
    seen: set[str] = set()
    for stream in streams:
        if stream.name in seen:
            raise ScenarioError(f"streams: the name {stream.name} is there twice; its name tells a stream")
        seen.add(stream.name)


def _fit(scenario: Scenario, streams: Iterable[Stream]) -> None:
    """Refuse requests that some engine of their model could never hold."""
    smallest: dict[ModelKey, int] = {}
    default = scenario.engine.config()
    for index, group in enumerate(scenario.replicas):
        model, held = (
            group_model(scenario, index),
            (group.engine.config() if group.engine else default).kv_tokens,
        )
        smallest[model] = min(held, smallest.get(model, held))
    for stream in streams:
        longest = max(x.prompt + x.output - 1 for x in stream.lengths)
        if longest > smallest[stream.model]:
            raise ScenarioError(
                f"stream {stream.name}: its longest request holds {longest} tokens, and an engine of"
                f" {shown(stream.model)} only {smallest[stream.model]}: raise num-gpu-blocks to at least"
                f" {-(-longest // default.block_size) + 1}, or use shorter lengths"
            )


def unknown(field: str, name: str, known: Iterable[str], where: str) -> ScenarioError:
    """A name that is not there, with the nearest that is."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there: {', '.join(names[:12])}"
    return ScenarioError(f"{field} {name!r} is not in {where}; {hint}")
