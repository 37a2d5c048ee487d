"""The Grafana dashboard of the request path, and the Prometheus alerts on what was promised."""

import json
from typing import Any, Final

Object = dict[str, Any]

_BY: Final = "namespace, model, qos_class"
_PICKED: Final = 'namespace=~"$namespace", model=~"$model", qos_class=~"$qos_class"'
_LEGEND: Final = "{{model}} {{qos_class}}"

# ── alerts ──────────────────────────────────────────────────────────────────────────────────────

_LEAST_JUDGED: Final = 100
"""Requests below which a share says little."""


def _missed(window: str) -> str:
    """The share of promises missed over a time."""

    def rate(outcome: str) -> str:
        return f"sum by ({_BY}) (rate(tidegate_promises_total{{outcome{outcome}}}[{window}]))"

    missed, judged = rate('="missed"'), rate('=~"kept|missed"')
    return f"{missed} / {judged}"


def _burns(times: float, long: str, short: str) -> str:
    """Whether the budget of misses is spent so many times as fast as it lasts, over both times."""
    budget = f"{times} * (1 - max by ({_BY}) (tidegate_attainment_objective_ratio))"
    return f"({_missed(long)}) > ({budget}) and ({_missed(short)}) > ({budget})"


def alerts() -> list[Object]:
    """The alerts, as rules of Prometheus."""
    kept = f"sum by ({_BY}) (tidegate_attainment_kept_requests)"
    judged = f"sum by ({_BY}) (tidegate_attainment_judged_requests)"
    aim = f"max by ({_BY}) (tidegate_attainment_objective_ratio)"
    whose = "{{ $labels.namespace }}/{{ $labels.model }}, class {{ $labels.qos_class }}"
    return [
        _alert(
            "TidegateAttainmentLow",
            f"({kept} / {judged}) < {aim} and {judged} > {_LEAST_JUDGED}",
            "10m",
            "warning",
            f"{whose}: fewer requests met their objectives than attainmentPercent promises",
            "Over the class's window {{ $value | humanizePercentage }} met all objectives.",
        ),
        _alert(
            "TidegateAttainmentFallsFast",
            _burns(14.4, "1h", "5m"),
            "2m",
            "critical",
            f"{whose}: promises are missed so fast that a month's allowance is gone in two days",
            "In the last hour {{ $value | humanizePercentage }} of requests missed an objective.",
        ),
        _alert(
            "TidegateAttainmentFalls",
            _burns(6, "6h", "30m"),
            "15m",
            "warning",
            f"{whose}: promises are missed so fast that a month's allowance is gone in five days",
            "In the last six hours {{ $value | humanizePercentage }} of requests missed an objective.",
        ),
        _alert(
            "TidegateRefuses",
            f'sum by ({_BY}) (rate(tidegate_requests_total{{outcome="refused", model!=""}}[5m]))'
            f' / sum by ({_BY}) (rate(tidegate_requests_total{{model!=""}}[5m])) > 0.05',
            "10m",
            "warning",
            f"{whose}: requests are refused",
            "{{ $value | humanizePercentage }} of requests are refused: the queue is full or too slow.",
        ),
        _alert(
            "TidegateUnmeasured",
            'sum(rate(tidegate_measurements_total{outcome!="measured"}[15m]))'
            " / sum(rate(tidegate_measurements_total[15m])) > 0.1",
            "15m",
            "warning",
            "answers are not measured",
            "For {{ $value | humanizePercentage }} of requests no usable log entry of Envoy came: "
            "attainment, TTFT and tokens are estimates or missing.",
        ),
        _alert(
            "TidegateEnginesSilent",
            'sum(rate(tidegate_engine_reports_total{outcome="failed"}[5m]))'
            " / sum(rate(tidegate_engine_reports_total[5m])) > 0.2",
            "10m",
            "warning",
            "engines do not report",
            "{{ $value | humanizePercentage }} of scrapes fail: some of the engines' slots are left alone.",
        ),
    ]


def _alert(name: str, expression: str, lasts: str, severity: str, summary: str, description: str) -> Object:
    return {
        "alert": name,
        "expr": expression,
        "for": lasts,
        "labels": {"severity": severity},
        "annotations": {"summary": summary, "description": description},
    }


def rule() -> Object:
    """The PrometheusRule; its namespace is the release's."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "tidegate", "labels": {"app.kubernetes.io/part-of": "tidegate"}},
        "spec": {"groups": [{"name": "tidegate.request-path", "rules": alerts()}]},
    }


# ── dashboard ───────────────────────────────────────────────────────────────────────────────────


def _rate(metric: str, by: str = _BY) -> str:
    return f"sum by ({by}) (rate({metric}{{{_PICKED}}}[$__rate_interval]))"


def _quantile(share: float, metric: str) -> str:
    return f"histogram_quantile({share}, {_rate(f'{metric}_bucket', by=f'le, {_BY}')})"


def _sum(metric: str) -> str:
    return f"sum by ({_BY}) ({metric}{{{_PICKED}}})"


def _panels() -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Title, unit, and expressions with their legends."""

    def times(metric: str) -> list[tuple[str, str]]:
        return [(_quantile(q, metric), f"{_LEGEND} {name}") for q, name in ((0.5, "p50"), (0.99, "p99"))]

    attained = f"{_sum('tidegate_attainment_kept_requests')} / {_sum('tidegate_attainment_judged_requests')}"
    aim = f"max by ({_BY}) (tidegate_attainment_objective_ratio{{{_PICKED}}})"
    tenants = f"sum by (tenant) (rate(tidegate_tenant_gpu_seconds_total{{{_PICKED}}}[$__rate_interval]))"
    logged = "sum by (outcome) (rate(tidegate_measurements_total[$__rate_interval]))"

    def rates(metric: str, label: str = "") -> list[tuple[str, str]]:
        if not label:
            return [(_rate(metric), _LEGEND)]
        return [(_rate(metric, by=f"{_BY}, {label}"), f"{_LEGEND} {{{{{label}}}}}")]

    return [
        ("Attainment", "percentunit", [(attained, _LEGEND), (aim, f"{_LEGEND} objective")]),
        ("Promises", "reqps", rates("tidegate_promises_total", "outcome")),
        ("Time to first token", "s", times("tidegate_ttft_seconds")),
        ("Time per output token", "s", times("tidegate_tpot_seconds")),
        ("Completion", "s", times("tidegate_completion_seconds")),
        ("Wait in the queue", "s", times("tidegate_queue_seconds")),
        ("Requests in the queue", "short", [(_sum("tidegate_queue_requests"), _LEGEND)]),
        ("Requests in flight", "short", [(_sum("tidegate_inflight_requests"), _LEGEND)]),
        ("Requests", "reqps", rates("tidegate_requests_total", "outcome")),
        ("Relegated", "reqps", rates("tidegate_relegated_total")),
        ("Tokens", "short", rates("tidegate_served_tokens_total", "kind")),
        ("GPU time by class", "short", rates("tidegate_served_gpu_seconds_total")),
        ("GPU time by tenant, the ten heaviest", "short", [(f"topk(10, {tenants})", "{{tenant}}")]),
        ("Measured, estimated, not usable", "reqps", [(logged, "{{outcome}}")]),
    ]


def dashboard() -> Object:
    """Grafana's dashboard. What is chosen on top narrows every panel."""
    panels = [
        {
            "id": index + 1,
            "type": "timeseries",
            "title": title,
            "datasource": _SOURCE,
            "gridPos": {"h": 8, "w": 12, "x": 12 * (index % 2), "y": 8 * (index // 2)},
            "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
            "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
            "targets": [
                {
                    "refId": chr(ord("A") + n),
                    "datasource": _SOURCE,
                    "expr": expression,
                    "legendFormat": legend,
                }
                for n, (expression, legend) in enumerate(targets)
            ],
        }
        for index, (title, unit, targets) in enumerate(_panels())
    ]
    return {
        "uid": "tidegate-request-path",
        "title": "Tidegate: request path",
        "tags": ["tidegate"],
        "schemaVersion": 39,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": [_SOURCE_VARIABLE, *map(_variable, ("namespace", "model", "qos_class"))]},
        "panels": panels,
    }


_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_SOURCE_VARIABLE: Final = {"name": "datasource", "type": "datasource", "query": "prometheus"}


def _variable(name: str) -> Object:
    return {
        "name": name,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": f"label_values(tidegate_arrivals_total, {name})", "refId": name},
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
    }


def dashboard_json() -> str:
    """The dashboard's file."""
    return json.dumps(dashboard(), indent=2) + "\n"
