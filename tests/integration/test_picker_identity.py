"""Who may have which class: real tokens, real JWTs and keys, a real Envoy and a real API server."""

import asyncio
import itertools
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

from support.callers import (
    ALICE,
    BOB,
    CHAT,
    CLASSES,
    HIGH,
    KEYS,
    LOW,
    PRIORITY,
    KeyServer,
    Model,
    Way,
    allow,
    identity,
    wrong_jwts,
)
from support.chat import body
from support.gateway import EnvoyProcess, PickerProcess
from support.jwts import AUDIENCE, Issuer
from support.ports import free_port
from support.proxy import Proxy
from support.served import error_of, make_pod, token_for
from support.wait import eventually
from tidegate.adapters.kube import Kube, kinds
from tidegate.adapters.metrics import parse as parse_metrics
from tidegate.api.identity import parse
from tidegate.local.cluster import LocalCluster
from tidegate.picker.identity import TTL_S
from tidegate.render.envoy_auth import GatewayAuth
from tidegate.render.measure import REQUEST_HEADER

SEEN_WITHIN_S = 30.0


@pytest.fixture(scope="module")
def way(control_plane: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Way]:
    root = tmp_path_factory.mktemp("identity")
    config = yaml.safe_load(control_plane.layout.kubeconfig_of("tidegate-picker").read_text())
    api = urlsplit(config["clusters"][0]["cluster"]["server"])
    proxy, remote, issuer = Proxy(api.hostname or "", api.port or 443), KeyServer(), Issuer()
    config["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{proxy.port}"
    (root / "kubeconfig").write_text(yaml.safe_dump(config))
    raw = identity(remote.server_port)
    (root / "identity.yaml").write_text(yaml.safe_dump(raw))
    folder = root / "envoy"
    folder.mkdir(mode=0o700)
    picker = PickerProcess(root, root / "kubeconfig", ["--identity", str(root / "identity.yaml")])
    auth = GatewayAuth(parse(raw), KEYS, {"local": issuer.jwks()}, str(folder))
    found = Way(
        picker, EnvoyProcess(root, picker.ports[0], auth=auth), parse(raw), issuer, remote, folder, proxy
    )
    found.write()
    try:
        picker.start()
        found.envoy.start()
        yield found
    finally:
        found.envoy.stop()
        picker.stop()
        proxy.close()
        remote.shutdown()
        remote.server_close()


@pytest.fixture
async def model(kube: Kube, namespace: str, way: Way) -> AsyncIterator[Model]:
    """High for the group of VIPs, low for everybody with a credential, nothing for anonymous."""
    for name, spec in CLASSES.items():
        full = {"metadata": {"name": name}, "spec": {"allowedNamespaces": {}, **spec}}
        await kube.apply(kinds.QOS_CLASS, full, manager="test", force=True)
    vips = [{"kind": "Group", "name": n} for n in ("corp:vips", "vips")]
    bindings = [
        await allow(kube, HIGH, *vips),
        await allow(kube, LOW, *vips, {"kind": "Group", "name": "system:authenticated"}),
    ]
    async with httpx.AsyncClient(
        base_url=way.envoy.url, timeout=30, limits=httpx.Limits(max_connections=None)
    ) as client:
        one = Model(f"m-{uuid.uuid4().hex[:8]}", namespace, way, client, kube)
        spec = {
            "model": {"name": one.name, "uri": "hf://test/test"},
            "engine": {"type": "vLLM"},
            "classes": [{"qosClass": HIGH}, {"qosClass": LOW}],
        }
        meta = {"name": one.name, "namespace": namespace}
        await kube.create(kinds.MODEL_DEPLOYMENT, {"metadata": meta, "spec": spec})
        await one.engine.start()
        await make_pod(kube, namespace, one.name, LOW, one.engine.port, slots=64)

        async def known() -> bool:
            state = way.picker.state()
            by = {e["address"]: e for e in state["endpoints"]}
            return one.name in state["models"] and bool(
                by.get(f"127.0.0.1:{one.engine.port}", {}).get("kv_tokens")
            )

        await eventually(known)
        yield one
        await one.engine.stop()
    for name in bindings:
        await kube.delete(kinds.CLUSTER_ROLE_BINDING, name)


# ── JWTs ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_jwt_s_claims_say_who_calls(model: Model) -> None:
    issuer = model.way.issuer
    await model.got(HIGH, bearer=issuer.token(groups=["vips"], org="acme"))
    await model.got(LOW, bearer=issuer.token())
    await model.got(LOW, bearer=issuer.token(groups=["vips"]), headers={"x-tidegate-qos": LOW})
    await model.got(HIGH, bearer=issuer.token(groups=["vips"], aud=["other", AUDIENCE]))
    await model.got(HIGH, bearer=model.way.remote.issuer.token(groups=["vips"]))
    refused = await model.refused(
        403, "class_not_allowed", bearer=issuer.token(), headers={"x-tidegate-qos": HIGH}
    )
    assert "corp:ann may not use class id-high" in error_of(refused)["message"]


@pytest.mark.parametrize("tokens", [True, False], ids=["beside tokens of the cluster", "alone"])
async def test_jwts_that_are_wrong_in_one_way_each(model: Model, tokens: bool, tmp_path: Path) -> None:
    way, client = model.way, model.client
    alone = {**identity(way.remote.server_port), "tokens": {"enabled": False}}
    auth = GatewayAuth(parse(alone), KEYS, {"local": way.issuer.jwks()})
    envoy = EnvoyProcess(tmp_path, way.picker.ports[0], auth=auth)
    try:
        if not tokens:  # then Envoy refuses them itself
            envoy.start()
            client = httpx.AsyncClient(base_url=envoy.url, timeout=30)
        for name, token in wrong_jwts(way.issuer).items():
            headers = {"Authorization": f"Bearer {token}"}
            response = await client.post(CHAT, json=body(model.name), headers=headers)
            assert response.status_code == 401, (name, response.text)
            error = error_of(response)
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_token"), name
            assert "www-authenticate" in response.headers, name
            assert token not in response.text
        assert not model.engine.seen
        # A token in the address would stand in logs: it is none.
        good = way.issuer.token(groups=["vips"])
        anonymous = await client.post(f"{CHAT}?access_token={good}", json=body(model.name))
        assert (anonymous.status_code, error_of(anonymous)["code"]) == (403, "class_not_allowed")
    finally:
        envoy.stop()
        if client is not model.client:
            await client.aclose()


async def test_an_issuer_whose_keys_cannot_be_had(model: Model, tmp_path: Path) -> None:
    """It is not the token's fault: 503, and other issuers are not touched by it."""
    config = identity(free_port()) | {"tokens": {"enabled": False}}
    auth = GatewayAuth(parse(config), KEYS, {"local": model.way.issuer.jwks()})
    envoy = EnvoyProcess(tmp_path, model.way.picker.ports[0], auth=auth)
    try:
        envoy.start()
        async with httpx.AsyncClient(base_url=envoy.url, timeout=30) as client:
            behind = Model(model.name, model.namespace, model.way, client, model.kube, model.engine)
            lost = await behind.refused(503, "identity_unknown", bearer=model.way.remote.issuer.token())
            assert int(lost.headers["retry-after"]) >= 1
            await behind.got(HIGH, bearer=model.way.issuer.token(groups=["vips"]))
    finally:
        envoy.stop()


async def test_keys_of_issuers_change_without_a_restart(model: Model) -> None:
    way = model.way

    async def status(token: str) -> int:
        return (await model.chat(bearer=token)).status_code

    for issuer in (way.issuer, way.remote.issuer):
        old = issuer.token()
        await model.got(LOW, bearer=old)
        issuer.rotate()
        way.write()
        new = issuer.token()

        async def taken(token: str = new) -> bool:
            return await status(token) == 200

        await eventually(taken)
        await model.refused(401, "invalid_token", bearer=old)


# ── API keys ────────────────────────────────────────────────────────────────────────────────────


async def test_an_api_key_says_whose_it_is(model: Model) -> None:
    await model.got(HIGH, key=ALICE)
    await model.got(HIGH, bearer=ALICE)  # as OpenAI's clients send it
    await model.got(LOW, key=BOB)
    refused = await model.refused(403, "class_not_allowed", key=BOB, headers={"x-tidegate-qos": HIGH})
    assert "apikey:bob may not use class id-high" in error_of(refused)["message"]
    for wrong in (ALICE[:-1], f"{ALICE}x", ALICE.upper(), "", "nonsense"):
        await model.refused(401, "invalid_token", key=wrong)
    await model.refused(401, "invalid_token", bearer="tg-nobody-0123456789")
    # In the address, or beside a good one, it is none.
    anonymous = await model.client.post(f"{CHAT}?x-api-key={ALICE}", json=body(model.name))
    assert anonymous.status_code == 403


async def test_an_api_key_is_replaced_without_a_restart(model: Model) -> None:
    new = "tg-alice-new-0123456789"
    model.way.write(keys=KEYS | {"alice": (ALICE, new)})  # both, while clients change

    async def status(key: str) -> int:
        return (await model.chat(key=key)).status_code

    await eventually(lambda: status(new), until=lambda s: s == 200)
    assert await status(ALICE) == 200
    model.way.write(keys=KEYS | {"alice": (new,)})
    await eventually(lambda: status(ALICE), until=lambda s: s == 401)
    assert await status(new) == 200
    model.way.write()
    await eventually(lambda: status(ALICE), until=lambda s: s == 200)


async def test_a_key_goes_before_a_token(model: Model) -> None:
    vip = model.way.issuer.token(groups=["vips"])
    await model.got(LOW, key=BOB, bearer=vip)
    await model.refused(401, "invalid_token", key="nonsense", bearer=vip)


# ── tokens of the cluster ───────────────────────────────────────────────────────────────────────


async def test_a_token_must_be_for_this_audience(model: Model) -> None:
    ours = await token_for(model.kube, model.namespace, "ours", [HIGH], audiences=["other", AUDIENCE])
    await model.got(HIGH, bearer=ours)
    for account, audiences in (("another", ["another"]), ("api-server", None)):
        token = await token_for(model.kube, model.namespace, account, [HIGH], audiences=audiences)
        refused = await model.refused(401, "invalid_token", bearer=token)
        assert "with the audience tidegate" in error_of(refused)["message"]


async def test_what_is_revoked_is_seen_within_30_s(model: Model) -> None:
    kube, ns = model.kube, model.namespace
    no_right = await token_for(kube, ns, "no-right", [HIGH], audiences=[AUDIENCE])
    no_account = await token_for(kube, ns, "no-account", [HIGH], audiences=[AUDIENCE])
    idle = await token_for(kube, ns, "idle", [HIGH], audiences=[AUDIENCE])
    for token in (no_right, no_account, idle):
        await model.got(HIGH, bearer=token)
    await kube.delete(kinds.CLUSTER_ROLE_BINDING, f"{ns}-no-right")
    await kube.delete(kinds.CLUSTER_ROLE_BINDING, f"{ns}-idle")
    await kube.delete(kinds.SERVICE_ACCOUNT, "no-account", ns)
    began, seen = time.monotonic(), dict[str, float]()
    while len(seen) < 2:
        for name, token in (("right", no_right), ("account", no_account)):  # in use all the time
            response = await model.chat(bearer=token)
            last = model.engine.seen[-1].headers["x-vllm-priority"]
            if response.status_code == 401 or last == PRIORITY[LOW]:
                seen.setdefault(name, time.monotonic() - began)
        assert time.monotonic() - began < SEEN_WITHIN_S, seen
        await asyncio.sleep(0.2)
    await asyncio.sleep(max(0.0, SEEN_WITHIN_S - (time.monotonic() - began)))
    await model.got(LOW, bearer=idle)  # and of who was quiet meanwhile, at once
    await model.refused(401, "invalid_token", bearer=no_account)
    print(f"seen after: { ({k: round(v, 1) for k, v in seen.items()}) } s")


# ── a flood, and nobody to ask ──────────────────────────────────────────────────────────────────


async def reviews(control_plane: LocalCluster) -> float:
    """TokenReviews that the API server has had."""
    config = yaml.safe_load(control_plane.kubeconfig.read_text())
    server, token = config["clusters"][0]["cluster"]["server"], config["users"][0]["user"]["token"]
    async with httpx.AsyncClient(verify=False, headers={"Authorization": f"Bearer {token}"}) as client:
        text = (await client.get(f"{server}/metrics", timeout=30)).raise_for_status().text
    samples = parse_metrics(text, "apiserver_request_total")
    return sum(s.value for s in samples if dict(s.labels).get("resource") == "tokenreviews")


UNKNOWN_PER_S = 2
FLOOD_S = 10.0


@dataclass
class Flood:
    """Made-up tokens, each sent once, while one that is known is in use."""

    model: Model
    good: str
    ends_at: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    known: Counter[int] = field(default_factory=Counter)

    async def run(self) -> None:
        self.ends_at = time.monotonic() + FLOOD_S
        await asyncio.gather(self._in_use(), *(self._bad(n) for n in range(20)))

    async def _bad(self, worker: int) -> None:
        for number in itertools.count():
            response = await self.model.chat(bearer=f"bad-{worker}-{number}")
            self.statuses[response.status_code] += 1
            if response.status_code == 429:
                assert error_of(response)["code"] == "too_many_unknown"
                assert int(response.headers["retry-after"]) >= 1
            if time.monotonic() > self.ends_at:
                return

    async def _in_use(self) -> None:
        while time.monotonic() < self.ends_at:
            self.known[(await self.model.chat(bearer=self.good)).status_code] += 1
            await asyncio.sleep(0.1)


async def test_a_flood_of_bad_tokens_is_no_lever(
    model: Model, control_plane: LocalCluster, tmp_path: Path
) -> None:
    # Few a second, so that the flood is one on a slow machine too.
    config = {"tokens": {"audiences": [AUDIENCE], "unknownPerSecond": UNKNOWN_PER_S}}
    good = await token_for(model.kube, model.namespace, "good", [HIGH], audiences=[AUDIENCE])
    new = await token_for(model.kube, model.namespace, "new", [HIGH], audiences=[AUDIENCE])
    async with another(model, control_plane, tmp_path, config) as behind:
        await behind.got(HIGH, bearer=good)
        before, began = await reviews(control_plane), time.monotonic()
        flood = Flood(behind, good)
        await flood.run()
        took_s, asked = time.monotonic() - began, await reviews(control_plane) - before
        print(f"{flood.statuses} in {took_s:.1f} s, {asked:.0f} TokenReviews; known: {flood.known}")
        assert set(flood.statuses) == {401, 429}
        known = took_s / (TTL_S * 2 / 3) + 1
        assert asked <= (2 + took_s) * UNKNOWN_PER_S + known
        assert flood.statuses[401] <= asked
        assert set(flood.known) == {200}

        async def status() -> int:  # and once it is over, who comes new is known at once
            return (await behind.chat(bearer=new)).status_code

        await eventually(status, until=lambda s: s == 200, within_s=10)


@pytest.mark.parametrize("hang", [False, True], ids=["refused", "hanging"])
async def test_the_api_server_away(model: Model, hang: bool) -> None:
    kube, ns = model.kube, model.namespace
    known = await token_for(kube, ns, "known", [HIGH], audiences=[AUDIENCE])
    stranger = await token_for(kube, ns, "stranger", [HIGH], audiences=[AUDIENCE])
    vip = model.way.issuer.token(groups=["vips"])
    await model.got(HIGH, bearer=known)
    await model.got(HIGH, bearer=vip)
    model.way.proxy.cut(hang=hang)
    try:
        began = time.monotonic()
        while time.monotonic() - began < TTL_S + 2.0:
            await model.got(HIGH, bearer=known)
            await model.got(HIGH, bearer=vip)  # checked by Envoy, its right remembered
            await asyncio.sleep(0.5)
        refused = await model.refused(503, "identity_unknown", bearer=stranger)
        assert int(refused.headers["retry-after"]) >= 1
        assert "API server" in error_of(refused)["message"]
    finally:
        model.way.proxy.mend()

    async def back() -> bool:
        await model.got(HIGH, bearer=stranger)
        return True

    await eventually(back, within_s=20)
    assert model.way.picker.state()["identity"]["api_server_away"] is False


# ── forged ──────────────────────────────────────────────────────────────────────────────────────


async def raw(way: Way, model: str, lines: list[str]) -> int:
    """A request whose header lines go out exactly as written; its status."""
    data = json.dumps(body(model)).encode()
    head = [f"POST {CHAT} HTTP/1.1", "Host: x", f"Content-Length: {len(data)}", "Connection: close", *lines]
    address = urlsplit(way.envoy.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write("\r\n".join([*head, "", ""]).encode("latin-1") + data)
    answer = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    return int(answer.split(b" ", 2)[1])


async def test_forged_headers_through_envoy(model: Model) -> None:
    import base64

    payload = base64.urlsafe_b64encode(
        json.dumps({"iss": "https://login.test", "sub": "ann", "groups": ["vips"]}).encode()
    ).decode()
    forged = {
        "the payload of a JWT": [f"X-Tidegate-Jwt: {payload}"],
        "the payload, often and in odd case": [f"x-TIDEGATE-jwt: {payload}"] * 3,
        "a key's client": ["x-tidegate-client: alice", "X-Tidegate-Client: alice"],
        "many clients": ["x-tidegate-client: alice,bob,alice"],
        "under another spelling": ["x_tidegate_client: alice", "x_tidegate-jwt: " + payload],
        "our other words": ["x-tidegate-user: root", "x-tidegate-groups: vips", f"x-tidegate-class: {HIGH}"],
        "identity headers of others": [
            "x-auth-user: alice",
            "x-forwarded-user: alice",
            "x-remote-group: vips",
        ],
        "the engine's priority": ["x-vllm-priority: 0", "X-VLLM-PRIORITY: -5", "x_vllm_priority: 0"],
        "an endpoint": [
            "x-gateway-destination-endpoint: 127.0.0.1:1",
            "x-envoy-original-dst-host: 127.0.0.1:1",
            "x-gateway-destination-endpoint-subset: 127.0.0.1:1",
        ],
        "a proxy's chain": ["x-forwarded-for: 127.0.0.1", "x-forwarded-proto: https", "x-forwarded-host: in"],
        "a client certificate": ["x-forwarded-client-cert: Subject=CN=alice"],
        "attempts": ["x-tidegate-again: 1", "x-envoy-max-retries: 100", "x-envoy-internal: true"],
    }
    for name, lines in forged.items():
        assert await raw(model.way, model.name, lines) == 403, name  # anonymous still
    assert not model.engine.seen
    for name, lines in forged.items():
        status = await raw(model.way, model.name, [*lines, f"X-Api-Key: {BOB}"])
        assert status == 200, name
        seen = model.engine.seen[-1]
        assert seen.headers["x-vllm-priority"] == PRIORITY[LOW], name
        hidden = ("x-tidegate", "x_", "x-forwarded-user", "x-remote")
        ours = [n for n in seen.headers if n.startswith(hidden) and n != REQUEST_HEADER]
        assert not ours, name
        assert "x-forwarded-client-cert" not in seen.headers
        assert seen.headers["x-gateway-destination-endpoint"] == f"127.0.0.1:{model.engine.port}"
    assert len(model.engine.seen) == len(forged)


async def test_credentials_sent_twice(model: Model) -> None:
    vip, poor = model.way.issuer.token(groups=["vips"]), model.way.issuer.token(sub="poor")
    cases = {
        "two good JWTs": [f"Authorization: Bearer {vip}", f"Authorization: Bearer {poor}"],
        "the other way round": [f"Authorization: Bearer {poor}", f"authorization: Bearer {vip}"],
        "in one line": [f"Authorization: Bearer {vip},Bearer {poor}"],
        "a key and a JWT": [f"X-Api-Key: {BOB}", f"Authorization: Bearer {vip}"],
        "a key in Authorization, and a JWT": [f"Authorization: Bearer {BOB}", f"Authorization: Bearer {vip}"],
        "a bad key before a good one": ["X-Api-Key: nonsense", f"X-Api-Key: {ALICE}"],
    }
    for name, lines in cases.items():
        status = await raw(model.way, model.name, lines)
        if status == 200:  # then as one of the two, and never more than it
            assert model.engine.seen[-1].headers["x-vllm-priority"] == PRIORITY[LOW], name
        else:
            assert status in (400, 401), (name, status)


@asynccontextmanager
async def another(
    model: Model, control_plane: LocalCluster, folder: Path, config: dict[str, Any]
) -> AsyncIterator[Model]:
    """The same model by way of a picker and an Envoy of their own, with this identity file."""
    path = folder / "identity.yaml"
    path.write_text(yaml.safe_dump(config))
    account = control_plane.layout.kubeconfig_of("tidegate-picker")
    own = PickerProcess(folder, account, ["--identity", str(path)])
    envoy = EnvoyProcess(folder, own.ports[0], auth=GatewayAuth(parse(config)))
    try:
        own.start()
        envoy.start()
        async with httpx.AsyncClient(base_url=envoy.url, timeout=30) as client:

            async def known() -> bool:
                by = {e["address"]: e for e in own.state()["endpoints"]}
                return bool(by.get(f"127.0.0.1:{model.engine.port}", {}).get("kv_tokens"))

            await eventually(known)
            yield Model(model.name, model.namespace, model.way, client, model.kube, model.engine)
    finally:
        envoy.stop()
        own.stop()


async def test_another_gateway_s_headers(model: Model, control_plane: LocalCluster, tmp_path: Path) -> None:
    trusted = {
        "user": "x-auth-user",
        "groups": "x-auth-groups",
        "userPrefix": "sso:",
        "groupsPrefix": "corp:",
    }
    config = {"tokens": {"enabled": False}, "trustedHeaders": trusted}
    async with another(model, control_plane, tmp_path, config) as behind:
        await behind.got(HIGH, headers={"x-auth-user": "eve", "x-auth-groups": "a, vips"})
        await behind.got(LOW, headers={"x-auth-user": "eve"})
        await behind.refused(403, "class_not_allowed", headers={"x-auth-groups": "vips"})
        await behind.refused(401, "invalid_token", bearer="t")  # no tokens are taken here


# ── nobody: at the end, as what nobody may use is remembered for a while ─────────────────────────


async def test_anonymous_gets_what_anonymous_may_use(model: Model) -> None:
    await model.refused(403, "class_not_allowed")
    name = await allow(model.kube, LOW, {"kind": "User", "name": "system:anonymous"})
    try:

        async def low() -> bool:
            await model.got(LOW)
            return True

        await eventually(low)
        await model.refused(403, "class_not_allowed", headers={"x-tidegate-qos": HIGH})
    finally:
        await model.kube.delete(kinds.CLUSTER_ROLE_BINDING, name)
