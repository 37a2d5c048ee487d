"""What Envoy is told to check of callers, and the files that it is read from."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tidegate.adapters.gatewayfiles import read_keys, read_secrets, write_files
from tidegate.api.common import InvalidObject
from tidegate.api.identity import parse
from tidegate.cli.main import app
from tidegate.render.envoy import bootstrap
from tidegate.render.envoy_auth import API_KEYS, JWT, GatewayAuth

JWKS = '{"keys": [{"kty": "RSA"}]}'
INLINE = {"name": "a", "issuer": "https://a", "audiences": ["tidegate"], "jwks": {"inline": JWKS}}
REMOTE = {
    "name": "b",
    "issuer": "https://b",
    "audiences": ["tidegate"],
    "jwks": {"uri": "https://login.example.com/keys?v=2", "cacheDuration": "1m"},
}
KEY = "tg-0123456789abcdef"


def auth(raw: dict[str, Any], **more: Any) -> GatewayAuth:
    return GatewayAuth(parse(raw), **more)


def gateway(one: GatewayAuth | None) -> dict[str, Any]:
    config = bootstrap(listen_host="127.0.0.1", listen_port=1, picker_host="127.0.0.1", auth=one)
    listener = next(x for x in config["static_resources"]["listeners"] if x["name"] == "gateway")
    return listener["filter_chains"][0]["filters"][0]["typed_config"]


def filters(one: GatewayAuth | None) -> dict[str, dict[str, Any]]:
    return {f["name"]: f for f in gateway(one)["http_filters"]}


def routes(one: GatewayAuth | None) -> list[dict[str, Any]]:
    return gateway(one)["route_config"]["virtual_hosts"][0]["routes"]


def test_where_nothing_is_to_be_checked_nothing_changes() -> None:
    plain, empty = gateway(None), gateway(auth({}))
    assert list(filters(None)) == ["envoy.filters.http.header_mutation", "envoy.filters.http.router"]
    assert plain == empty


def test_what_clients_sent_is_gone_before_anything_is_checked() -> None:
    both = auth({"jwt": {"providers": [INLINE]}, "apiKeys": {"enabled": True}}, keys={"a": (KEY,)})
    names = list(filters(both))
    assert names == ["envoy.filters.http.header_mutation", API_KEYS, JWT, "envoy.filters.http.router"]


@pytest.mark.parametrize(
    ("raw", "gone"),
    [
        ({}, {"x-tidegate-jwt", "x-tidegate-client", "x-tidegate-user", "x-vllm-priority"}),
        ({"jwt": {"payloadHeader": "x-mine"}, "apiKeys": {"clientHeader": "x-whose"}}, {"x-mine", "x-whose"}),
    ],
)
def test_headers_that_envoy_speaks_by_are_taken_from_clients(raw: dict[str, Any], gone: set[str]) -> None:
    strip = filters(auth(raw))["envoy.filters.http.header_mutation"]["typed_config"]
    removed = [m["remove"] for m in strip["mutations"]["request_mutations"]]
    assert gone <= set(removed)
    assert len(removed) == len(set(removed))


def test_headers_of_a_gateway_in_front_pass() -> None:
    trusted = auth({"trustedHeaders": {"user": "x-auth-user", "groups": "x-auth-groups"}})
    strip = filters(trusted)["envoy.filters.http.header_mutation"]["typed_config"]
    removed = {m["remove"] for m in strip["mutations"]["request_mutations"]}
    assert not removed & {"x-auth-user", "x-auth-groups"}


@pytest.mark.parametrize(
    ("tokens", "requires"), [(True, "allow_missing_or_failed"), (False, "allow_missing")]
)
def test_jwts_of_nobody_are_the_picker_s_to_ask_about_or_refused(tokens: bool, requires: str) -> None:
    raw = {"tokens": {"enabled": tokens}, "jwt": {"providers": [INLINE, REMOTE]}}
    config = filters(auth(raw))[JWT]["typed_config"]
    assert config["rules"] == [{"match": {"prefix": "/"}, "requires": {requires: {}}}]
    for provider in config["providers"].values():
        assert provider["forward"] is False
        assert provider["require_expiration"] is True
        assert provider["audiences"] == ["tidegate"]
        # Only there: left out, a token in the address would be one too.
        assert {h["name"] for h in provider["from_headers"]} == {"Authorization"}
        assert "from_params" not in provider


def test_a_remote_key_set_is_fetched_from_a_checked_server() -> None:
    one = auth({"jwt": {"providers": [INLINE, REMOTE]}})
    remote = filters(one)[JWT]["typed_config"]["providers"]["b"]["remote_jwks"]
    assert remote["http_uri"]["uri"] == "https://login.example.com/keys?v=2"
    assert remote["cache_duration"] == "60s"
    assert "async_fetch" in remote
    [cluster] = one.clusters()
    assert cluster["name"] == remote["http_uri"]["cluster"]
    tls = cluster["transport_socket"]["typed_config"]
    assert tls["sni"] == "login.example.com"
    checked = tls["common_tls_context"]["validation_context"]
    assert checked["match_typed_subject_alt_names"] == [
        {"san_type": "DNS", "matcher": {"exact": "login.example.com"}}
    ]
    [endpoint] = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    assert endpoint["endpoint"]["address"]["socket_address"]["port_value"] == 443


def test_two_issuers_of_one_server_share_its_cluster() -> None:
    again = {**REMOTE, "name": "c", "issuer": "https://c"}
    assert len(auth({"jwt": {"providers": [REMOTE, again]}}).clusters()) == 1
    plain = {**REMOTE, "jwks": {"uri": "http://127.0.0.1:8081/keys"}}
    [cluster] = auth({"jwt": {"providers": [plain]}}).clusters()
    assert "transport_socket" not in cluster


def test_who_shows_no_key_is_not_asked_for_one() -> None:
    raw = {"apiKeys": {"enabled": True, "header": "x-api-key", "bearerPrefix": "tg-"}}
    *grpc, by_header, by_token, without = routes(auth(raw, keys={"alice": (KEY,)}))
    for same, other in zip(grpc, (by_header, by_token, without), strict=True):
        assert same["match"] == {**other["match"], "grpc": {}}
        assert same.get("typed_per_filter_config") == other.get("typed_per_filter_config")
    assert by_header["match"]["headers"] == [{"name": "x-api-key", "present_match": True}]
    assert by_token["match"]["headers"] == [
        {"name": "authorization", "string_match": {"prefix": "Bearer tg-"}}
    ]
    assert without["typed_per_filter_config"][API_KEYS]["disabled"] is True
    assert "headers" not in without["match"]
    assert "typed_per_filter_config" not in by_header
    config = filters(auth(raw, keys={"alice": (KEY,)}))[API_KEYS]["typed_config"]
    assert config["key_sources"] == [{"header": "x-api-key"}, {"header": "authorization"}]
    assert config["forwarding"] == {"header": "x-tidegate-client", "hide_credentials": True}
    assert config["credentials"] == [{"key": KEY, "client": "alice"}]


def test_with_a_folder_no_key_is_in_the_bootstrap() -> None:
    raw = {"apiKeys": {"enabled": True}, "jwt": {"providers": [INLINE]}}
    one = auth(raw, keys={"alice": (KEY, KEY + "2")}, folder="/etc/envoy")
    assert KEY not in json.dumps(gateway(one))
    assert KEY not in repr(one)
    assert filters(one)[API_KEYS]["config_discovery"]["config_source"] == {
        "path_config_source": {"path": f"/etc/envoy/{API_KEYS}.json"},
        "resource_api_version": "V3",
    }
    files = {name: json.loads(text) for name, text in one.files().items()}
    assert set(files) == {f"{API_KEYS}.json", f"{JWT}.json"}
    [resource] = files[f"{API_KEYS}.json"]["resources"]
    assert resource["name"] == API_KEYS
    assert [c["client"] for c in resource["typed_config"]["credentials"]] == ["alice", "alice"]
    other = auth(raw, keys={"alice": (KEY,)}, folder="/etc/envoy")
    assert other.files()[f"{JWT}.json"] == one.files()[f"{JWT}.json"]
    assert other.files()[f"{API_KEYS}.json"] != one.files()[f"{API_KEYS}.json"]


# ── files ───────────────────────────────────────────────────────────────────────────────────────


def secret(folder: Path, **entries: str) -> Path:
    """As the kubelet mounts one: links into a versioned folder."""
    version = folder / "..2026_11_26"
    version.mkdir(parents=True)
    (folder / "..data").symlink_to(version.name)
    for name, text in entries.items():
        (version / name).write_text(text)
        (folder / name).symlink_to(f"..data/{name}")
    return folder


def test_keys_of_mounted_secrets(tmp_path: Path) -> None:
    one = secret(tmp_path / "one", alice=f"{KEY}\n", bob=f"{KEY}-old\n\n  {KEY}-new  \n")
    two = secret(tmp_path / "two", alice=f"{KEY}-too", empty="\n")
    assert read_keys([one, two]) == {"alice": (KEY, f"{KEY}-too"), "bob": (f"{KEY}-old", f"{KEY}-new")}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"alice": "short"}, "alice line 1: a key has 16 to 1024 characters, this one 5"),
        ({"alice": "k" * 2000}, "this one 2000"),
        ({"alice": "k" * 16 + " b"}, "without spaces"),
        ({"alice": "k" * 16 + "é"}, "printable ASCII"),
        ({"alice": KEY, "bob": KEY}, "bob has a key that alice has too"),
    ],
)
def test_bad_keys_are_named_and_not_shown(tmp_path: Path, entries: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidObject, match=words) as error:
        read_keys([secret(tmp_path / "s", **entries)])
    assert not any(key in str(error.value) for key in entries.values() if len(key) > 5)


def test_keys_that_are_asked_for_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, words in (("empty", "no key is there"), ("missing", "cannot be read")):
        with pytest.raises(InvalidObject, match=words):
            read_secrets(parse({"apiKeys": {"enabled": True, "directories": [str(tmp_path / folder)]}}))


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "is not JSON"), ("[]", "must be a JSON Web Key Set"), ('{"keys": []}', "at least one key")],
)
def test_key_sets_are_read_from_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "jwks.json"
    sources = parse({"jwt": {"providers": [{**INLINE, "jwks": {"file": str(path)}}]}})
    with pytest.raises(InvalidObject, match="cannot be read"):
        read_secrets(sources)
    path.write_text(text)
    with pytest.raises(InvalidObject, match=words):
        read_secrets(sources)
    path.write_text(JWKS)
    assert read_secrets(sources).jwks == {"a": JWKS}


def test_files_are_renamed_into_place_for_their_owner_only(tmp_path: Path) -> None:
    assert write_files(tmp_path, {"b": "1", "a": "1"}) == ["a", "b"]
    before = (tmp_path / "a").stat().st_ino
    assert write_files(tmp_path, {"a": "1", "b": "2"}) == ["b"]
    assert (tmp_path / "a").stat().st_ino == before
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave logging as pytest has set it up."""
    monkeypatch.setattr("tidegate.cli.gateway.log_to_stderr", lambda *_: None)


@pytest.mark.usefixtures("quiet")
def test_the_command_writes_envoy_s_files(tmp_path: Path) -> None:
    keys, identity, out = secret(tmp_path / "keys", alice=KEY), tmp_path / "identity.yaml", tmp_path / "out"
    identity.write_text(json.dumps({"apiKeys": {"enabled": True, "directories": [str(keys)]}}))
    arguments = ["gateway", "--out", str(out), "--identity", str(identity), "--picker", "picker:9002"]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert sorted(p.name for p in out.iterdir()) == ["envoy.json", f"{API_KEYS}.json"]
    assert KEY not in (out / "envoy.json").read_text()
    assert "nothing: all is as it was" in CliRunner().invoke(app, arguments).output

    identity.write_text(json.dumps({"apiKeys": {"enable": True}}))
    wrong = CliRunner().invoke(app, arguments)
    assert (wrong.exit_code, "did you mean enabled" in wrong.output) == (2, True)
    nowhere = CliRunner().invoke(app, ["gateway", "--out", str(out), "--picker", "9002"])
    assert (nowhere.exit_code, "HOST:PORT" in nowhere.output) == (2, True)


@pytest.mark.usefixtures("quiet")
def test_the_command_follows_keys_and_keeps_the_last_good_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys, identity, out = secret(tmp_path / "keys", alice=KEY), tmp_path / "identity.yaml", tmp_path / "out"
    identity.write_text(json.dumps({"apiKeys": {"enabled": True, "directories": [str(keys)]}}))
    entry, file = keys / "..data" / "alice", out / f"{API_KEYS}.json"
    seen: list[set[str]] = []

    def known() -> set[str]:
        [resource] = json.loads(file.read_text())["resources"]
        return {c["key"] for c in resource["typed_config"]["credentials"]}

    steps = iter([f"{KEY}\n{KEY}-new", "short", "short", f"{KEY}-new"])

    def sleep(_seconds: float) -> None:
        seen.append(known())
        step = next(steps, None)
        if step is None:
            raise KeyboardInterrupt
        entry.write_text(step)

    monkeypatch.setattr("time.sleep", sleep)
    arguments = ["gateway", "--out", str(out), "--identity", str(identity), "--watch", "5"]
    CliRunner().invoke(app, arguments)
    both, new = {KEY, f"{KEY}-new"}, {f"{KEY}-new"}
    assert seen == [{KEY}, both, both, both, new]
    stays = [r for r in caplog.records if "the files stay as they are" in r.message]
    assert len(stays) == 1  # said once, not at every look
    assert "short" not in stays[0].getMessage()
