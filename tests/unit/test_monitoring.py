"""Dashboard and alerts name metrics that exist, with labels that they have, and Helm leaves them whole."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tidegate.cli.reference import metrics_page
from tidegate.render import manifests, monitoring

CHART = Path(__file__).parents[2] / "charts/tidegate"
_ROW = re.compile(r"^\| `(tidegate_\w+)` \| (\w+) \| (.*?) \|", re.MULTILINE)


def catalogue() -> dict[str, set[str]]:
    """Names of samples, with their labels."""
    found: dict[str, set[str]] = {}
    for name, kind, labels in _ROW.findall(metrics_page()):
        known = set(re.findall(r"`(\w+)`", labels))
        found[name] = known
        if kind == "histogram":
            found |= {f"{name}_bucket": known | {"le"}, f"{name}_count": known, f"{name}_sum": known}
    return found


CATALOGUE = catalogue()
DASHBOARD = json.loads((CHART / "dashboards/request-path.json").read_text())
EXPRESSIONS = {
    **{a["alert"]: a["expr"] for a in monitoring.alerts()},
    **{f"{p['title']} {t['refId']}": t["expr"] for p in DASHBOARD["panels"] for t in p["targets"]},
    **{v["name"]: v["query"]["query"] for v in DASHBOARD["templating"]["list"][1:]},
}


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_every_metric_exists_and_has_its_labels(expression: str) -> None:
    used = re.findall(r"(tidegate_\w+)(?:\{(.*?)\})?", expression)
    assert used
    for name, matchers in used:
        assert name in CATALOGUE
        assert set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", matchers)) <= CATALOGUE[name]
    every = set.union(*(CATALOGUE[name] for name, _ in used))
    for labels in re.findall(r"by \((.*?)\)", expression):
        assert set(labels.split(", ")) <= every


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_brackets_close(expression: str) -> None:
    pairs, open_ = {")": "(", "}": "{", "]": "["}, []
    for sign in re.sub(r'"[^"]*"', "", expression):
        if sign in pairs.values():
            open_.append(sign)
        elif sign in pairs:
            assert open_.pop() == pairs[sign]
    assert not open_


def test_an_unknown_metric_would_be_seen() -> None:
    assert "tidegate_ttft_seconds_bucket" in CATALOGUE
    assert "tidegate_ttft_seconds_total" not in CATALOGUE


def test_panels_do_not_overlap_and_have_names_of_their_own() -> None:
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in DASHBOARD["panels"]]
    titles = [p["title"] for p in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len(set(titles)) == len(titles)


def helm(text: str, values: dict[str, bool]) -> list[Any]:
    """What Helm makes of the few actions that the template has."""
    for name, on in values.items():
        text = re.sub(
            r"\{\{- if \.Values\.monitoring\." + name + r" \}\}(.*?)\{\{- end \}\}",
            r"\1" if on else "",
            text,
            flags=re.DOTALL,
        )
    lines = (CHART / "dashboards/request-path.json").read_text().splitlines()
    indented = "\n".join(f"    {line}" for line in lines)
    text = text.replace('{{ .Files.Get "dashboards/request-path.json" | indent 4 }}', indented)
    text = text.replace("{{ .Release.Namespace }}", "here")
    text = text.replace('{{ "{{" }}', "\x00").replace('{{ "}}" }}', "\x01")
    assert "{{" not in text.replace(indented, "")
    return [x for x in yaml.safe_load_all(text.replace("\x00", "{{").replace("\x01", "}}")) if x]


def test_both_are_off_until_asked_for() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())["monitoring"]
    assert values == {"alerts": False, "dashboard": False}
    assert helm((CHART / "templates/monitoring.yaml").read_text(), values) == []


def test_the_template_holds_what_was_rendered() -> None:
    text = (CHART / "templates/monitoring.yaml").read_text()
    assert text == manifests.files()["charts/tidegate/templates/monitoring.yaml"]
    rule, config = helm(text, {"alerts": True, "dashboard": True})
    assert rule["spec"] == monitoring.rule()["spec"]
    assert rule["metadata"]["namespace"] == config["metadata"]["namespace"] == "here"
    assert json.loads(config["data"]["request-path.json"]) == DASHBOARD
