"""What a request shows of who sends it: pure, from its headers and what is configured to be believed.

Signatures and keys are Envoy's to check. Here is only read what a gateway wrote after it had
checked them, and which of the headers no engine may see.
"""

import base64
import binascii
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Final

import orjson

from tidegate.api.identity import Claims, IdentitySources, Provider
from tidegate.picker.identity import ANONYMOUS, Caller

AUTHORIZATION: Final = "authorization"
_AUTHENTICATED: Final = "system:authenticated"
_SYSTEM: Final = "system:"
MAX_GROUPS: Final = 500

_INTERNAL_PREFIXES: Final = ("x-tidegate-", "x-gateway-destination-endpoint", "x-vllm-")
_INTERNAL: Final = frozenset(
    {
        "x-envoy-original-dst-host",
        "x-data-parallel-rank",
        "x-forwarded-access-token",
        "x-forwarded-email",
        "x-forwarded-groups",
        "x-forwarded-preferred-username",
        "x-forwarded-user",
        "x-remote-group",
        "x-remote-user",
    }
)
"""Words between parts of the way. An engine would take them for the gateway's."""


class BadCredentialsError(Exception):
    """The request cannot be believed. `code` is one word for programs."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True, slots=True)
class Bearer:
    """An Authorization header to be looked up."""

    authorization: str


class Credentials:
    """Reads what requests show. One for all requests: what is believed does not change."""

    def __init__(self, sources: IdentitySources) -> None:
        self._sources = sources
        self._sayers = frozenset({AUTHORIZATION, *sources.headers})
        self._hidden = _INTERNAL | self._sayers | ({sources.api_keys.header} - {None})

    def presented(self, headers: Mapping[str, str], repeated: AbstractSet[str]) -> Caller | Bearer:
        """Who the caller is, or what to ask the API server about.

        Args:
            headers: Lower-case names, with their first values.
            repeated: Names that came more than once.

        Raises:
            BadCredentialsError: There is more than one answer, or one that cannot be read.
        """
        if repeated and (twice := sorted(self._sayers & repeated)):
            raise BadCredentialsError(
                400, "ambiguous_credentials", f"the header {twice[0]} came more than once; send it once"
            )
        found = [caller for caller in self._checked(headers) if caller is not None]
        if len(found) > 1:
            raise BadCredentialsError(
                400,
                "ambiguous_credentials",
                "there is more than one credential; send a token or a key, not both",
            )
        if found:  # what the gateway has checked; a token beside it is passed over
            return found[0]
        authorization = headers.get(AUTHORIZATION)
        if not authorization:
            return ANONYMOUS
        if not self._sources.tokens.enabled:
            raise BadCredentialsError(
                401, "invalid_token", "the Authorization header holds no credential that is taken here"
            )
        return Bearer(authorization)

    def hidden(self, headers: Iterable[str]) -> tuple[str, ...]:
        """Those headers that no engine gets: credentials, and words between our own parts."""
        return tuple(n for n in headers if n in self._hidden or n.startswith(_INTERNAL_PREFIXES))

    def _checked(self, headers: Mapping[str, str]) -> Iterator[Caller | None]:
        """Who the caller is by each of the ways that a gateway checks."""
        jwt, keys, trusted = self._sources.jwt, self._sources.api_keys, self._sources.trusted_headers
        if jwt.providers:
            yield _of_payload(headers.get(jwt.payload_header, ""), jwt.providers)
        if keys.enabled and (client := headers.get(keys.client_header, "")):
            known = keys.clients.get(client)
            groups = known.groups if known else ()
            yield _caller(keys.user_prefix + client, groups, (known.tenant or "") if known else "")
        if trusted is not None and (user := headers.get(trusted.user, "").strip()):
            given = headers.get(trusted.groups, "") if trusted.groups else ""
            groups = tuple(trusted.groups_prefix + g for part in given.split(",") if (g := part.strip()))
            tenant = headers.get(trusted.tenant, "").strip() if trusted.tenant else ""
            yield _caller(trusted.user_prefix + user, groups, tenant)


def _of_payload(text: str, providers: tuple[Provider, ...]) -> Caller | None:
    """The user of a JWT's payload that Envoy has verified."""
    if not text:
        return None
    try:
        payload = orjson.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (binascii.Error, ValueError) as error:
        raise _unreadable("the payload that the gateway handed over is not JSON in base64url") from error
    if not isinstance(payload, dict):
        raise _unreadable("the payload that the gateway handed over is not a JSON object")
    provider = next((p for p in providers if p.issuer == payload.get("iss")), None)
    if provider is None:
        raise _unreadable("the token's issuer is not one of identity.jwt.providers")
    claims = provider.claims
    user = _claim(payload, claims.user)
    if not isinstance(user, str) or not user.strip():
        raise _unreadable(f"the token has no claim {claims.user} that names its user")
    if claims.user == "email" and payload.get("email_verified") is not True:
        raise _unreadable("the token's email is not verified (claim email_verified)")
    return _caller(claims.user_prefix + user, _groups(payload, claims), _tenant(payload, claims))


def _groups(payload: dict[str, Any], claims: Claims) -> tuple[str, ...]:
    value = _claim(payload, claims.groups) if claims.groups else None
    found = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(claims.groups_prefix + g for g in found if isinstance(g, str) and g)


def _tenant(payload: dict[str, Any], claims: Claims) -> str:
    value = _claim(payload, claims.tenant) if claims.tenant else None
    return value if isinstance(value, str) else ""


def _claim(payload: dict[str, Any], path: str) -> Any:
    """A claim by its name, which may hold dots itself (https://example.com/groups), else by its path."""
    if path in payload:
        return payload[path]
    value: Any = payload
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _caller(user: str, groups: tuple[str, ...], tenant: str) -> Caller:
    """A user that the gateway vouches for. Nobody becomes one of Kubernetes' own this way."""
    if user.startswith(_SYSTEM):
        raise _unreadable("the user's name begins with system:, which is Kubernetes' own; set a prefix")
    own = tuple(g for g in groups[:MAX_GROUPS] if not g.startswith(_SYSTEM))
    return Caller(user, (*own, _AUTHENTICATED), tenant=tenant)


def _unreadable(message: str) -> BadCredentialsError:
    return BadCredentialsError(401, "invalid_token", message)
