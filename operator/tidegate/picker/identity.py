"""Who calls, and which classes that caller may use: TokenReview and SubjectAccessReview, cached.

The API server is asked once for many requests. While it is away, those who were known go on, and
strangers are refused: nothing is decided on a guess.
"""

import asyncio
import functools
import hashlib
import logging
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from tidegate.adapters.kube import ApiError, Kind, kinds
from tidegate.api.names import GROUP
from tidegate.picker.asking import Bounds, Cache, CrowdedError, Line, UnknowableError

log = logging.getLogger(__name__)

TTL_S: Final = 15.0
"""An answer counts this long. The API server itself believes a token for 10 s after it has seen it,
and a question may take 5 s: what was revoked is noticed within 30 s."""
STRANGER_TTL_S: Final = 10.0
"""A token that was refused is looked at again after this."""
ASK_S: Final = 5.0
"""An answer that takes longer is none."""
FAILURES: Final = 3
"""So many questions in a row without an answer, and the API server is away."""
PROBE_S: Final = 1.0
"""How often it is asked meanwhile whether it is back."""

MAX_TOKEN_BYTES: Final = 16 << 10
"""Of a bearer token; longer ones are refused unread."""
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""RFC 6750's syntax. What is not even that needs nobody's opinion."""
MAX_ENTRIES: Final = 20_000
MAX_BYTES: Final = 32 << 20
"""Of each of the three memories."""
_ENTRY_BYTES: Final = 500
"""What an entry costs beside its text."""

KNOWN: Final = Bounds(at_once=16, waiting=1 << 30)
"""Who is known: as many as are remembered, so neither refused nor slowed by anybody else."""

NEW_RIGHTS: Final = Bounds(at_once=16, waiting=1024, per_s=500.0, burst=1000)
"""Rights of callers whose token is good: nobody unknown comes this far."""

_PROBE: Final[Mapping[str, Any]] = {
    "user": "system:anonymous",
    "groups": ["system:unauthenticated"],
    "resourceAttributes": {"group": GROUP, "resource": "qosclasses", "verb": "use", "name": ""},
}


def strangers(per_s: int) -> Bounds:
    """Of tokens that were never seen: so many a second, after a burst of twice as many."""
    return Bounds(at_once=8, waiting=256, per_s=float(per_s), burst=2 * per_s)


STRANGERS: Final = strangers(100)


@dataclass(frozen=True, slots=True)
class Caller:
    """A user as the API server knows it, and the tenant that its gateway says it belongs to."""

    user: str
    groups: tuple[str, ...] = ()
    uid: str = ""
    extra: tuple[tuple[str, tuple[str, ...]], ...] = ()
    tenant: str = field(default="", compare=False)

    @property
    def size(self) -> int:
        """Bytes that it takes in memory, about."""
        texts = [self.user, *self.groups, self.uid, self.tenant]
        texts += [text for key, values in self.extra for text in (key, *values)]
        return _ENTRY_BYTES + sum(60 + len(text) for text in texts)


ANONYMOUS: Final = Caller("system:anonymous", ("system:unauthenticated",))


class InvalidTokenError(Exception):
    """The API server does not know the token."""


class Reviews(Protocol):
    """What is needed of a Kubernetes client."""

    async def create(self, kind: Kind, obj: Mapping[str, Any]) -> dict[str, Any]:
        """Create a review and return it with its status."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """How hard the API server may be asked about those who are not known."""

    strangers: Bounds = STRANGERS
    rights: Bounds = NEW_RIGHTS
    entries: int = MAX_ENTRIES
    max_bytes: int = MAX_BYTES


class Identity:
    """Answers who a token belongs to, and whether a caller may use a class.

    Args:
        kube: Where reviews are made.
        clock: Seconds.
        audiences: Of which a token must be for one; none: the API server's own.
        limits: Bounds.
        count: Told of each review how it ended.
    """

    def __init__(
        self,
        kube: Reviews,
        clock: Callable[[], float],
        *,
        audiences: tuple[str, ...] = (),
        limits: Limits | None = None,
        count: Callable[[str, str], None] = lambda _review, _outcome: None,
    ) -> None:
        self._kube, self._audiences, self._count = kube, audiences, count
        limits = limits or Limits()
        memory = functools.partial(
            Cache, clock, entries=limits.entries, max_bytes=limits.max_bytes, away=lambda: self.away
        )
        self._callers: Cache[Caller] = memory(ttl_s=TTL_S, size=_size_of_caller)
        # Tokens of nobody are kept apart, so that a flood of them pushes no caller out.
        self._strangers: Cache[bool] = memory(ttl_s=STRANGER_TTL_S, size=_size_of_stranger)
        self._rights: Cache[bool] = memory(ttl_s=TTL_S, size=_size_of_right)
        # And they stand in lines of their own: who is known waits for none of them.
        self._known_tokens, self._known_rights = Line(clock, KNOWN), Line(clock, KNOWN)
        self._new_tokens, self._new_rights = Line(clock, limits.strangers), Line(clock, limits.rights)
        self._failures = 0
        self._complaints: dict[Kind, int] = {}
        self._lost = asyncio.Event()

    @property
    def away(self) -> bool:
        """Whether the API server is taken to be away. Nobody is looked up then but by the probe."""
        return self._failures >= FAILURES

    def snapshot(self) -> dict[str, Any]:
        """For /debug/state."""
        return {
            "api_server_away": self.away,
            "callers": len(self._callers),
            "refused_tokens": len(self._strangers),
            "rights": len(self._rights),
            "bytes": self._callers.bytes + self._strangers.bytes + self._rights.bytes,
        }

    async def run(self) -> None:
        """Ask whether the API server is back while it is away, until cancelled."""
        while True:
            await self._lost.wait()
            await asyncio.sleep(PROBE_S)
            await self.probe()

    async def probe(self) -> None:
        """One question whose answer does not matter."""
        try:
            await self._create(kinds.ACCESS_REVIEW, _PROBE)
        except UnknowableError as error:
            log.debug("still away: %s", error)

    async def caller(self, authorization: str | None) -> Caller:
        """Who sent this Authorization header; nobody in particular without one.

        Raises:
            InvalidTokenError: It is not a bearer token that the API server accepts.
            UnknowableError: The API server does not answer, or is not asked for now.
        """
        if not authorization:
            return ANONYMOUS
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise InvalidTokenError("the Authorization header must be `Bearer TOKEN`")
        if len(token) > MAX_TOKEN_BYTES or not _TOKEN.fullmatch(token):
            raise InvalidTokenError(
                f"a bearer token is at most {MAX_TOKEN_BYTES} letters, digits and -._~+/ with = at its end"
            )
        digest = hashlib.sha256(token.encode()).digest()  # memory holds no usable token
        if self._strangers.peek(digest):
            raise InvalidTokenError(self._invalid)
        return await self._callers.get(digest, lambda known: self._review(digest, token, known))

    async def may_use(self, caller: Caller, qos_class: str) -> bool:
        """Whether RBAC gives the caller the verb `use` on the class. Raises UnknowableError."""
        return await self._rights.get(
            (caller, qos_class), lambda known: self._access(caller, qos_class, known)
        )

    async def first_allowed(self, caller: Caller, candidates: Iterable[str]) -> str | None:
        """The first of these classes that the caller may use. Raises UnknowableError."""
        for name in candidates:
            if await self.may_use(caller, name):
                return name
        return None

    @property
    def _invalid(self) -> str:
        of = f" with the audience {' or '.join(self._audiences)}" if self._audiences else ""
        return f"the bearer token is not valid for this cluster{of}"

    async def _review(self, digest: bytes, token: str, known: bool) -> Caller:
        spec: dict[str, Any] = {"token": token}
        if self._audiences:
            spec["audiences"] = list(self._audiences)
        status = await self._ask(kinds.TOKEN_REVIEW, spec, self._known_tokens if known else self._new_tokens)
        good = bool(status.get("authenticated"))
        if good and self._audiences:
            # An authenticator that knows no audiences says none: such a token is the API server's own.
            good = not set(self._audiences).isdisjoint(status.get("audiences") or ())
        self._count("token", "good" if good else "bad")
        if not good:
            self._callers.forget(digest)
            self._strangers.put(digest, True)
            raise InvalidTokenError(self._invalid)
        user = status.get("user") or {}
        extra = user.get("extra") or {}
        return Caller(
            user=user.get("username", ""),
            groups=tuple(user.get("groups") or ()),
            uid=user.get("uid", ""),
            extra=tuple(sorted((k, tuple(v)) for k, v in extra.items())),
        )

    async def _access(self, caller: Caller, qos_class: str, known: bool) -> bool:
        resource = {"group": GROUP, "resource": "qosclasses", "verb": "use", "name": qos_class}
        spec: dict[str, Any] = {
            "user": caller.user,
            "groups": list(caller.groups),
            "resourceAttributes": resource,
        }
        if caller.uid:
            spec["uid"] = caller.uid
        if caller.extra:
            spec["extra"] = {k: list(v) for k, v in caller.extra}
        line = self._known_rights if known else self._new_rights
        allowed = bool((await self._ask(kinds.ACCESS_REVIEW, spec, line)).get("allowed"))
        self._count("access", "good" if allowed else "bad")
        return allowed

    async def _ask(self, kind: Kind, spec: Mapping[str, Any], line: Line) -> dict[str, Any]:
        what = "token" if kind is kinds.TOKEN_REVIEW else "access"
        if self.away:
            raise UnknowableError("the API server, which knows who calls, does not answer")
        try:
            async with line.turn():
                return await self._create(kind, spec)
        except CrowdedError:
            self._count(what, "crowded")
            raise
        except UnknowableError:
            self._count(what, "failed")
            raise

    async def _create(self, kind: Kind, spec: Mapping[str, Any]) -> dict[str, Any]:
        review = {"apiVersion": kind.api_version, "kind": kind.name, "metadata": {}, "spec": spec}
        try:
            async with asyncio.timeout(ASK_S):
                answer = await self._kube.create(kind, review)
        except (ApiError, TimeoutError) as error:
            # One that is refused for what it says is no sign that others will be.
            answered = isinstance(error, ApiError) and 400 <= error.status < 500 and error.status != 429
            self._heard(answered)
            self._complain(kind, error, answered)
            # Whoever asks may be anybody: where the API server is and what it says is for the log.
            raise UnknowableError("the API server does not answer who calls; try again") from error
        self._heard(answered=True)
        self._complaints.pop(kind, None)
        status: dict[str, Any] = answer.get("status") or {}
        return status

    def _complain(self, kind: Kind, error: ApiError | TimeoutError, answered: bool) -> None:
        """Log why there is no answer: as a warning once, until there is one or it is another reason."""
        status = error.status if isinstance(error, ApiError) else -1
        level = logging.DEBUG if self._complaints.get(kind) == status else logging.WARNING
        self._complaints[kind] = status
        does = "refuses to be asked" if answered else "gave no answer"
        text = str(error) or f"no answer within {ASK_S:g} s"
        log.log(level, "the API server %s, which strangers get 503 for: %s", does, text)

    def _heard(self, answered: bool) -> None:
        was, self._failures = self.away, 0 if answered else self._failures + 1
        if self.away and not was:
            log.warning("the API server does not answer: callers that are known go on, others get 503")
            self._lost.set()
        elif was and not self.away:
            log.info("the API server answers again")
            self._lost.clear()


def _size_of_caller(_key: Hashable, caller: Caller) -> int:
    return caller.size


def _size_of_stranger(_key: Hashable, _value: bool) -> int:
    return _ENTRY_BYTES


def _size_of_right(key: Hashable, _value: bool) -> int:
    caller: Caller = key[0]  # type: ignore[index]  # (caller, class)
    return caller.size
