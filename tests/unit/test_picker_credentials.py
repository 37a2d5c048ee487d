"""What a request shows of who sends it: tables."""

import base64
import json
from typing import Any

import pytest

from tidegate.api.common import InvalidObject
from tidegate.api.identity import IdentitySources, parse
from tidegate.picker.credentials import BadCredentialsError, Bearer, Credentials
from tidegate.picker.identity import ANONYMOUS, Caller

ISSUER = "https://login.example.com"
EVERYBODY = "system:authenticated"
JWKS = {"inline": '{"keys": [{}]}'}
PROVIDER = {"name": "corp", "issuer": ISSUER, "audiences": ["tidegate"], "jwks": JWKS}
CLAIMS = {"user": "sub", "userPrefix": "corp:", "groups": "groups", "groupsPrefix": "corp:", "tenant": "org"}
ALL = {
    "jwt": {"providers": [{**PROVIDER, "claims": CLAIMS}]},
    "apiKeys": {"enabled": True, "clients": {"alice": {"groups": ["paid"], "tenant": "a"}}},
    "trustedHeaders": {
        "user": "x-auth-user",
        "groups": "x-auth-groups",
        "tenant": "x-auth-tenant",
        "userPrefix": "sso:",
        "groupsPrefix": "sso:",
    },
}


def sources(**changes: Any) -> IdentitySources:
    return parse({**ALL, **changes})


def payload(**claims: Any) -> str:
    raw = json.dumps({"iss": ISSUER, **claims}).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def with_claims(**claims: Any) -> IdentitySources:
    return sources(jwt={"providers": [{**PROVIDER, "claims": claims}]})


NOBODY_ELSE = IdentitySources()

WHO = {
    "nothing": ({}, NOBODY_ELSE, ANONYMOUS),
    "an empty token": ({"authorization": ""}, NOBODY_ELSE, ANONYMOUS),
    "a token": ({"authorization": "Bearer t"}, NOBODY_ELSE, Bearer("Bearer t")),
    "headers that nobody is believed by": (
        {"x-tidegate-jwt": payload(sub="root"), "x-tidegate-client": "alice", "x-auth-user": "eve"},
        NOBODY_ELSE,
        ANONYMOUS,
    ),
    "well-known headers of others": (
        {
            "x-forwarded-user": "root",
            "x-remote-user": "root",
            "x-tidegate-user": "root",
            "x-tidegate-groups": "system:masters",
            "x-forwarded-for": "127.0.0.1",
        },
        sources(),
        ANONYMOUS,
    ),
    "a payload": (
        {"x-tidegate-jwt": payload(sub="u1", groups=["a", "b"], org="acme")},
        sources(),
        Caller("corp:u1", ("corp:a", "corp:b", EVERYBODY), tenant="acme"),
    ),
    "one group as text": (
        {"x-tidegate-jwt": payload(sub="u1", groups="a")},
        sources(),
        Caller("corp:u1", ("corp:a", EVERYBODY)),
    ),
    "groups of other types are passed over": (
        {"x-tidegate-jwt": payload(sub="u1", groups=["a", 1, None, "", ["b"]], org=7)},
        sources(),
        Caller("corp:u1", ("corp:a", EVERYBODY)),
    ),
    "a nested claim, and one whose name has dots": (
        {"x-tidegate-jwt": payload(sub="u1", realm={"roles": ["r"]}, **{"https://e.com/t": "acme"})},
        with_claims(groups="realm.roles", tenant="https://e.com/t"),
        Caller("u1", ("r", EVERYBODY), tenant="acme"),
    ),
    "a verified email": (
        {"x-tidegate-jwt": payload(email="a@b.c", email_verified=True)},
        with_claims(user="email"),
        Caller("a@b.c", (EVERYBODY,)),
    ),
    "groups of Kubernetes' own are nobody's": (
        {"x-tidegate-jwt": payload(sub="u1", groups=["system:masters", "g"])},
        with_claims(groups="groups"),
        Caller("u1", ("g", EVERYBODY)),
    ),
    "an API key's client": (
        {"x-tidegate-client": "alice"},
        sources(),
        Caller("apikey:alice", ("paid", EVERYBODY), tenant="a"),
    ),
    "a client of whom nothing is configured": (
        {"x-tidegate-client": "bob"},
        sources(),
        Caller("apikey:bob", (EVERYBODY,)),
    ),
    "another gateway's headers": (
        {"x-auth-user": " eve ", "x-auth-groups": "a, b,,system:masters", "x-auth-tenant": "t"},
        sources(),
        Caller("sso:eve", ("sso:a", "sso:b", "sso:system:masters", EVERYBODY), tenant="t"),
    ),
    "groups without a user": ({"x-auth-groups": "a"}, sources(), ANONYMOUS),
    "what the gateway checked goes before a token": (
        {"x-tidegate-client": "bob", "authorization": "Bearer t"},
        sources(),
        Caller("apikey:bob", (EVERYBODY,)),
    ),
}


@pytest.mark.parametrize(("headers", "believed", "who"), WHO.values(), ids=WHO)
def test_who_a_caller_is(headers: dict[str, str], believed: IdentitySources, who: Caller | Bearer) -> None:
    found = Credentials(believed).presented(headers, frozenset())
    assert found == who
    if isinstance(who, Caller) and isinstance(found, Caller):
        assert found.tenant == who.tenant  # which equality leaves out


BAD = {
    "two credentials": (
        {"x-tidegate-client": "bob", "x-tidegate-jwt": payload(sub="u1")},
        sources(),
        400,
        "more than one credential",
    ),
    "no JSON": ({"x-tidegate-jwt": "????"}, sources(), 401, "not JSON"),
    "not ASCII": ({"x-tidegate-jwt": "é"}, sources(), 401, "not JSON"),
    "no object": (
        {"x-tidegate-jwt": base64.urlsafe_b64encode(b"[]").decode()},
        sources(),
        401,
        "not a JSON object",
    ),
    "another issuer": ({"x-tidegate-jwt": payload(iss="https://evil", sub="u")}, sources(), 401, "issuer"),
    "no user": ({"x-tidegate-jwt": payload()}, sources(), 401, "no claim sub"),
    "a user that is no text": ({"x-tidegate-jwt": payload(sub=["a"])}, sources(), 401, "no claim sub"),
    "an email that nobody verified": (
        {"x-tidegate-jwt": payload(email="a@b.c")},
        with_claims(user="email"),
        401,
        "email_verified",
    ),
    "an email verified in words": (
        {"x-tidegate-jwt": payload(email="a@b.c", email_verified="true")},
        with_claims(user="email"),
        401,
        "email_verified",
    ),
    "one of Kubernetes' own": (
        {"x-tidegate-jwt": payload(sub="system:admin")},
        with_claims(),
        401,
        "system:",
    ),
    "a token where none is taken": (
        {"authorization": "Bearer t"},
        sources(tokens={"enabled": False}),
        401,
        "no credential that is taken here",
    ),
}


@pytest.mark.parametrize(("headers", "believed", "status", "words"), BAD.values(), ids=BAD)
def test_what_cannot_be_believed(
    headers: dict[str, str], believed: IdentitySources, status: int, words: str
) -> None:
    with pytest.raises(BadCredentialsError, match=words) as error:
        Credentials(believed).presented(headers, frozenset())
    assert error.value.status == status


@pytest.mark.parametrize(
    "name",
    ["authorization", "x-tidegate-jwt", "x-tidegate-client", "x-auth-user", "x-auth-groups", "x-auth-tenant"],
)
def test_a_header_that_says_who_calls_comes_once(name: str) -> None:
    with pytest.raises(BadCredentialsError, match=f"{name} came more than once") as error:
        Credentials(sources()).presented({name: "Bearer a"}, {name, "accept"})
    assert error.value.status == 400


def test_other_headers_may_come_often() -> None:
    assert Credentials(NOBODY_ELSE).presented({"accept": "a"}, {"accept", "x-auth-user"}) == ANONYMOUS


def test_what_no_engine_gets() -> None:
    sent = [
        ":path",
        "accept",
        "authorization",
        "content-type",
        "traceparent",
        "x-api-key",
        "x-auth-user",
        "x-data-parallel-rank",
        "x-envoy-original-dst-host",
        "x-forwarded-for",
        "x-forwarded-user",
        "x-gateway-destination-endpoint",
        "x-gateway-destination-endpoint-subset",
        "x-request-id",
        "x-tidegate-anything",
        "x-tidegate-qos",
        "x-vllm-priority",
    ]
    passed = {":path", "accept", "content-type", "traceparent", "x-forwarded-for", "x-request-id"}
    assert set(sent) - set(Credentials(sources()).hidden(sent)) == passed
    assert "x-auth-user" not in Credentials(NOBODY_ELSE).hidden(
        sent
    )  # where it is nobody's, it is just a header


WRONG = {
    "an unknown field": ({"token": {}}, "did you mean tokens"),
    "two sources of keys": (
        {"jwt": {"providers": [{**PROVIDER, "jwks": {**JWKS, "file": "f"}}]}},
        "jwt.providers[0].jwks must have exactly one of uri, inline and file",
    ),
    "no audience": ({"jwt": {"providers": [{**PROVIDER, "audiences": []}]}}, "jwt.providers[0].audiences"),
    "an issuer twice": ({"jwt": {"providers": [PROVIDER, {**PROVIDER, "name": "b"}]}}, "differ in issuer"),
    "a name twice": ({"jwt": {"providers": [PROVIDER, {**PROVIDER, "issuer": "b"}]}}, "differ in name"),
    "a prefix of Kubernetes' own": (
        {"apiKeys": {"userPrefix": "system:"}},
        "apiKeys.userPrefix must not begin with system:",
    ),
    "a group of Kubernetes' own": (
        {"apiKeys": {"clients": {"a": {"groups": ["system:masters"]}}}},
        "must not begin with system:",
    ),
    "a header with two meanings": (
        {"trustedHeaders": {"user": "x-api-key"}},
        "every header must have one meaning: x-api-key has two",
    ),
    **{
        f"a trusted header of our own, {field}": (
            {"trustedHeaders": {"user": "x-auth-user", field: "x-tidegate-it"}},
            f"trustedHeaders.{field} must not begin with x-tidegate-, which the gateway takes away: use",
        )
        for field in ("user", "groups", "tenant")
    },
    "keys in Authorization": ({"apiKeys": {"header": "authorization"}}, "set bearerPrefix"),
    "keys nowhere": ({"apiKeys": {"enabled": True, "header": None}}, "must have header or bearerPrefix"),
    "an upper-case header": ({"trustedHeaders": {"user": "X-User"}}, "trustedHeaders.user must match"),
}


@pytest.mark.parametrize(("raw", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_names_its_field(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidObject) as error:
        parse(raw)
    assert words in str(error.value)


def test_an_empty_file_believes_the_cluster_s_tokens_only() -> None:
    assert parse(None) == IdentitySources()
    assert IdentitySources().headers == frozenset()
    assert IdentitySources().tokens.enabled
