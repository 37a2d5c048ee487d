"""Callers of all kinds, the way that they come by, and a model that says what reached its engine."""

import threading
import time
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from support.chat import body
from support.fake_engine import FakeEngine, Seen
from support.gateway import EnvoyProcess, PickerProcess
from support.jwts import AUDIENCE, Issuer
from support.proxy import Proxy
from support.served import error_of
from tidegate.adapters.gatewayfiles import write_files
from tidegate.adapters.kube import Kube, kinds
from tidegate.api.identity import IdentitySources
from tidegate.render.envoy_auth import GatewayAuth
from tidegate.render.measure import REQUEST_HEADER

HIGH, LOW = "id-high", "id-low"
CLASSES = {HIGH: {"priority": 900}, LOW: {"priority": 10, "reclaim": "Always"}}
PRIORITY = {HIGH: str(1_000_000_000 - 900), LOW: str(1_000_000_000 - 10)}

ALICE, BOB = "tg-alice-0123456789", "tg-bob-01234567890"
KEYS = {"alice": (ALICE,), "bob": (BOB,)}
CHAT = "/v1/chat/completions"


class KeyServer(ThreadingHTTPServer):
    """An issuer's key set over HTTP."""

    def __init__(self) -> None:
        self.issuer = Issuer("https://remote.test")

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                text = outer.issuer.jwks().encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        outer = self
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


@dataclass
class Way:
    """Picker and Envoy with tokens, JWTs and keys switched on, and the folder that Envoy watches."""

    picker: PickerProcess
    envoy: EnvoyProcess
    sources: IdentitySources
    issuer: Issuer
    remote: KeyServer
    folder: Path
    proxy: Proxy

    def write(self, **changes: Any) -> None:
        """Give Envoy other keys."""
        kept = {"keys": KEYS, "jwks": {"local": self.issuer.jwks()}} | changes
        write_files(self.folder, GatewayAuth(self.sources, **kept, folder=str(self.folder)).files())


def identity(remote_port: int) -> dict[str, Any]:
    claims = {"userPrefix": "corp:", "groups": "groups", "groupsPrefix": "corp:", "tenant": "org"}
    both = {"audiences": [AUDIENCE], "claims": claims}
    uri = f"http://127.0.0.1:{remote_port}/keys"
    return {
        "tokens": {"audiences": [AUDIENCE]},
        "jwt": {
            "providers": [
                {"name": "local", "issuer": "https://login.test", "jwks": {"file": "see Way.write"}, **both},
                {
                    "name": "remote",
                    "issuer": "https://remote.test",
                    "jwks": {"uri": uri, "cacheDuration": "1s"},
                    **both,
                },
            ]
        },
        "apiKeys": {
            "enabled": True,
            "bearerPrefix": "tg-",
            "clients": {"alice": {"groups": ["vips"], "tenant": "a"}},
        },
    }


@dataclass
class Model:
    """A model that serves both classes, and its one engine."""

    name: str
    namespace: str
    way: Way
    client: httpx.AsyncClient
    kube: Kube
    engine: FakeEngine = field(default_factory=FakeEngine)

    async def chat(self, *, headers: dict[str, str] | None = None, **more: str) -> httpx.Response:
        """One chat completion; `bearer` and `key` are its credentials."""
        shown = dict(headers or {})
        if "bearer" in more:
            shown["Authorization"] = f"Bearer {more['bearer']}"
        if "key" in more:
            shown["X-Api-Key"] = more["key"]
        return await self.client.post(CHAT, json=body(self.name), headers=shown)

    async def got(self, qos: str, **shown: Any) -> Seen:
        """That it was answered in this class; what the engine saw of it."""
        response = await self.chat(**shown)
        assert response.status_code == 200, response.text
        seen = self.engine.seen[-1]
        assert seen.headers["x-vllm-priority"] == PRIORITY[qos]
        hidden = ("authorization", "x-api-key", "x-tidegate-", "x-auth-")
        # Its number, by which its answer is known in the log, passes the engine by.
        assert not [n for n in seen.headers if n.startswith(hidden) and n != REQUEST_HEADER]
        return seen

    async def refused(self, status: int, code: str, **shown: Any) -> httpx.Response:
        """That it was refused in this way, and reached no engine."""
        before = len(self.engine.seen)
        response = await self.chat(**shown)
        assert (response.status_code, error_of(response)["code"]) == (status, code), response.text
        assert len(self.engine.seen) == before
        return response


async def allow(kube: Kube, qos: str, *subjects: dict[str, str]) -> str:
    """Give `use` of a class to these; returns the binding's name."""
    name = f"use-{uuid.uuid4().hex[:8]}"
    rule = {
        "apiGroups": ["tidegate.dev"],
        "resources": ["qosclasses"],
        "verbs": ["use"],
        "resourceNames": [qos],
    }
    await kube.create(kinds.CLUSTER_ROLE, {"metadata": {"name": name}, "rules": [rule]})
    named = [{"apiGroup": "rbac.authorization.k8s.io", **s} for s in subjects]
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name}
    await kube.create(
        kinds.CLUSTER_ROLE_BINDING, {"metadata": {"name": name}, "roleRef": role, "subjects": named}
    )
    return name


def wrong_jwts(issuer: Issuer) -> dict[str, str]:
    """Each would be a VIP's, were it not for one thing."""
    other, vip = Issuer(), {"groups": ["vips"]}
    head, payload, signature = issuer.token(**vip).split(".")
    return {
        "expired": issuer.token(**vip, exp=int(time.time()) - 120),
        "without an end": issuer.token(**vip, exp=None),
        "not yet": issuer.token(**vip, nbf=int(time.time()) + 600),
        "another audience": issuer.token(**vip, aud="another"),
        "no audience": issuer.token(**vip, aud=None),
        "another issuer": issuer.token(**vip, iss="https://evil.test"),
        "the other provider's issuer": issuer.token(**vip, iss="https://remote.test"),
        "another's key": other.token(**vip),
        "another's key by its own name": other.token(header={"kid": "key-2"}, **vip),
        "no signature": issuer.unsigned(**vip),
        "the signature cut off": f"{head}.{payload}.",
        "the public key as a secret": issuer.by_public_key(**vip),
        "another payload": f"{head}.{issuer.token(**vip, sub='root').split('.')[1]}.{signature}",
        "not a JWT": "x.y.z",
    }
