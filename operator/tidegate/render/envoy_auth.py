"""What Envoy checks of callers by itself: JWTs by jwt_authn, API keys by api_key_auth. Pure.

Both filters stand behind the one that takes clients' internal headers away, and write who called
into such headers, for the picker. With a folder given, their configuration is read from files there
that Envoy watches, so that keys change without a restart and without closing a connection.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Final
from urllib.parse import urlsplit

from tidegate.api.identity import ApiKeys, IdentitySources, Provider

Config = dict[str, Any]

API_KEYS: Final = "tidegate.api_keys"
JWT: Final = "tidegate.jwt"

_TYPE: Final = "type.googleapis.com/"
_API_KEY_AUTH: Final = f"{_TYPE}envoy.extensions.filters.http.api_key_auth.v3.ApiKeyAuth"
_JWT_AUTHN: Final = f"{_TYPE}envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication"
_DISABLED: Final = {API_KEYS: {"@type": f"{_TYPE}envoy.config.route.v3.FilterConfig", "disabled": True}}
_JWKS_TIMEOUT: Final = "5s"
_CACHE_DURATION: Final = "300s"


@dataclass(frozen=True, slots=True)
class GatewayAuth:
    """Identity as Envoy is to check it.

    Args:
        sources: What is believed.
        keys: API keys by client. A client may have several, while one is replaced.
        jwks: Key sets of providers whose keys are in a file, by the provider's name.
        folder: Where Envoy reads the filters' configuration from, as it sees it; None: from the bootstrap.
    """

    sources: IdentitySources
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    jwks: Mapping[str, str] = field(default_factory=dict, repr=False)
    folder: str | None = None

    def forged(self) -> list[str]:
        """Headers that a client must not set: those in which Envoy itself says who calls."""
        s, trusted = self.sources, self.sources.trusted_headers
        theirs = {trusted.user, trusted.groups, trusted.tenant} if trusted is not None else set()
        return sorted({s.jwt.payload_header, s.api_keys.client_header} - theirs)

    def filters(self) -> list[Config]:
        """The checks, keys first: a key in Authorization is gone before it is read as a JWT."""
        return [self._filter(name, config) for name, config in self._configs().items()]

    def files(self) -> dict[str, str]:
        """Name and content of the files in the folder; they are to be renamed into place."""
        return {f"{name}.json": _discovery(name, config) for name, config in self._configs().items()}

    def routes(self, route: Config) -> list[Config]:
        """One route for who shows a key, and one for who shows none, where none is asked for."""
        keys = self.sources.api_keys
        if not keys.enabled:
            return [route]
        shown = []
        if keys.header is not None:
            shown.append({"name": keys.header, "present_match": True})
        if keys.bearer_prefix is not None:
            shown.append(
                {"name": "authorization", "string_match": {"prefix": f"Bearer {keys.bearer_prefix}"}}
            )
        matched = [{**route, "match": {**route["match"], "headers": [header]}} for header in shown]
        return [*matched, {**route, "typed_per_filter_config": _DISABLED}]

    def clusters(self) -> list[Config]:
        """Where key sets are fetched from, one for each host and port."""
        found = {_cluster_name(p): _cluster(p) for p in self.sources.jwt.providers if p.jwks.uri is not None}
        return list(found.values())

    def _configs(self) -> dict[str, Config]:
        configs = {}
        if self.sources.api_keys.enabled:
            configs[API_KEYS] = _api_key_auth(self.sources.api_keys, self.keys)
        if self.sources.jwt.providers:
            configs[JWT] = self._jwt_authn()
        return configs

    def _filter(self, name: str, config: Config) -> Config:
        if self.folder is None:
            return {"name": name, "typed_config": config}
        path = str(PurePath(self.folder) / f"{name}.json")
        source = {"path_config_source": {"path": path}, "resource_api_version": "V3"}
        return {"name": name, "config_discovery": {"config_source": source, "type_urls": [config["@type"]]}}

    def _jwt_authn(self) -> Config:
        jwt = self.sources.jwt
        # A token of nobody here may be the cluster's own, where those are taken: the picker asks.
        other = "allow_missing_or_failed" if self.sources.tokens.enabled else "allow_missing"
        return {
            "@type": _JWT_AUTHN,
            "providers": {p.name: self._provider(p) for p in jwt.providers},
            "rules": [{"match": {"prefix": "/"}, "requires": {other: {}}}],
        }

    def _provider(self, p: Provider) -> Config:
        config: Config = {
            "issuer": p.issuer,
            "audiences": list(p.audiences),
            "require_expiration": True,
            "forward": False,
            "forward_payload_header": self.sources.jwt.payload_header,
            # Left out, ?access_token= would be one too, and stand in logs.
            "from_headers": [
                {"name": "Authorization", "value_prefix": scheme} for scheme in ("Bearer ", "bearer ")
            ],
        }
        if p.jwks.uri is None:
            return config | {"local_jwks": {"inline_string": p.jwks.inline or self.jwks[p.name]}}
        duration = p.jwks.cache_duration
        return config | {
            "remote_jwks": {
                "http_uri": {"uri": p.jwks.uri, "cluster": _cluster_name(p), "timeout": _JWKS_TIMEOUT},
                "cache_duration": f"{duration.total_seconds():g}s" if duration else _CACHE_DURATION,
                # Fetched ahead, and kept while the issuer is away.
                "async_fetch": {},
                "retry_policy": {"num_retries": 3},
            }
        }


def _api_key_auth(keys: ApiKeys, known: Mapping[str, tuple[str, ...]]) -> Config:
    sources = [{"header": name} for name in (keys.header, keys.bearer_prefix and "authorization") if name]
    return {
        "@type": _API_KEY_AUTH,
        "credentials": [{"key": k, "client": client} for client in sorted(known) for k in known[client]],
        "key_sources": sources,
        "forwarding": {"header": keys.client_header, "hide_credentials": True},
    }


def _discovery(name: str, config: Config) -> str:
    """A file of Envoy's extension configuration discovery."""
    resource = {
        "@type": f"{_TYPE}envoy.config.core.v3.TypedExtensionConfig",
        "name": name,
        "typed_config": config,
    }
    version = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    return json.dumps({"version_info": version, "resources": [resource]}, indent=1)


def _cluster_name(p: Provider) -> str:
    parts = urlsplit(p.jwks.uri or "")
    return f"jwks-{parts.scheme}-{parts.netloc}"


def _cluster(p: Provider) -> Config:
    parts = urlsplit(p.jwks.uri or "")
    host, secure = parts.hostname or "", parts.scheme == "https"
    address = {"address": host, "port_value": parts.port or (443 if secure else 80)}
    name = _cluster_name(p)
    cluster: Config = {
        "name": name,
        "type": "STRICT_DNS",
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"socket_address": address}}}]}],
        },
    }
    if secure:
        checked = {
            "trusted_ca": {"filename": p.jwks.ca_file},
            "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": host}}],
        }
        cluster["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": f"{_TYPE}envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "sni": host,
                "common_tls_context": {"validation_context": checked},
            },
        }
    return cluster
