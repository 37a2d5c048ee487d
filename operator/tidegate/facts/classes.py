"""QoSClass objects as decisions see them."""

from collections.abc import Iterable

from tidegate.api import qosclass as api
from tidegate.core.types import Objectives, QoSClass, Reclaim


def objectives(spec: api.Objectives) -> Objectives:
    """Objectives in seconds and shares; what is aimed at nothing stays None."""
    return Objectives(
        ttft_s=spec.time_to_first_token.total_seconds() if spec.time_to_first_token else None,
        per_thousand_prompt_tokens_s=(
            spec.per_thousand_prompt_tokens.total_seconds() if spec.per_thousand_prompt_tokens else 0.0
        ),
        tpot_s=spec.time_per_output_token.total_seconds() if spec.time_per_output_token else None,
        completion_s=spec.completion.total_seconds() if spec.completion else None,
        attainment=spec.attainment_percent / 100,
        window_s=spec.window.total_seconds(),
    )


def qos_class(obj: api.QoSClass) -> QoSClass:
    """A QoSClass object as a plain value."""
    spec = obj.spec
    return QoSClass(
        name=obj.metadata.name,
        priority=spec.priority,
        reclaim=Reclaim(spec.reclaim),
        min_runtime_s=spec.min_runtime.total_seconds(),
        objectives=objectives(spec.objectives),
        queue_max_requests=spec.queue.max_requests,
        queue_max_wait_s=spec.queue.max_wait.total_seconds(),
    )


def default_class(classes: Iterable[api.QoSClass]) -> str | None:
    """Name of the default class. Of several that claim it the newest, as with StorageClasses."""
    claimants = [c for c in classes if c.claims_default and not c.metadata.deletion_timestamp]
    newest = max(claimants, key=lambda c: (_created(c), c.metadata.name), default=None)
    return newest.metadata.name if newest else None


def _created(obj: api.QoSClass) -> float:
    stamp = obj.metadata.creation_timestamp
    return stamp.timestamp() if stamp else 0.0
