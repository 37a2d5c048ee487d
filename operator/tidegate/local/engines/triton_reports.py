"""What the emulated Triton says of itself: metadata, statistics, `/metrics`."""

from collections.abc import Iterable
from typing import Any

from tidegate.local.engines.promtext import family, labels
from tidegate.local.engines.triton_core import (
    DEFAULT_PRIORITY,
    EXTENSIONS,
    PRIORITY_LEVELS,
    SERVER_VERSION,
    VERSION,
    Model,
)

_INPUTS = (
    ("text_input", "BYTES"),
    ("stream", "BOOL"),
    ("sampling_parameters", "BYTES"),
    ("exclude_input_in_output", "BOOL"),
)


def server_metadata() -> dict[str, Any]:
    """`/v2`."""
    return {"name": "triton", "version": SERVER_VERSION, "extensions": list(EXTENSIONS)}


def model_metadata(model: Model) -> dict[str, Any]:
    """`/v2/models/M`."""
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": "",
        "inputs": [{"name": n, "datatype": t, "shape": [1]} for n, t in _INPUTS],
        "outputs": [{"name": "text_output", "datatype": "BYTES", "shape": [-1]}],
    }


def model_config(model: Model) -> dict[str, Any]:
    """`/v2/models/M/config`."""
    return {
        "name": model.name,
        "backend": "vllm",
        "max_batch_size": 0,
        "input": [
            {"name": n, "data_type": "TYPE_STRING" if t == "BYTES" else f"TYPE_{t}", "dims": [1]}
            for n, t in _INPUTS
        ],
        "output": [{"name": "text_output", "data_type": "TYPE_STRING", "dims": [-1]}],
        "dynamic_batching": {
            "priority_levels": PRIORITY_LEVELS,
            "default_priority_level": DEFAULT_PRIORITY,
        },
        "parameters": {"max_num_seqs": {"string_value": str(model.spec.engine.max_num_seqs)}},
    }


def repository_index(models: Iterable[Model], *, ready_only: bool) -> list[dict[str, str]]:
    """`/v2/repository/index`."""
    return [
        {
            "name": m.name,
            "version": VERSION,
            "state": "READY" if m.ready else "UNAVAILABLE",
            "reason": m.reason,
        }
        for m in models
        if m.ready or not ready_only
    ]


def statistics(models: Iterable[Model]) -> dict[str, Any]:
    """`/v2/models[/M]/stats`: counts, and durations in nanoseconds."""
    return {"model_stats": [_statistics(m) for m in models]}


def _statistics(model: Model) -> dict[str, Any]:
    tally = model.tally

    def duration(count: int, ns: int) -> dict[str, int]:
        return {"count": count, "ns": ns}

    nothing = duration(0, 0)
    return {
        "name": model.name,
        "version": VERSION,
        "last_inference": tally.last_ms,
        "inference_count": tally.inferences,
        "execution_count": tally.success,
        "inference_stats": {
            "success": duration(tally.success, tally.success_ns),
            "fail": duration(sum(tally.failed.values()), tally.failed_ns),
            "queue": duration(tally.success, tally.queue_ns),
            "compute_input": duration(tally.success, 0),
            "compute_infer": duration(tally.success, tally.infer_ns),
            "compute_output": duration(tally.success, 0),
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "batch_stats": [],
    }


def metrics(models: Iterable[Model]) -> str:
    """`/metrics` on the metrics port: Triton's names, durations in microseconds."""
    texts = [(labels({"model": m.name, "version": VERSION}), m) for m in models]
    lines: list[str] = []
    for name, help_, read in (
        ("request_success", "Number of successful inference requests, all batch sizes", lambda t: t.success),
        ("count", "Number of inferences performed", lambda t: t.inferences),
        ("exec_count", "Number of model executions performed", lambda t: t.success),
        ("request_duration_us", "Cumulative inference request duration", lambda t: t.success_ns // 1000),
        ("queue_duration_us", "Cumulative inference queuing duration", lambda t: t.queue_ns // 1000),
        ("compute_input_duration_us", "Cumulative compute input duration", lambda _: 0),
        ("compute_infer_duration_us", "Cumulative compute inference duration", lambda t: t.infer_ns // 1000),
        ("compute_output_duration_us", "Cumulative inference compute output duration", lambda _: 0),
    ):
        samples = [(text, read(m.tally)) for text, m in texts]
        lines += family(f"nv_inference_{name}", "counter", help_, samples)
    failures = [
        (f'{text},reason="{reason}"', count) for text, m in texts for reason, count in m.tally.failed.items()
    ]
    lines += family(
        "nv_inference_request_failure", "counter", "Number of failed inference requests", failures
    )
    pending = [(text, m.driver.engine.waiting) for text, m in texts]
    lines += family(
        "nv_inference_pending_request_count", "gauge", "Requests awaiting execution per-model", pending
    )
    for text, m in texts:
        lines += m.driver.stats.lag.render(
            "tidegate_emulator_lag_seconds", "How late emulated steps ended.", text
        )
    return "\n".join(lines) + "\n"
