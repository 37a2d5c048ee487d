"""Who calls: what is asked, what is remembered, and what happens when nobody answers."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from tidegate.adapters.kube import ApiError, Kind
from tidegate.picker.identity import (
    ANONYMOUS,
    MAX_REVIEWS,
    MAX_WAITING,
    STALE_S,
    TTL_S,
    Caller,
    Identity,
    InvalidTokenError,
    UnknowableError,
)


class Server:
    """An API server that knows tokens that begin with `good` and lets `alice` use `high`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.away = False
        self.asked: list[str] = []
        self.at_once = self.peak = 0
        self.valid = {"good": "alice", "other": "bob"}

    async def create(self, kind: Kind, obj: Mapping[str, Any]) -> dict[str, Any]:
        self.asked.append(kind.name)
        self.at_once += 1
        self.peak = max(self.peak, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        if self.away:
            raise ApiError(0, "ConnectionFailed", "refused")
        spec = obj["spec"]
        if kind.name == "TokenReview":
            user = self.valid.get(spec["token"])
            if user is None:
                return {"status": {"authenticated": False}}
            return {
                "status": {
                    "authenticated": True,
                    "user": {"username": user, "groups": ["g"], "extra": {"k": ["v"]}},
                }
            }
        attributes = spec["resourceAttributes"]
        assert attributes == {
            "group": "tidegate.dev",
            "resource": "qosclasses",
            "verb": "use",
            "name": attributes["name"],
        }
        return {"status": {"allowed": spec["user"] == "alice" and attributes["name"] == "high"}}


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def identity(server: Server) -> Identity:
    return Identity(server, lambda: server.now)


ALICE = Caller("alice", ("g",), "", (("k", ("v",)),))


async def test_a_token_is_looked_up_once_until_it_is_old(server: Server, identity: Identity) -> None:
    for _ in range(3):
        assert await identity.caller("Bearer good") == ALICE
    assert server.asked == ["TokenReview"]
    server.now = TTL_S
    assert await identity.caller("bearer  good") == ALICE
    assert len(server.asked) == 2


async def test_many_at_once_ask_once(server: Server, identity: Identity) -> None:
    found = await asyncio.gather(*(identity.caller("Bearer good") for _ in range(50)))
    assert set(found) == {ALICE}
    assert len(server.asked) == 1


async def test_one_who_leaves_does_not_fail_the_others(identity: Identity) -> None:
    first = asyncio.create_task(identity.caller("Bearer good"))
    second = asyncio.create_task(identity.caller("Bearer good"))
    await asyncio.sleep(0)
    first.cancel()
    assert await second == ALICE


@pytest.mark.parametrize("header", [None, ""])
async def test_without_a_token_it_is_nobody(server: Server, identity: Identity, header: str | None) -> None:
    assert await identity.caller(header) == ANONYMOUS
    assert server.asked == []


@pytest.mark.parametrize("header", ["Basic abc", "Bearer", "Bearer ", "Bearer nonsense"])
async def test_invalid_tokens(identity: Identity, header: str) -> None:
    with pytest.raises(InvalidTokenError):
        await identity.caller(header)


async def test_a_bad_token_is_remembered_for_a_while(server: Server, identity: Identity) -> None:
    for _ in range(3):
        with pytest.raises(InvalidTokenError):
            await identity.caller("Bearer bad")
    assert len(server.asked) == 1


async def test_a_revoked_token_ends_with_its_time(server: Server, identity: Identity) -> None:
    await identity.caller("Bearer good")
    del server.valid["good"]
    server.now = TTL_S
    with pytest.raises(InvalidTokenError):
        await identity.caller("Bearer good")
    server.away, server.now = True, TTL_S + 11.0
    with pytest.raises(UnknowableError):  # and is not believed later for having once been good
        await identity.caller("Bearer good")


async def test_the_known_go_on_while_the_api_server_is_away(server: Server, identity: Identity) -> None:
    await identity.caller("Bearer good")
    assert await identity.may_use(ALICE, "high")
    server.away, server.now = True, TTL_S + 1
    assert await identity.caller("Bearer good") == ALICE
    assert await identity.may_use(ALICE, "high")
    with pytest.raises(UnknowableError, match="API server"):
        await identity.caller("Bearer other")
    with pytest.raises(UnknowableError):
        await identity.may_use(ALICE, "low")
    server.now = STALE_S
    with pytest.raises(UnknowableError):
        await identity.caller("Bearer good")


async def test_a_flood_of_bad_tokens_asks_few_at_once_and_pushes_nobody_out(
    server: Server, identity: Identity
) -> None:
    await identity.caller("Bearer good")
    flood = [identity.caller(f"Bearer bad-{i}") for i in range(MAX_WAITING + 100)]
    ends = await asyncio.gather(*flood, return_exceptions=True)
    assert sum(isinstance(e, UnknowableError) for e in ends) == 100
    assert sum(isinstance(e, InvalidTokenError) for e in ends) == MAX_WAITING
    assert server.peak <= MAX_REVIEWS
    before = len(server.asked)
    assert await identity.caller("Bearer good") == ALICE
    assert len(server.asked) == before


async def test_rights(server: Server, identity: Identity) -> None:
    assert await identity.first_allowed(ALICE, ["low", "high"]) == "high"
    assert await identity.first_allowed(Caller("bob"), ["low", "high"]) is None
    asked = len(server.asked)
    assert await identity.first_allowed(Caller("bob"), ["low", "high"]) is None  # a no is remembered too
    assert len(server.asked) == asked
