"""Who calls, and which classes that caller may use: TokenReview and SubjectAccessReview, cached.

The API server is asked once for many requests. While it is away, those who were known go on, and
strangers are refused: nothing is decided on a guess.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

from tidegate.adapters.kube import ApiError, Kind, kinds
from tidegate.api.names import GROUP

V = TypeVar("V")

TTL_S: Final = 30.0
"""A revoked token or right is noticed within this."""
STRANGER_TTL_S: Final = 10.0
"""A token that was refused is looked at again after this."""
STALE_S: Final = 600.0
"""What was known is still believed for this long while the API server does not answer."""
MAX_ENTRIES: Final = 20_000
MAX_REVIEWS: Final = 16
"""Questions to the API server at once; a flood of bad tokens must not become its flood."""
MAX_WAITING: Final = 256


@dataclass(frozen=True, slots=True)
class Caller:
    """A user as the API server knows it."""

    user: str
    groups: tuple[str, ...] = ()
    uid: str = ""
    extra: tuple[tuple[str, tuple[str, ...]], ...] = ()


ANONYMOUS: Final = Caller("system:anonymous", ("system:unauthenticated",))


class InvalidTokenError(Exception):
    """The API server does not know the token."""


class UnknowableError(Exception):
    """The API server could not be asked, and nothing is known from before."""


class Reviews(Protocol):
    """What is needed of a Kubernetes client."""

    async def create(self, kind: Kind, obj: Mapping[str, Any]) -> dict[str, Any]:
        """Create a review and return it with its status."""
        ...


@dataclass(slots=True)
class _Entry(Generic[V]):
    value: V
    fresh_until: float
    stale_until: float


class Cache(Generic[V]):
    """Bounded, with single flight: who asks while the same is being asked waits for that answer."""

    def __init__(self, clock: Callable[[], float], *, ttl_s: float = TTL_S, limit: int = MAX_ENTRIES) -> None:
        self._clock, self._ttl, self._limit = clock, ttl_s, limit
        self._entries: OrderedDict[Hashable, _Entry[V]] = OrderedDict()
        self._flights: dict[Hashable, asyncio.Task[V]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def peek(self, key: Hashable) -> V | None:
        """The value, if it is in memory and fresh."""
        entry = self._entries.get(key)
        if entry is None or self._clock() >= entry.fresh_until:
            return None
        self._entries.move_to_end(key)
        return entry.value

    def put(self, key: Hashable, value: V) -> None:
        """Remember a value."""
        now = self._clock()
        self._entries[key] = _Entry(value, now + self._ttl, now + STALE_S)
        self._entries.move_to_end(key)
        while len(self._entries) > self._limit:
            self._entries.popitem(last=False)

    def forget(self, key: Hashable) -> None:
        """Remember nothing of this key."""
        self._entries.pop(key, None)

    async def get(self, key: Hashable, ask: Callable[[], Awaitable[V]]) -> V:
        """The value, from memory or by `ask`, which raises UnknowableError when it cannot know."""
        entry = self._entries.get(key)
        if entry is not None and self._clock() < entry.fresh_until:
            self._entries.move_to_end(key)
            return entry.value
        flight = self._flights.get(key)
        if flight is None:
            flight = asyncio.ensure_future(self._ask(key, ask))
            self._flights[key] = flight
            flight.add_done_callback(lambda done: self._landed(key, done))
        try:
            # Shielded: one client that leaves must not fail the others that wait.
            return await asyncio.shield(flight)
        except UnknowableError:
            if entry is not None and self._clock() < entry.stale_until:
                return entry.value
            raise

    async def _ask(self, key: Hashable, ask: Callable[[], Awaitable[V]]) -> V:
        value = await ask()
        self.put(key, value)
        return value

    def _landed(self, key: Hashable, done: "asyncio.Task[V]") -> None:
        self._flights.pop(key, None)
        if not done.cancelled():
            done.exception()  # seen here, in case everybody who waited has left


class Identity:
    """Answers who a token belongs to, and whether a caller may use a class."""

    def __init__(self, kube: Reviews, clock: Callable[[], float]) -> None:
        self._kube = kube
        self._callers: Cache[Caller] = Cache(clock)
        # Tokens of nobody are kept apart, so that a flood of them pushes no caller out.
        self._strangers: Cache[bool] = Cache(clock, ttl_s=STRANGER_TTL_S)
        self._rights: Cache[bool] = Cache(clock)
        self._turn = asyncio.Semaphore(MAX_REVIEWS)
        self._waiting = 0

    async def caller(self, authorization: str | None) -> Caller:
        """Who sent this Authorization header; nobody in particular without one.

        Raises:
            InvalidTokenError: It is not a bearer token that the API server accepts.
            UnknowableError: The API server does not answer.
        """
        if not authorization:
            return ANONYMOUS
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise InvalidTokenError("the Authorization header must be `Bearer TOKEN`")
        digest = hashlib.sha256(token.encode()).digest()  # memory holds no usable token
        if not self._strangers.peek(digest):
            try:
                return await self._callers.get(digest, lambda: self._review(token))
            except InvalidTokenError:
                self._callers.forget(digest)
                self._strangers.put(digest, True)
        raise InvalidTokenError("the bearer token is not valid for this cluster")

    async def may_use(self, caller: Caller, qos_class: str) -> bool:
        """Whether RBAC gives the caller the verb `use` on the class. Raises UnknowableError."""
        return await self._rights.get((caller, qos_class), lambda: self._access(caller, qos_class))

    async def first_allowed(self, caller: Caller, candidates: Iterable[str]) -> str | None:
        """The first of these classes that the caller may use. Raises UnknowableError."""
        for name in candidates:
            if await self.may_use(caller, name):
                return name
        return None

    async def _review(self, token: str) -> Caller:
        status = await self._create(kinds.TOKEN_REVIEW, {"token": token})
        if not status.get("authenticated"):
            raise InvalidTokenError
        user = status.get("user") or {}
        extra = user.get("extra") or {}
        return Caller(
            user=user.get("username", ""),
            groups=tuple(user.get("groups") or ()),
            uid=user.get("uid", ""),
            extra=tuple(sorted((k, tuple(v)) for k, v in extra.items())),
        )

    async def _access(self, caller: Caller, qos_class: str) -> bool:
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
        return bool((await self._create(kinds.ACCESS_REVIEW, spec)).get("allowed"))

    async def _create(self, kind: Kind, spec: dict[str, Any]) -> dict[str, Any]:
        if self._waiting >= MAX_WAITING:
            raise UnknowableError("too many callers are being looked up")
        self._waiting += 1
        try:
            async with self._turn:
                review = await self._kube.create(
                    kind, {"apiVersion": kind.api_version, "kind": kind.name, "metadata": {}, "spec": spec}
                )
        except ApiError as error:
            raise UnknowableError(f"the API server could not say who calls: {error}") from error
        finally:
            self._waiting -= 1
        status: dict[str, Any] = review.get("status") or {}
        return status
