"""What happens to one request: who calls, which model and class, wait for room, hand over, watch.

Free of gRPC: it is given a way to read Envoy's messages and one to write ours, and may be cancelled
at any await. Whatever happens, the request's room is given back once, at the end.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from tidegate.api.identity import IdentitySources
from tidegate.core.flow import Ask, Dispatch, ModelKey, Refused
from tidegate.core.types import QoSClass
from tidegate.facts.endpoints import ServedModel
from tidegate.picker import classify
from tidegate.picker.asking import CrowdedError, UnknowableError
from tidegate.picker.credentials import AUTHORIZATION, BadCredentialsError, Credentials
from tidegate.picker.desk import Desk
from tidegate.picker.exchange import DEFAULT_MAX_BODY, Exchange, Outcome, Phase
from tidegate.picker.identity import ANONYMOUS, Caller, Identity, InvalidTokenError
from tidegate.picker.measure.record import unix_s
from tidegate.picker.protocols import (
    KSERVE,
    OPENAI,
    BadRequestError,
    Wants,
    model_entry,
    model_list,
    read_body,
    with_priority,
)
from tidegate.render.envoy import ATTEMPT_HEADER, ATTEMPTS, DESTINATION_HEADER, KEPT_BODY
from tidegate.render.measure import ARRIVED_HEADER, REQUEST_HEADER

log = logging.getLogger(__name__)

Read = Callable[[], Awaitable[pb.ProcessingRequest | None]]
"""The next message of Envoy, None at the end of the stream."""
Write = Callable[[pb.ProcessingResponse], Awaitable[None]]

VLLM_PRIORITY_HEADER = "x-vllm-priority"
_BINARY_HEADER = "inference-header-content-length"


class _RefusedError(Exception):
    """Ends a request with an error answer."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.param, self.headers = param, headers


class RecalledError(Exception):
    """Ends an exchange whose request is taken back from its engine: Envoy asks again."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How requests are treated. `qos` False gives every class the same engine priority."""

    qos: bool = True
    trust_class_header: bool = False
    max_body: int = DEFAULT_MAX_BODY
    max_receiving: int = 256 << 20
    """Bytes of bodies that may be on their way in at once."""
    max_recalls: int = 2
    """How often a request may be taken back from its engine."""
    start_patience_s: float = 5.0
    """How long a request is held while the first facts are still being listed."""
    sources: IdentitySources = field(default_factory=IdentitySources)
    """Where a caller's identity may come from."""


@dataclass(slots=True)
class _Request:
    """One request as far as it is known."""

    number: int
    exchange: Exchange
    caller: Caller = ANONYMOUS
    model: ServedModel | None = None
    qos_class: str = ""
    dispatched: bool = False
    recalled: bool = False
    counted: int = 0
    """Bytes that it has counted as being received."""
    pending: "asyncio.Task[pb.ProcessingRequest | None] | None" = field(default=None)

    @property
    def json_length(self) -> int | None:
        text = self.exchange.headers.get(_BINARY_HEADER, "")
        return int(text) if text.isdecimal() else None


class Service:
    """Serves exchanges. One for all streams of a picker."""

    def __init__(self, desk: Desk, identity: Identity, settings: Settings | None = None) -> None:
        self.desk, self.identity = desk, identity
        self.settings = settings or Settings()
        self.credentials = Credentials(self.settings.sources)
        self.receiving = 0

    async def serve(self, read: Read, write: Write) -> None:
        """Serve one exchange from its first message to the end of its stream."""
        request = _Request(self.desk.number(), Exchange(self.settings.max_body))
        try:
            await self._serve(request, read, write)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if not request.recalled or (task is not None and task.uncancel() > 0):
                raise
            raise RecalledError("taken back from its engine; it may be tried again") from error
        finally:
            self._end(request)

    async def _serve(self, request: _Request, read: Read, write: Write) -> None:
        exchange = request.exchange
        try:
            if not await self._receive(request, read, write):
                return
            if exchange.way.wants is not Wants.HEALTH:
                await self._facts()
            if exchange.way.wants is Wants.INFERENCE:
                if not await self._infer(request, read, write):
                    return
            else:
                await self._inform(request, write)
        except _RefusedError as no:
            replies = exchange.refuse(no.status, no.message, code=no.code, param=no.param, **no.headers)
            await _write_all(write, replies)
            return
        while not exchange.done:
            message = await self._next(request, read)
            if message is None:
                return
            await _write_all(write, exchange.feed(message))
            if exchange.elsewhere:
                self.desk.served(request.number, exchange.elsewhere)

    def _end(self, request: _Request) -> None:
        """Give everything back. Runs once, whatever ended the exchange."""
        if request.pending is not None:
            request.pending.cancel()
        self.receiving -= request.counted
        outcome = request.exchange.outcome(request.dispatched)
        if request.recalled:
            outcome = Outcome.RECALLED
        whole = outcome is Outcome.ANSWERED and request.exchange.status < 400
        self.desk.end(request.number, whole=whole)
        if request.exchange.way.wants is Wants.INFERENCE:
            key: ModelKey = request.model.key if request.model else ("", "")
            self.desk.metrics.ended(key, request.qos_class, outcome.value)

    async def _facts(self) -> None:
        """Wait for the first facts: a picker that just started knows no model, which is no 404."""
        if self.desk.informed.is_set():
            return
        try:
            await asyncio.wait_for(self.desk.informed.wait(), self.settings.start_patience_s)
        except TimeoutError as error:
            message = "the picker has just started and does not know the models yet"
            raise _RefusedError(503, "starting", message, retry_after="1") from error

    # ── the steps ───────────────────────────────────────────────────────────────────────────────

    async def _receive(self, request: _Request, read: Read, write: Write) -> bool:
        """Take the whole request in, the caller checked before its body. False: it is over."""
        exchange = request.exchange
        while exchange.phase in (Phase.HEADERS, Phase.BODY):
            first = exchange.phase is Phase.HEADERS
            message = await read()
            if message is None:
                return False
            await _write_all(write, exchange.feed(message))
            if first and not exchange.done:
                request.caller = await self._identify(exchange)
            self.receiving += exchange.received - request.counted
            request.counted = exchange.received
            if self.receiving > self.settings.max_receiving:
                text = "more is being uploaded than this gateway holds; try again in a moment"
                raise _RefusedError(503, "memory_full", text, retry_after="1")
        return exchange.phase is Phase.HELD

    async def _identify(self, exchange: Exchange) -> Caller:
        if self.settings.trust_class_header:
            return ANONYMOUS
        try:
            shown = self.credentials.presented(exchange.headers, exchange.repeated)
            if isinstance(shown, Caller):
                return shown
            return await self.identity.caller(shown.authorization)
        except BadCredentialsError as error:
            asks = {"www_authenticate": "Bearer"} if error.status == 401 else {}
            raise _RefusedError(error.status, error.code, str(error), **asks) from error
        except InvalidTokenError as error:
            raise _RefusedError(401, "invalid_token", str(error), www_authenticate="Bearer") from error
        except UnknowableError as error:
            raise _unknown(error) from error

    async def _infer(self, request: _Request, read: Read, write: Write) -> bool:
        """Queue a request and hand it over. False: its client has left meanwhile."""
        exchange = request.exchange
        try:
            body = read_body(exchange.way, exchange.body, request.json_length)
        except BadRequestError as error:
            raise _RefusedError(error.status, "bad_request", str(error), param=error.param) from error
        model = request.model = self._find(exchange, body.model)
        qos = await self._classify(request, model)
        tenant = classify.tenant(qos, request.caller, model, exchange.headers)
        ask = Ask(
            id=request.number,
            model=model.key,
            qos_class=qos.name,
            prompt_tokens=body.prompt_tokens,
            output_tokens=self.desk.book.outputs.expected(model.key, qos.name, tenant, body.output_tokens),
            size=exchange.received,
            streamed=body.streamed,
            tenant=tenant,
            recallable=self._comes_again(exchange, streamed=body.streamed),
            subset=exchange.subset,
        )
        verdict = await self._wait(request, ask, read)
        if verdict is None:
            return False
        if isinstance(verdict, Refused):
            self.desk.book.refused(ask, self.desk.promised(ask), self.desk.clock())
            after = str(verdict.retry_after_s)
            raise _RefusedError(verdict.status, verdict.reason, verdict.message, retry_after=after)
        request.dispatched = True
        if ask.recallable:
            self._offer(request)
        await self._hand_over(request, model, qos, verdict, write)
        return True

    def _comes_again(self, exchange: Exchange, *, streamed: bool) -> bool:
        """Whether Envoy sends it again if it is aborted: it counts attempts, and has kept the body."""
        attempt = exchange.headers.get(ATTEMPT_HEADER, "")
        few = attempt.isdecimal() and int(attempt) <= self.settings.max_recalls
        return few and not streamed and exchange.received <= KEPT_BODY

    def _offer(self, request: _Request) -> None:
        """Let the desk take it back while its answer has not begun."""
        task = asyncio.current_task()

        def abort() -> bool:
            sent = request.exchange.phase is Phase.SENT
            request.recalled = sent and task is not None and task.cancel()
            return request.recalled

        self.desk.may_recall(request.number, abort)

    def _find(self, exchange: Exchange, name: str) -> ServedModel:
        model = self.desk.world.find(name)
        if model is None:
            raise _RefusedError(404, "model_not_found", f"the model {name!r} does not exist", param="model")
        if model.protocol != exchange.protocol:
            paths = {OPENAI: "/v1/chat/completions", KSERVE: f"/v2/models/{name}/infer"}
            raise _RefusedError(
                400,
                "protocol_mismatch",
                f"the model {name!r} speaks {model.protocol} and not {exchange.protocol}; "
                f"ask {paths.get(model.protocol, 'its own paths')}",
            )
        return model

    async def _classify(self, request: _Request, model: ServedModel) -> QoSClass:
        """The request's class. Raises _RefusedError(403) with the reason when there is none."""
        classes = self.desk.world.classes
        named = classify.named_class(request.exchange.headers)
        if self.settings.trust_class_header:
            chosen = classify.trusted(model, named, classes)
        else:
            chosen = await self._allowed(request.caller, model, named)
        if isinstance(chosen, classify.Denied):
            raise _RefusedError(403, "class_not_allowed", chosen.message)
        request.qos_class = chosen
        return classes[chosen]

    async def _allowed(self, caller: Caller, model: ServedModel, named: str | None) -> str | classify.Denied:
        found = classify.candidates(model, named)
        if isinstance(found, classify.Denied):
            return found
        try:
            chosen = await self.identity.first_allowed(caller, found)
        except UnknowableError as error:
            raise _unknown(error) from error
        if chosen is not None and chosen in self.desk.world.classes:
            return chosen
        return classify.Denied(
            f"{caller.user} may not use class {' or '.join(found)}: RBAC must give the verb `use` on "
            f"qosclasses/{found[0]} of tidegate.dev"
        )

    async def _usable(self, request: _Request, model: ServedModel) -> bool:
        """Whether the caller may use any class of the model: what it may not is not shown either."""
        if self.settings.trust_class_header:
            return True
        return not isinstance(await self._allowed(request.caller, model, None), classify.Denied)

    async def _wait(self, request: _Request, ask: Ask, read: Read) -> Dispatch | Refused | None:
        """Wait for the verdict, or for the client to leave: None."""
        future = self.desk.submit(ask)
        # From here the queue counts its bytes.
        self.receiving -= request.counted
        request.counted = 0
        while not future.done():
            if request.pending is None:
                request.pending = asyncio.ensure_future(read())
            await asyncio.wait((future, request.pending), return_when=asyncio.FIRST_COMPLETED)
            if request.pending.done() and not future.done():
                message = await self._next(request, read)
                if message is None:
                    return None
                request.exchange.feed(message)  # nothing may come now: it says what is wrong
        return future.result()

    async def _hand_over(
        self, request: _Request, model: ServedModel, qos: QoSClass, to: Dispatch, write: Write
    ) -> None:
        exchange, headers, body = request.exchange, {REQUEST_HEADER: self._enter(request, model, to)}, None
        if model.protocol == OPENAI:
            headers[VLLM_PRIORITY_HEADER] = str(classify.vllm_priority(qos) if self.settings.qos else 0)
        elif model.engine == "Triton":
            level = (
                classify.triton_priority(qos.name, model, self.desk.world.classes) if self.settings.qos else 1
            )
            body, length = with_priority(exchange.body, level, request.json_length)
            if length is not None:
                headers[_BINARY_HEADER] = str(length)
        # The token is the caller's key to the cluster; no engine needs it.
        kept = {DESTINATION_HEADER, *headers}
        if self.settings.trust_class_header:
            kept.add(AUTHORIZATION)
        drop = tuple(n for n in self.credentials.hidden(exchange.headers) if n not in kept)
        named = (to.address, *to.fallbacks)
        await _write_all(write, exchange.send(*named, headers=headers, drop=drop, body=body))

    def _enter(self, request: _Request, model: ServedModel, to: Dispatch) -> str:
        """Enter the request in the book of what is measured; returns what its log entry will be known by."""
        desk, headers = self.desk, request.exchange.headers
        return desk.book.handed(
            to.ask,
            desk.promised(to.ask),
            desk.clock(),
            arrived_s=unix_s(headers.get(ARRIVED_HEADER, "")),
            last=headers.get(ATTEMPT_HEADER) == str(ATTEMPTS + 1),
            gpus=model.gpus,
        )

    async def _next(self, request: _Request, read: Read) -> pb.ProcessingRequest | None:
        pending, request.pending = request.pending, None
        return await (pending if pending is not None else read())

    # ── what is answered here ───────────────────────────────────────────────────────────────────

    async def _inform(self, request: _Request, write: Write) -> None:
        exchange, way = request.exchange, request.exchange.way
        world = self.desk.world
        if way.wants is Wants.HEALTH:
            await _write_all(write, exchange.answer(200, b"{}", reason="health"))
        elif way.wants is Wants.MODEL_READY:
            model = self._find(exchange, way.model or "")
            ready = any(e.ready and not e.draining for e in world.endpoints if e.model == model.key)
            if not ready:
                raise _RefusedError(503, "not_ready", f"no replica of {way.model!r} is ready")
            await _write_all(write, exchange.answer(200, b"{}", reason="ready"))
        elif way.wants is Wants.MODEL_LIST:
            names = [
                (name, world.models[key].created_s)
                for name, key in sorted(world.by_name.items())
                if await self._usable(request, world.models[key])
            ]
            await _write_all(write, exchange.answer(200, model_list(names), reason="models"))
        elif way.wants is Wants.MODEL:
            entry = world.find(way.model or "")
            if entry is None or not await self._usable(request, entry):
                raise _RefusedError(404, "model_not_found", f"the model {way.model!r} does not exist")
            body = model_entry(way.model or "", entry.created_s)
            await _write_all(write, exchange.answer(200, body, reason="model"))
        else:
            path = exchange.headers.get(":path", "").partition("?")[0]
            method = exchange.headers.get(":method", "")
            raise _RefusedError(404, "unknown_url", f"there is no {method} {path} here")


def _unknown(error: UnknowableError) -> _RefusedError:
    status, code = (429, "too_many_unknown") if isinstance(error, CrowdedError) else (503, "identity_unknown")
    return _RefusedError(status, code, str(error), retry_after=str(error.retry_after_s))


async def _write_all(write: Write, replies: list[pb.ProcessingResponse]) -> None:
    for reply in replies:
        await write(reply)
