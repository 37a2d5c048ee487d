"""Where a caller's identity may come from: one file, read by the picker and by what renders Envoy's.

No kind of the API: it is the chart's value `identity`, and `--identity` of `tidegate picker` and of
`tidegate gateway`. Whoever may write it decides who may say who they are.
"""

from pathlib import Path
from typing import Annotated, Any, Final, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from tidegate.api.common import InvalidObject, LabelName, PositiveDuration, Spec
from tidegate.api.problems import describe

PAYLOAD_HEADER: Final = "x-tidegate-jwt"
"""The payload of a JWT that the gateway has verified, in base64url."""
CLIENT_HEADER: Final = "x-tidegate-client"
"""Whose API key the gateway has found."""

_OURS: Final = "x-tidegate-"
"""Begins the headers of the gateway's own: it takes them away from whoever sends them."""

_HEADER: Final = r"^[a-z0-9]([-a-z0-9_]*[a-z0-9])?$"
HeaderName = Annotated[str, Field(min_length=1, max_length=64, pattern=_HEADER)]
Text = Annotated[str, Field(min_length=1, max_length=256)]
Prefix = Annotated[str, Field(max_length=64)]
KeyPrefix = Annotated[str, Field(min_length=2, max_length=32, pattern=r"^[A-Za-z0-9_-]+$")]


def _not_system(value: str) -> str:
    if value.startswith("system:"):
        raise ValueError("must not begin with system:, which is Kubernetes' own")
    return value


class Tokens(Spec):
    """Bearer tokens that the API server knows, by TokenReview."""

    enabled: bool = Field(default=True, description="Ask the API server about bearer tokens.")
    audiences: tuple[Text, ...] = Field(
        default=(),
        max_length=16,
        description="A token must be for one of them. Empty: for the API server itself.",
    )
    unknown_per_second: int = Field(
        default=100,
        ge=1,
        le=100_000,
        description="How many tokens that were never seen the API server is asked about a second, after a "
        "burst of twice as many. Those beyond get 429.",
    )


class Jwks(Spec):
    """Keys that sign an issuer's tokens: exactly one of the three."""

    uri: str | None = Field(
        default=None,
        max_length=2048,
        pattern=r"^https?://[^/\s?#]+[^\s#]*$",
        description="Where Envoy fetches them, and again after cacheDuration.",
    )
    cache_duration: PositiveDuration | None = Field(
        default=None, description="How long fetched keys are used before they are fetched anew; default 5m."
    )
    inline: str | None = Field(default=None, max_length=65536, description="A JSON Web Key Set, as text.")
    file: str | None = Field(
        default=None, max_length=1024, description="A file that holds one, such as of a mounted ConfigMap."
    )
    ca_file: str = Field(
        default="/etc/ssl/certs/ca-certificates.crt",
        max_length=1024,
        description="Certificates in PEM that uri's server is checked against, where it is https.",
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(x is not None for x in (self.uri, self.inline, self.file)) != 1:
            raise ValueError("must have exactly one of uri, inline and file")
        return self


class Claims(Spec):
    """Which claims of a verified JWT say who calls. Of nested ones the path, with dots between."""

    user: Text = Field(default="sub", description="The user's name. With email, email_verified must be true.")
    user_prefix: Prefix = Field(default="", description="Put before it, such as corp:, so that names differ.")
    groups: Text | None = Field(default=None, description="A list of groups, or one group.")
    groups_prefix: Prefix = Field(default="", description="Put before each group.")
    tenant: Text | None = Field(
        default=None, description="The tenant, for classes with tenant.from Header; before the header itself."
    )

    _prefixes = field_validator("user_prefix", "groups_prefix")(_not_system)


class Provider(Spec):
    """An issuer of JWTs that Envoy checks: signature, issuer, audience, expiry."""

    name: LabelName = Field(description="For logs and Envoy's statistics.")
    issuer: Text = Field(description="The claim iss, exactly.")
    audiences: tuple[Text, ...] = Field(
        min_length=1, max_length=16, description="A token must be for one of them (claim aud)."
    )
    jwks: Jwks
    claims: Claims = Field(default=Claims())


class Jwt(Spec):
    """JWTs and OpenID Connect, checked by Envoy's jwt_authn."""

    payload_header: HeaderName = Field(
        default=PAYLOAD_HEADER,
        description="Header in which the gateway hands the verified payload over, in base64url. A gateway "
        "other than the chart's may have one of its own.",
    )
    providers: tuple[Provider, ...] = Field(default=(), max_length=32)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for field in ("name", "issuer"):
            values = [getattr(p, field) for p in self.providers]
            double = next((v for v in values if values.count(v) > 1), None)
            if double is not None:
                raise ValueError(f"providers must differ in {field}: {double!r} is there twice")
        return self


class Client(Spec):
    """What is known of an API key's client beside its name."""

    groups: tuple[Text, ...] = Field(default=(), max_length=64)
    tenant: Text | None = None

    @field_validator("groups")
    @classmethod
    def _groups(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_not_system(group) for group in value)


class ApiKeys(Spec):
    """API keys, checked by Envoy's api_key_auth. The keys themselves are in Secrets."""

    enabled: bool = False
    header: HeaderName | None = Field(
        default="x-api-key", description="Header that holds a key; null: only Authorization."
    )
    bearer_prefix: KeyPrefix | None = Field(
        default=None,
        description="Keys that begin with this, such as tg-, are taken from `Authorization: Bearer KEY` too, "
        "as OpenAI's clients send them.",
    )
    directories: tuple[str, ...] = Field(
        default=(),
        max_length=64,
        description="Mounted Secrets: a file is named as its client, each of its lines is a key.",
    )
    client_header: HeaderName = Field(
        default=CLIENT_HEADER, description="Header in which the gateway says whose key it was."
    )
    user_prefix: Prefix = Field(default="apikey:", description="Put before the client's name.")
    clients: dict[Text, Client] = Field(
        default={}, max_length=10_000, description="Groups and tenants, by client."
    )

    _prefix = field_validator("user_prefix")(_not_system)

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if self.enabled and self.header is None and self.bearer_prefix is None:
            raise ValueError("must have header or bearerPrefix, or no key is ever looked for")
        if "authorization" in (self.header, self.client_header):
            raise ValueError("header must not be authorization: set bearerPrefix")
        return self


class TrustedHeaders(Spec):
    """Headers that another gateway sets, after it has taken away those of clients."""

    user: HeaderName = Field(description="The user's name.")
    groups: HeaderName | None = Field(default=None, description="Its groups, with commas between.")
    tenant: HeaderName | None = Field(default=None, description="Its tenant.")
    user_prefix: Prefix = ""
    groups_prefix: Prefix = ""

    _prefixes = field_validator("user_prefix", "groups_prefix")(_not_system)

    @field_validator("user", "groups", "tenant")
    @classmethod
    def _theirs(cls, value: str | None) -> str | None:
        if value is not None and value.startswith(_OURS):
            raise ValueError(
                f"must not begin with {_OURS}, which the gateway takes away: use another name, such as "
                "x-auth-user"
            )
        return value


class IdentitySources(Spec):
    """All of it. What is left out is not believed."""

    tokens: Tokens = Field(default=Tokens())
    jwt: Jwt = Field(default=Jwt())
    api_keys: ApiKeys = Field(default=ApiKeys())
    trusted_headers: TrustedHeaders | None = None

    @model_validator(mode="after")
    def _apart(self) -> Self:
        names = [self.jwt.payload_header, self.api_keys.client_header, "authorization", self.api_keys.header]
        if self.trusted_headers is not None:
            t = self.trusted_headers
            names += [t.user, t.groups, t.tenant]
        double = next((n for n in names if n is not None and names.count(n) > 1), None)
        if double is not None:
            raise ValueError(f"every header must have one meaning: {double} has two")
        return self

    @property
    def headers(self) -> frozenset[str]:
        """Headers that say who calls: only a gateway may set them, and no engine gets them."""
        found = set()
        if self.jwt.providers:
            found.add(self.jwt.payload_header)
        if self.api_keys.enabled:
            found.add(self.api_keys.client_header)
        if self.trusted_headers is not None:
            t = self.trusted_headers
            found |= {n for n in (t.user, t.groups, t.tenant) if n is not None}
        return frozenset(found)


def parse(raw: Any) -> IdentitySources:
    """Read the file's content. Raises InvalidObject, which names each field that is wrong."""
    try:
        return IdentitySources.model_validate(raw if raw is not None else {})
    except ValidationError as error:
        raise InvalidObject("; ".join(describe(IdentitySources, error))) from error


def load(path: Path) -> IdentitySources:
    """Read the file. Raises InvalidObject, or OSError."""
    try:
        return parse(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise InvalidObject(f"{path} is not YAML: {error}") from error
