"""A profile as text for people, as JSON, and as the ConfigMap that `profileRef` names. Pure."""

import json
import re
from typing import Any, Final

from tidegate.api.names import FIELD_MANAGER, LABEL_MANAGED_BY, bounded
from tidegate.core.steptime import Branch, StepFit
from tidegate.profile.run import Profile
from tidegate.render.manifests import to_yaml

CONFIGMAP_KEY: Final = "step-time.json"
"""The key of a ConfigMap under which the fit stands."""


def as_json(found: Profile) -> dict[str, Any]:
    """Everything: the fit as `StepFit.from_json` reads it, and how it came about."""
    return {
        "fit": found.fitted.fit.to_json(),
        "request_s": found.fitted.request_s,
        "round_trip_s": found.round_trip_s,
        "took_s": round(found.took_s, 1),
        "rounds": round(found.rounds, 2),
        "left_out": found.left_out,
        "spread": round(found.spread, 4),
        "notes": found.notes,
        "samples": [
            {
                "steps": [s._asdict() for s in sample.steps],
                "seconds": sample.seconds,
                "requests": sample.requests,
                "error": error,
            }
            for sample, error in zip(found.samples, found.fitted.errors, strict=True)
        ],
    }


def as_configmap(found: Profile) -> str:
    """The manifest, as YAML; its name comes from the model's."""
    text = json.dumps(found.fitted.fit.to_json(), indent=2, ensure_ascii=False) + "\n"
    return to_yaml(
        [
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {
                    "name": configmap_name(found.model),
                    "labels": {LABEL_MANAGED_BY: FIELD_MANAGER},
                },
                "data": {CONFIGMAP_KEY: text},
            }
        ]
    )


def configmap_name(model: str) -> str:
    """A name that Kubernetes takes: org/Llama-3.1_8B gives step-time-org-llama-3.1-8b."""
    slug = re.sub(r"[^a-z0-9.]+", "-", model.lower())
    slug = re.sub(r"[-.]*\.[-.]*", ".", slug).strip("-.")
    return bounded(f"step-time-{slug}" if slug else "step-time")


def as_text(found: Profile) -> str:
    """Coefficients, residuals, and what could not be told."""
    fit = found.fitted.fit
    effort = f"{len(found.samples)} samples in {found.took_s:.0f} s, {found.rounds:.1f} rounds"
    lines = [
        f"Step time of {fit.name}: {effort}",
        "",
        *_table(fit),
        "",
        f"samples hold up to {fit.trained_up_to} tokens a step; beyond that it is a guess",
    ]
    if fit.residual:
        median, p90 = fit.residual.median, fit.residual.p90
        lines.append(f"residuals: median {median:.1%}, 90th percentile {p90:.1%} of the time")
    if found.left_out:
        lines.append(
            f"repeats: the slowest took {found.spread:.0%} longer than the fastest (median of the"
            f" experiments); the slower half, {found.left_out} samples, was left out"
        )
    lines.append(
        f"outside of steps: {1000 * found.fitted.request_s:.1f} ms a request, after a round trip of"
        f" {1000 * found.round_trip_s:.1f} ms"
    )
    lines += [f"not identified: {term}" for term in _untold(fit)] or ["every term is identified"]
    lines += [f"note: {note}" for note in found.notes]
    return "\n".join(lines)


def _untold(fit: StepFit) -> list[str]:
    """The terms that are no findings; of one line each is told once."""
    if fit.low != fit.high:
        return list(fit.unidentified)
    return list(dict.fromkeys(term.partition(".")[2] for term in fit.unidentified))


_ROWS: Final = (
    ("base", 1e3, "ms"),
    ("prefill token", 1e6, "µs"),
    ("decode", 1e6, "µs"),
    ("decode context token", 1e9, "ns"),
    ("prefill context token", 1e9, "ns"),
)


def _table(fit: StepFit) -> list[str]:
    lines = [fit.low] if fit.low == fit.high else [fit.low, fit.high]
    head = ["", *([f"up to {fit.knee} tokens", "above"] if len(lines) == 2 else ["any step"])]
    rows = [head]
    for at, (name, scale, unit) in enumerate(_ROWS):
        rows.append([name, *(f"{scale * _totals(line)[at]:.2f} {unit}" for line in lines)])
    if fit.per_prefill_pair_s:
        rows.append(["pair of attention", *[f"{1e9 * fit.per_prefill_pair_s:.2f} ns"] * len(lines)])
    return [f"{row[0]:<22}" + "".join(f"{cell:>20}" for cell in row[1:]) for row in rows]


def _totals(line: Branch) -> tuple[float, ...]:
    return (
        line.base_s,
        line.per_token_s + line.per_prefill_s,
        line.per_token_s + line.per_decode_s,
        line.per_decode_context_s,
        line.per_prefill_context_s,
    )
