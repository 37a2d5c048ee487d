"""What is installed into a cluster, and the committed files made from it."""

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tidegate.api.chart import Gateway, Values, values_schema
from tidegate.cli.manifests import app
from tidegate.picker.server import Options as PickerOptions
from tidegate.render import manifests
from tidegate.render.rbac import PARTS, edit_rules, view_rules

ROOT = Path(__file__).parents[2]
RULES = {**{p: r() for p, r in PARTS.items()}, "view": view_rules(), "edit": edit_rules()}


@pytest.mark.parametrize("path", sorted(manifests.files()))
def test_committed_files_are_as_generated(path):
    assert (ROOT / path).read_text() == manifests.files()[path], "run `tidegate manifests write`"


@pytest.mark.parametrize("part", RULES)
def test_roles_have_no_wildcards(part):
    for rule in RULES[part]:
        assert not [v for values in rule.values() for v in values if "*" in v]


FORBIDDEN = {
    "controller deletes no pods": ("controller", "", "pods", {"create", "delete", "update"}),
    "controller writes no user's spec": (
        "controller",
        "tidegate.dev",
        "modeldeployments",
        {"create", "delete"},
    ),
    "nobody reads secrets": ("controller", "", "secrets", {"get", "list", "watch"}),
    "extender deletes no pods": ("extender", "", "pods", {"create", "delete", "update"}),
    "picker changes no pods": ("picker", "", "pods", {"create", "delete", "patch", "update"}),
    "picker changes no models": ("picker", "tidegate.dev", "modeldeployments", {"patch", "update", "delete"}),
}


@pytest.mark.parametrize(("part", "group", "resource", "verbs"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_parts_cannot_do_what_they_need_not(part, group, resource, verbs):
    granted = {
        v for r in RULES[part] if group in r["apiGroups"] and resource in r["resources"] for v in r["verbs"]
    }
    assert not granted & verbs


def test_objects_are_in_the_order_to_apply_them():
    kinds = [o["kind"] for o in manifests.install_objects("here")]
    order = ["CustomResourceDefinition", "Namespace", "ServiceAccount", "ValidatingAdmissionPolicy"]
    assert [kinds.index(k) for k in order] == sorted(kinds.index(k) for k in order)
    assert kinds.count("CustomResourceDefinition") == 3


def test_the_namespace_is_the_one_asked_for():
    for obj in manifests.install_objects("here"):
        if obj["kind"] == "ServiceAccount":
            assert obj["metadata"]["namespace"] == "here"
        for subject in obj.get("subjects", []):
            assert subject["namespace"] == "here"


def test_no_object_is_listed_twice():
    keys = [(o["kind"], o["metadata"]["name"]) for o in manifests.install_objects()]
    assert len(keys) == len(set(keys))


def test_chart_takes_the_release_namespace_and_nothing_else():
    text = manifests.files()["charts/tidegate/templates/rbac.yaml"]
    assert "tidegate-system" not in text
    assert {line.split(": ", 1)[1] for line in text.splitlines() if "{{" in line} == {
        "'{{ .Release.Namespace }}'"
    }
    assert "{{" not in manifests.files()["charts/tidegate/templates/admission.yaml"]


def test_the_chart_s_values_are_its_defaults() -> None:
    raw = yaml.safe_load((ROOT / "charts/tidegate/values.yaml").read_text())
    assert Values.model_validate(raw) == Values()
    assert set(raw["gateway"]) == {f.alias for f in Gateway.model_fields.values()}


GATEWAY = (ROOT / "charts/tidegate/templates/gateway.yaml").read_text()


def test_both_of_the_chart_s_writers_of_envoy_s_configuration_let_it_measure() -> None:
    lists = re.findall(r"args:\n +- gateway\n(?: +(?:- --|\{\{).*\n)+", GATEWAY)
    assert len(lists) == 2
    for args in lists:
        [port] = re.findall(r"\{\{- if \$g\.measurePort \}\}\n(.*)\n +\{\{- end \}\}", args)
        assert port.strip() == "- --measure-port={{ $g.measurePort }}"
    assert Gateway().measure_port == PickerOptions().measure_port


def test_the_chart_refuses_headers_that_whoever_reaches_the_gateway_may_write() -> None:
    [(condition, message)] = re.findall(r'\{\{- if (.*) \}\}\n\{\{- fail "(.*)" \}\}\n\{\{- end', GATEWAY)
    assert condition == "and .Values.identity.trustedHeaders (not $g.behindTrustedProxy)"
    for word in ("gateway.enabled", "identity.trustedHeaders", "gateway.behindTrustedProxy=true", "8080"):
        assert word in message
    assert not Gateway().behind_trusted_proxy


def test_the_values_schema_is_json_schema() -> None:
    schema = values_schema()
    assert set(schema["properties"]) == {"identity", "gateway", "monitoring", "global"}
    assert schema["additionalProperties"] is False
    assert "x-kubernetes" not in json.dumps(schema)


@pytest.mark.parametrize("command", ["crds", "rbac", "admission", "all"])
def test_printed_yaml_is_the_objects(command):
    result = CliRunner().invoke(app, [command])
    assert result.exit_code == 0
    made = {
        "crds": manifests.crds(),
        "rbac": manifests.rbac(),
        "admission": manifests.admission(),
        "all": manifests.install_objects(),
    }
    assert list(yaml.safe_load_all(result.output)) == made[command]


def test_namespace_option():
    result = CliRunner().invoke(app, ["all", "--namespace", "elsewhere"])
    assert "namespace: elsewhere" in result.output
    assert "tidegate-system" not in result.output


def test_write_and_check(tmp_path):
    (tmp_path / "pyproject.toml").touch()
    run = CliRunner()
    missing = run.invoke(app, ["write", "--check", "--root", str(tmp_path)])
    assert missing.exit_code == 1
    assert not (tmp_path / "crds").exists()

    assert (
        "wrote crds/qosclasses.tidegate.dev.yaml"
        in run.invoke(app, ["write", "--root", str(tmp_path)]).output
    )
    assert run.invoke(app, ["write", "--check", "--root", str(tmp_path)]).exit_code == 0

    drifted = tmp_path / "crds/gpupools.tidegate.dev.yaml"
    drifted.write_text(drifted.read_text().replace("gpool", "pool"))
    stale = run.invoke(app, ["write", "--check", "--root", str(tmp_path)])
    assert stale.exit_code == 1
    assert "generated/crds/gpupools.tidegate.dev.yaml" in stale.output
    assert [line.split()[-1] for line in stale.output.splitlines() if line.startswith("+ ")] == ["gpool"]
    assert "stale: crds/gpupools.tidegate.dev.yaml; run `tidegate manifests write`" in stale.output


def test_write_outside_a_checkout_says_so(tmp_path):
    result = CliRunner().invoke(app, ["write", "--root", str(tmp_path)])
    assert result.exit_code == 2
    assert "give --root" in result.output
    assert list(tmp_path.iterdir()) == []
