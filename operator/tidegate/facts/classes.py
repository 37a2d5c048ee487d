"""QoSClass objects as decisions see them."""

from collections.abc import Iterable
from dataclasses import replace

from tidegate.api import qosclass as api
from tidegate.core.types import Objectives, QoSClass, Reclaim, TenantFrom, Tenants


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


def overridden(base: Objectives, by: api.ObjectiveOverrides | None) -> Objectives:
    """Objectives of a class with those of one model laid over them."""
    if by is None:
        return base
    found = {
        "ttft_s": by.time_to_first_token,
        "per_thousand_prompt_tokens_s": by.per_thousand_prompt_tokens,
        "tpot_s": by.time_per_output_token,
        "completion_s": by.completion,
        "window_s": by.window,
    }
    own = {name: value.total_seconds() for name, value in found.items() if value is not None}
    if by.attainment_percent is not None:
        own["attainment"] = by.attainment_percent / 100
    return replace(base, **own)


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
        tenants=Tenants(
            TenantFrom(spec.tenant.from_),
            # Envoy gives header names in small letters.
            (spec.tenant.header or "").lower(),
            dict(spec.tenant.weights),
        ),
        minimum_share=spec.minimum_share_percent / 100,
    )


def default_class(classes: Iterable[api.QoSClass]) -> str | None:
    """Name of the default class. Of several that claim it the newest, as with StorageClasses."""
    claimants = [c for c in classes if c.claims_default and not c.metadata.deletion_timestamp]
    newest = max(claimants, key=lambda c: (_created(c), c.metadata.name), default=None)
    return newest.metadata.name if newest else None


def _created(obj: api.QoSClass) -> float:
    stamp = obj.metadata.creation_timestamp
    return stamp.timestamp() if stamp else 0.0
