"""Who calls: what is asked, what is remembered, and what happens when nobody answers."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import pytest

from support.wait import becomes
from tidegate.adapters.kube import ApiError, Kind
from tidegate.picker import asking
from tidegate.picker.asking import STALE_S, Bounds, Cache, CrowdedError, Line, UnknowableError
from tidegate.picker.identity import (
    ANONYMOUS,
    ASK_S,
    FAILURES,
    MAX_TOKEN_BYTES,
    STRANGERS,
    TTL_S,
    Caller,
    Identity,
    InvalidTokenError,
    Limits,
)


class Server:
    """An API server that knows some tokens and lets `alice` use `high`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.error: ApiError | None = None
        self.asked: list[str] = []
        self.at_once = self.peak = 0
        self.valid = {"good": "alice", "other": "bob"}
        self.rights = {("alice", "high")}
        self.audiences: list[str] | None = None
        """Of which a token is good; None: the authenticator knows of none."""
        self.specs: list[dict[str, Any]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def create(self, kind: Kind, obj: Mapping[str, Any]) -> dict[str, Any]:
        self.asked.append(kind.name)
        self.specs.append(obj["spec"])
        self.at_once += 1
        self.peak = max(self.peak, self.at_once)
        try:
            await asyncio.sleep(0)
            await self.gate.wait()
        finally:
            self.at_once -= 1
        if self.error is not None:
            raise self.error
        return {"status": (self._token if kind.name == "TokenReview" else self._access)(obj["spec"])}

    def _token(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        user = self.valid.get(spec["token"])
        if user is None:
            return {"authenticated": False}
        found: dict[str, Any] = {
            "authenticated": True,
            "user": {"username": user, "groups": ["g"], "extra": {"k": ["v"]}},
        }
        if self.audiences is not None:
            found["audiences"] = [a for a in spec.get("audiences", ()) if a in self.audiences]
        return found

    def _access(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        attributes = spec["resourceAttributes"]
        assert attributes == {
            "group": "tidegate.dev",
            "resource": "qosclasses",
            "verb": "use",
            "name": attributes["name"],
        }
        return {"allowed": (spec["user"], attributes["name"]) in self.rights}

    def lose(self) -> None:
        self.error = ApiError(0, "ConnectionFailed", "refused")


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def identity(server: Server) -> Identity:
    return Identity(server, lambda: server.now)


ALICE = Caller("alice", ("g",), "", (("k", ("v",)),))


async def landed() -> None:
    """Let what runs in the background end."""
    for _ in range(10):
        await asyncio.sleep(0)


# ── what is asked ───────────────────────────────────────────────────────────────────────────────


async def test_a_token_is_looked_up_once_until_it_is_old(server: Server, identity: Identity) -> None:
    for _ in range(3):
        assert await identity.caller("Bearer good") == ALICE
    assert server.asked == ["TokenReview"]
    server.now = TTL_S
    assert await identity.caller("bearer  good") == ALICE
    assert len(server.asked) == 2


async def test_what_is_in_use_is_asked_for_again_before_it_is_old(server: Server, identity: Identity) -> None:
    await identity.caller("Bearer good")
    server.now = TTL_S * 0.9
    server.gate.clear()
    assert await identity.caller("Bearer good") == ALICE  # at once
    await landed()
    assert len(server.asked) == 2
    server.gate.set()
    await landed()
    server.now = TTL_S * 1.5
    assert await identity.caller("Bearer good") == ALICE
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


NO_TOKENS = [
    "Basic abc",
    "Bearer",
    "Bearer ",
    "Bearer a b",
    "Bearer a,b",
    "Bearer é",
    "Bearer =",
    "Bearer \x00",
]


@pytest.mark.parametrize("header", [*NO_TOKENS, "Bearer " + "a" * (MAX_TOKEN_BYTES + 1)])
async def test_what_is_no_token_is_refused_unasked(server: Server, identity: Identity, header: str) -> None:
    with pytest.raises(InvalidTokenError):
        await identity.caller(header)
    assert server.asked == []


async def test_a_bad_token_is_remembered_for_a_while(server: Server, identity: Identity) -> None:
    for _ in range(3):
        with pytest.raises(InvalidTokenError):
            await identity.caller("Bearer bad")
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("audiences", "good"),
    [(["tidegate"], True), (["other", "tidegate"], True), (["https://kubernetes"], False), (None, False)],
    ids=["ours", "ours too", "another", "an authenticator without audiences"],
)
async def test_a_token_must_be_for_our_audience(
    server: Server, audiences: list[str] | None, good: bool
) -> None:
    server.audiences = audiences
    identity = Identity(server, lambda: server.now, audiences=("tidegate", "gateway"))
    if good:
        assert await identity.caller("Bearer good") == ALICE
    else:
        with pytest.raises(InvalidTokenError, match="audience tidegate or gateway"):
            await identity.caller("Bearer good")
    assert server.specs[0]["audiences"] == ["tidegate", "gateway"]


async def test_without_audiences_the_api_server_s_own_counts(server: Server, identity: Identity) -> None:
    await identity.caller("Bearer good")
    assert "audiences" not in server.specs[0]


async def test_rights(server: Server, identity: Identity) -> None:
    assert await identity.first_allowed(ALICE, ["low", "high"]) == "high"
    assert await identity.first_allowed(Caller("bob"), ["low", "high"]) is None
    asked = len(server.asked)
    assert await identity.first_allowed(Caller("bob"), ["low", "high"]) is None  # a no is remembered too
    assert len(server.asked) == asked


async def test_reviews_are_counted(server: Server) -> None:
    counted: list[tuple[str, str]] = []
    identity = Identity(server, lambda: server.now, count=lambda *what: counted.append(what))
    await identity.caller("Bearer good")
    with pytest.raises(InvalidTokenError):
        await identity.caller("Bearer bad")
    await identity.first_allowed(ALICE, ["low", "high"])
    server.lose()
    with pytest.raises(UnknowableError):
        await identity.caller("Bearer other")
    assert counted == [
        ("token", "good"),
        ("token", "bad"),
        ("access", "bad"),
        ("access", "good"),
        ("token", "failed"),
    ]


# ── revoked ─────────────────────────────────────────────────────────────────────────────────────


def test_what_was_revoked_is_noticed_within_30_s() -> None:
    assert 10.0 + ASK_S + TTL_S <= 30.0  # the API server's own memory, the question, and ours


async def test_a_revoked_token_ends_with_its_time(server: Server, identity: Identity) -> None:
    await identity.caller("Bearer good")
    del server.valid["good"]
    server.now = TTL_S
    with pytest.raises(InvalidTokenError):
        await identity.caller("Bearer good")
    server.lose()
    server.now = TTL_S + 11.0
    with pytest.raises(UnknowableError):  # and is not believed later for having once been good
        await identity.caller("Bearer good")


async def test_a_token_revoked_while_it_is_in_use_is_forgotten(server: Server, identity: Identity) -> None:
    await identity.caller("Bearer good")
    del server.valid["good"]
    server.now = TTL_S * 0.9
    assert await identity.caller("Bearer good") == ALICE  # and asks in the background
    await landed()
    with pytest.raises(InvalidTokenError):
        await identity.caller("Bearer good")
    assert len(server.asked) == 2


async def test_a_revoked_right_ends_with_its_time(server: Server, identity: Identity) -> None:
    assert await identity.may_use(ALICE, "high")
    server.rights.clear()
    assert await identity.may_use(ALICE, "high")
    server.now = TTL_S
    assert not await identity.may_use(ALICE, "high")


async def test_an_answer_is_as_old_as_its_question(server: Server, identity: Identity) -> None:
    server.gate.clear()
    asking_now = asyncio.create_task(identity.may_use(ALICE, "high"))
    await landed()
    server.now = 4.0  # it answers late, from what it knew then
    server.gate.set()
    assert await asking_now
    server.rights.clear()
    server.now = TTL_S
    assert not await identity.may_use(ALICE, "high")


# ── the API server away ─────────────────────────────────────────────────────────────────────────


async def test_the_known_go_on_while_the_api_server_is_away(server: Server, identity: Identity) -> None:
    await identity.caller("Bearer good")
    assert await identity.may_use(ALICE, "high")
    server.lose()
    server.now = TTL_S + 1
    assert await identity.caller("Bearer good") == ALICE
    assert await identity.may_use(ALICE, "high")
    with pytest.raises(UnknowableError, match="API server"):
        await identity.caller("Bearer other")
    with pytest.raises(UnknowableError):
        await identity.may_use(ALICE, "low")
    server.now = STALE_S
    with pytest.raises(UnknowableError):
        await identity.caller("Bearer good")


async def test_once_it_is_known_to_be_away_only_the_probe_asks(server: Server, identity: Identity) -> None:
    await identity.caller("Bearer good")
    server.lose()
    server.now = TTL_S
    for n in range(FAILURES):
        with pytest.raises(UnknowableError):
            await identity.caller(f"Bearer new{n}")
    assert identity.away
    assert identity.snapshot()["api_server_away"]
    asked = len(server.asked)
    assert await identity.caller("Bearer good") == ALICE
    with pytest.raises(UnknowableError, match="does not answer"):
        await identity.caller("Bearer other")
    assert len(server.asked) == asked
    await identity.probe()
    assert identity.away
    server.error = None
    await identity.probe()
    assert not identity.away
    assert (await identity.caller("Bearer other")).user == "bob"
    assert len(server.asked) == asked + 3


async def test_the_probe_runs_only_while_it_is_away(
    server: Server, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.picker.identity.PROBE_S", 0.0)
    task = asyncio.create_task(identity.run())
    await landed()
    assert server.asked == []
    server.lose()
    for n in range(FAILURES):
        with pytest.raises(UnknowableError):
            await identity.caller(f"Bearer new{n}")
    server.error = None
    await becomes(lambda: not identity.away, "the API server to be back")
    await landed()
    assert (asked := len(server.asked)) > FAILURES
    await landed()
    assert len(server.asked) == asked
    task.cancel()


@pytest.mark.parametrize(
    ("status", "away"),
    [(0, True), (500, True), (503, True), (429, True), (400, False), (403, False), (422, False)],
)
async def test_which_errors_mean_away(server: Server, identity: Identity, status: int, away: bool) -> None:
    server.error = ApiError(status, "Reason", "words")
    for n in range(FAILURES):
        with pytest.raises(UnknowableError, match="does not answer who calls"):
            await identity.caller(f"Bearer new{n}")
    assert identity.away is away


@pytest.mark.parametrize("status", [0, 403, 500])
async def test_why_it_does_not_answer_is_for_the_log_alone(
    server: Server, identity: Identity, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    text = "POST https://10.96.0.1:443/apis/x: serviceaccount tidegate-picker cannot create tokenreviews"
    server.error = ApiError(status, "Forbidden", text)
    for n in range(2):
        with pytest.raises(UnknowableError) as error:
            await identity.caller(f"Bearer new{n}")
        assert str(error.value) == "the API server does not answer who calls; try again"
    told = [r for r in caplog.records if text in r.getMessage()]
    assert [r.levelname for r in told if r.levelno >= logging.WARNING] == ["WARNING"]  # once
    server.error = None
    await identity.caller("Bearer good")
    server.error = ApiError(status, "Forbidden", text)
    with pytest.raises(UnknowableError):
        await identity.caller("Bearer other")
    assert sum(text in r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING) == 2


async def test_who_is_known_waits_only_so_long_for_news(
    server: Server, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "PATIENCE_S", 0.01)
    await identity.caller("Bearer good")
    server.now = TTL_S
    server.gate.clear()  # it took the question and says nothing
    assert await identity.caller("Bearer good") == ALICE
    server.gate.set()
    await landed()


async def test_no_answer_in_time_is_none(
    server: Server, identity: Identity, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tidegate.picker.identity.ASK_S", 0.01)
    server.gate.clear()
    with pytest.raises(UnknowableError, match="does not answer who calls; try again"):
        await identity.caller("Bearer good")
    assert "no answer within" in caplog.text


# ── floods ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_flood_of_bad_tokens_asks_little_and_leaves_the_known_alone(
    server: Server, identity: Identity
) -> None:
    await identity.caller("Bearer good")
    sent, waits = 3_000, STRANGERS.at_once + STRANGERS.waiting
    flood = [identity.caller(f"Bearer bad-{i}") for i in range(sent)]
    ends = await asyncio.gather(*flood, return_exceptions=True)
    refused = sum(isinstance(e, InvalidTokenError) for e in ends)
    crowded = [e for e in ends if isinstance(e, CrowdedError)]
    assert refused + len(crowded) == sent
    assert refused <= min(waits, STRANGERS.burst)
    assert len(server.asked) == 1 + refused
    assert server.peak <= STRANGERS.at_once
    assert all(1 <= e.retry_after_s <= 10 for e in crowded)
    # No token is left in the bucket, and still who is known is looked at again at its time.
    server.now = TTL_S - 1e-6
    asked = len(server.asked)
    assert await identity.caller("Bearer good") == ALICE
    await landed()
    assert len(server.asked) == asked + 1


async def test_a_flood_that_lasts_asks_so_many_a_second(server: Server, identity: Identity) -> None:
    for step in range(100):  # 10 s
        server.now = step * 0.1
        await asyncio.gather(
            *(identity.caller(f"Bearer bad-{step}-{i}") for i in range(50)), return_exceptions=True
        )
    assert len(server.asked) <= STRANGERS.burst + 10 * STRANGERS.per_s
    assert len(server.asked) >= 10 * STRANGERS.per_s  # and strangers are not shut out


async def test_who_is_known_is_not_kept_waiting_by_strangers_in_line(
    server: Server, identity: Identity
) -> None:
    await identity.caller("Bearer good")
    server.now = TTL_S
    server.gate.clear()
    flood = [asyncio.create_task(identity.caller(f"Bearer bad-{i}")) for i in range(100)]
    await landed()
    known = asyncio.create_task(identity.caller("Bearer good"))
    await landed()
    assert server.specs[-1] == {"token": "good"}  # put at once, past a full line
    server.gate.set()
    assert await known == ALICE
    await asyncio.gather(*flood, return_exceptions=True)


async def test_memory_is_bounded_in_entries_and_bytes(server: Server) -> None:
    limits = Limits(Bounds(8, 1000), Bounds(8, 1000), entries=50, max_bytes=10_000)
    identity = Identity(server, lambda: server.now, limits=limits)
    server.valid |= {f"t{i}": f"user-{i}" + "x" * (i % 7) * 100 for i in range(300)}
    for i in range(300):
        await identity.caller(f"Bearer t{i}")
        with pytest.raises(InvalidTokenError):
            await identity.caller(f"Bearer bad{i}")
        await identity.may_use(Caller(f"user-{i}", ("g",) * 5), "high")
        now = identity.snapshot()
        assert max(now["callers"], now["refused_tokens"], now["rights"]) <= 50
        assert now["bytes"] <= 3 * 10_000
    assert now["callers"] >= 5


async def test_an_answer_larger_than_all_memory_pushes_nobody_out(server: Server) -> None:
    cache: Cache[str] = Cache(
        lambda: 0.0, ttl_s=1.0, entries=10, max_bytes=100, size=lambda _key, value: len(value)
    )
    cache.put("a", "x" * 60)
    cache.put("b", "x" * 101)
    assert (cache.peek("a"), cache.peek("b"), cache.bytes) == ("x" * 60, None, 60)
    cache.put("a", "x" * 10)
    cache.put("c", "x" * 95)
    assert (cache.peek("a"), cache.peek("c"), cache.bytes) == (None, "x" * 95, 95)


async def test_a_line_says_when_to_come_again() -> None:
    now = 0.0
    line = Line(lambda: now, Bounds(at_once=10, waiting=10, per_s=0.5, burst=1))
    async with line.turn():
        pass
    with pytest.raises(CrowdedError) as error:
        async with line.turn():
            pass
    assert error.value.retry_after_s == 2
    now = 2.0
    async with line.turn():
        pass
