"""What a cluster is asked to be."""

import json
from pathlib import Path

import pytest

from tidegate.local.layout import CONTROL_PLANE, NODES, Settings, set_aside


def test_settings_survive_the_file() -> None:
    settings = Settings(
        nodes=2,
        gpus_per_node=8,
        parts=NODES,
        ports={"gateway": 8080},
        engine_env={"A": "1"},
        images={"x": "y"},
        extra_args={"picker": ("--policy", "fifo")},
    )
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param({"nodes": 0}, "nodes is 0", id="no nodes"),
        pytest.param({"nodes": 65}, "nodes is 65", id="too many nodes"),
        pytest.param({"gpus_per_node": 17}, "GPUs per node is 17", id="too many GPUs"),
        pytest.param({"parts": frozenset({"etcd"})}, "parts lacks kube-apiserver", id="no API server"),
        pytest.param(
            {"parts": CONTROL_PLANE | {"gateway"}}, "no component is named 'gateway'", id="unknown part"
        ),
        pytest.param({"extra_args": {"nope": ()}}, "no component is named 'nope'", id="arguments for nobody"),
    ],
)
def test_bad_settings_say_what_is_wrong(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**values)  # type: ignore[arg-type]


def test_difference_names_the_settings() -> None:
    assert Settings().difference(Settings()) == []
    other = Settings(nodes=2, extra_args={"picker": ("--policy", "fifo")})
    assert Settings().difference(other) == ["extra_args", "nodes"]


def test_a_file_read_back_is_no_difference() -> None:
    settings = Settings(extra_args={"picker": ("--policy", "fifo")})
    assert settings.difference(Settings.from_json(json.loads(json.dumps(settings.to_json())))) == []


def test_a_large_log_is_set_aside_and_one_such_is_kept(tmp_path: Path) -> None:
    log, old = tmp_path / "etcd.log", tmp_path / "etcd.log.old"
    set_aside(log, 4)
    assert not old.exists()
    for text, kept in (("1234", None), ("first", "first"), ("second", "second"), ("4", "second")):
        log.write_text(text)
        set_aside(log, 4)
        assert (old.read_text() if old.exists() else None) == kept
        assert log.exists() is (len(text) <= 4)
