"""What happens to one request: who calls, which model and class, wait for room, hand over, watch.

Free of gRPC: it is given a way to read Envoy's messages and one to write ours, and may be cancelled
at any await. Whatever happens, the request's room is given back once, at the end.
"""

import asyncio
import logging
import math
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from tidegate import __version__
from tidegate.api.identity import IdentitySources
from tidegate.core import subset
from tidegate.core.flow import Ask, Dispatch, ModelKey, Refused
from tidegate.core.types import QoSClass
from tidegate.facts.endpoints import ServedModel
from tidegate.picker import classify
from tidegate.picker.asking import CrowdedError, UnknowableError
from tidegate.picker.credentials import AUTHORIZATION, BadCredentialsError, Credentials
from tidegate.picker.desk import Desk
from tidegate.picker.errors import KSERVE, OPENAI, Code, RefusedError
from tidegate.picker.exchange import DEFAULT_MAX_BODY, ENDPOINT_HEADER, Exchange, Outcome, Phase, whole
from tidegate.picker.handover import HandOver, hand_over, json_length
from tidegate.picker.identity import ANONYMOUS, Caller, Identity, InvalidTokenError
from tidegate.picker.kservegrpc import read_message
from tidegate.picker.measure.record import unix_s
from tidegate.picker.protocols import (
    Body,
    ListedModel,
    Reads,
    Wants,
    model_entry,
    model_list,
    read_body,
    read_form,
    server_metadata,
)
from tidegate.render.envoy import ATTEMPT_HEADER, ATTEMPTS, DESTINATION_HEADER, KEPT_BODY, RETRIES_HEADER
from tidegate.render.measure import ARRIVED_HEADER, REQUEST_HEADER

log = logging.getLogger(__name__)

Read = Callable[[], Awaitable[pb.ProcessingRequest | None]]
"""The next message of Envoy, None at the end of the stream."""
Write = Callable[[pb.ProcessingResponse], Awaitable[None]]

CLASS_HEADER: Final = "x-tidegate-qos"
QUEUE_HEADER: Final = "x-tidegate-queue-seconds"
"""What a response says of its request: the class that it had, and its wait."""


class RecalledError(Exception):
    """Ends an exchange whose request is taken back from its engine: Envoy asks again."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How requests are treated. `qos` False gives every class the same engine priority.

    `show_endpoint`: responses name the engine's address, which is of no use to who is not an operator.
    """

    qos: bool = True
    trust_class_header: bool = False
    max_body: int = DEFAULT_MAX_BODY
    max_receiving: int = 256 << 20
    """Bytes of bodies that may be on their way in at once."""
    max_recalls: int = 2
    """How often a request may be taken back from its engine."""
    start_patience_s: float = 5.0
    """How long a request is held while the first facts are still being listed."""
    show_endpoint: bool = False
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


class Service:
    """Serves exchanges. One for all streams of a picker."""

    def __init__(self, desk: Desk, identity: Identity, settings: Settings | None = None) -> None:
        self.desk, self.identity = desk, identity
        self.settings = settings or Settings()
        self.credentials = Credentials(self.settings.sources)
        self.receiving = 0
        self._run = secrets.token_hex(6)
        """Begins the ids of requests that came without one."""

    async def serve(self, read: Read, write: Write) -> None:
        """Serve one exchange from its first message to the end of its stream."""
        number = self.desk.number()
        request = _Request(number, Exchange(self.settings.max_body, f"{self._run}-{number}"))
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
            wants = exchange.way.wants
            if wants not in (Wants.HEALTH, Wants.SERVER):
                await self._facts()
            if wants is Wants.INFERENCE:
                if not await self._infer(request, read, write):
                    return
            elif wants in (Wants.ASIDE, Wants.ANY_ENGINE):
                await self._aside(request, write)
            else:
                await self._inform(request, write)
        except RefusedError as no:
            await _write_all(write, exchange.refuse(no))
            return
        while not exchange.done:
            message = await self._next(request, read)
            if message is None:
                return
            await _write_all(write, exchange.feed(message))
            if exchange.way.grpc:
                try:
                    self._hold(request, exchange.held)
                except RefusedError as no:
                    await _write_all(write, exchange.cut(no))
            if exchange.elsewhere:
                self.desk.served(request.number, exchange.elsewhere)

    def _hold(self, request: _Request, size: int) -> None:
        """Note how many bytes of a request are in memory without being in the queue.

        Raises:
            RefusedError: It has grown, and all together are more than is held.
        """
        grown = size > request.counted
        self.receiving += size - request.counted
        request.counted = size
        if grown and self.receiving > self.settings.max_receiving:
            text = "more is being uploaded than this gateway holds; try again in a moment"
            raise RefusedError(Code.MEMORY_FULL, text, retry_after_s=1)

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
            raise RefusedError(Code.STARTING, message, retry_after_s=1) from error

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
            if not exchange.done:
                self._hold(request, max(exchange.received, exchange.held))
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
            raise RefusedError(Code(error.code), str(error)) from error
        except InvalidTokenError as error:
            raise RefusedError(Code.INVALID_TOKEN, str(error)) from error
        except UnknowableError as error:
            raise _unknown(error) from error

    def _read(self, request: _Request) -> Body:
        """What the request's body and headers say."""
        exchange, way = request.exchange, request.exchange.way
        if way.reads is Reads.FORM:
            return read_form(exchange.headers, exchange.received)
        if not way.grpc:
            return read_body(way, exchange.body, json_length(exchange))
        if not exchange.messages:
            raise RefusedError(Code.INVALID_BODY, "the call has no message")
        return read_message(way, exchange.messages[0])

    async def _infer(self, request: _Request, read: Read, write: Write) -> bool:
        """Queue a request and hand it over. False: its client has left meanwhile."""
        exchange = request.exchange
        body = self._read(request)
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
            again=self._attempt(exchange) > 1,
            subset=exchange.subset,
            adapter=model.adapter(body.model),
        )
        since = self.desk.clock()
        verdict = await self._wait(request, ask, read, write)
        if verdict is None:
            return False
        exchange.told[QUEUE_HEADER] = f"{max(0.0, self.desk.clock() - since):.3f}"
        if isinstance(verdict, Refused):
            self.desk.book.refused(ask, self.desk.flow.promised(ask), self.desk.clock())
            raise RefusedError.of(verdict)
        request.dispatched = True
        if ask.recallable:
            self._offer(request)
        made = hand_over(
            exchange, body.model, model, qos, self.desk.world.classes, in_order=not self.settings.qos
        )
        made.headers[REQUEST_HEADER] = self._enter(request, model, verdict)
        await self._send(request, (verdict.address, *verdict.fallbacks), made, write)
        return True

    def _comes_again(self, exchange: Exchange, *, streamed: bool) -> bool:
        """Whether Envoy sends it again if it is aborted: it counts attempts, and has kept the body."""
        few = 0 < self._attempt(exchange) <= self.settings.max_recalls
        return few and not streamed and exchange.received <= KEPT_BODY

    def _attempt(self, exchange: Exchange) -> int:
        """The how manieth attempt it is, from 1; 0 where the gateway does not try again by itself."""
        if RETRIES_HEADER not in exchange.headers:
            return 0
        return whole(exchange.headers.get(ATTEMPT_HEADER, "")) or 0

    def _offer(self, request: _Request) -> None:
        """Let the desk take it back while its answer has not begun."""
        task = asyncio.current_task()

        def abort() -> bool:
            sent = request.exchange.phase is Phase.SENT
            if request.recalled or not sent or task is None:
                return False
            request.recalled = task.cancel()
            return request.recalled

        self.desk.may_recall(request.number, abort)

    async def _aside(self, request: _Request, write: Write) -> None:
        """Send on what an engine answers without its GPUs: it waits for nobody, and takes no room."""
        exchange, way, world = request.exchange, request.exchange.way, self.desk.world
        key, made, name = None, HandOver(), "any model"
        if way.wants is Wants.ASIDE:
            asked = self._read(request).model
            model = request.model = self._find(exchange, asked)
            if not way.open:
                await self._classify(request, model)
            key, name = model.key, repr(asked)
            made = hand_over(exchange, asked, model, None, world.classes, in_order=False)
        addresses = world.ready(key, grpc=way.grpc)
        if exchange.subset is not None:
            addresses = [a for a in addresses if subset.holds(exchange.subset, a)]
        if not addresses:
            raise self._not_ready(name, key)
        request.dispatched = True
        await self._send(request, (addresses[request.number % len(addresses)],), made, write)

    def _not_ready(self, name: str, key: ModelKey | None) -> RefusedError:
        """No replica is ready; when one may be, as far as the queue knows."""
        comes_in_s = self.desk.flow.comes_in(key, self.desk.clock()) if key is not None else None
        after = max(1, math.ceil(comes_in_s or 0))
        return RefusedError(Code.NOT_READY, f"no replica of {name} is ready", retry_after_s=after)

    async def _send(
        self, request: _Request, addresses: tuple[str, ...], made: HandOver, write: Write
    ) -> None:
        """Hand a request over to an endpoint and its fallbacks; over gRPC at its other port, to it alone."""
        exchange = request.exchange
        if exchange.way.grpc:
            to = self.desk.world.grpc_addresses.get(addresses[0])
            if to is None:  # gone meanwhile
                which = addresses[0] if self.settings.show_endpoint else "the replica that was chosen"
                raise RefusedError(Code.NOT_READY, f"{which} does not speak gRPC; try again", retry_after_s=1)
            addresses = (to,)
        if self.settings.show_endpoint:
            exchange.told[ENDPOINT_HEADER] = addresses[0]
        # The token is the caller's key to the cluster; no engine needs it.
        kept = {DESTINATION_HEADER, *made.headers}
        if self.settings.trust_class_header:
            kept.add(AUTHORIZATION)
        drop = tuple(n for n in self.credentials.hidden(exchange.headers) if n not in kept)
        replies = exchange.send(
            *addresses, headers=made.headers, drop=drop, body=made.body, rewrite=made.rewrite
        )
        await _write_all(write, replies)
        self._hold(request, exchange.held)

    def _find(self, exchange: Exchange, name: str) -> ServedModel:
        model = self.desk.world.find(name)
        if model is None:
            raise RefusedError(Code.MODEL_NOT_FOUND, f"the model {name!r} does not exist", param="model")
        if model.protocol != exchange.protocol:
            paths = {OPENAI: "/v1/chat/completions", KSERVE: f"/v2/models/{name}/infer"}
            raise RefusedError(
                Code.PROTOCOL_MISMATCH,
                f"the model {name!r} speaks {model.protocol} and not {exchange.protocol}; "
                f"ask {paths.get(model.protocol, 'its own paths')}",
            )
        world = self.desk.world
        if exchange.way.grpc and world.ready(model.key) and not world.ready(model.key, grpc=True):
            raise RefusedError(
                Code.PROTOCOL_MISMATCH,
                f"the replicas of the model {name!r} have no gRPC port: name a container port grpc, or set "
                "spec.engine.endpoints.grpcPort",
            )
        return model

    async def _classify(self, request: _Request, model: ServedModel) -> QoSClass:
        """The request's class. Raises RefusedError with the reason when there is none."""
        classes = self.desk.world.classes
        named = classify.named_class(request.exchange.headers)
        if self.settings.trust_class_header:
            chosen = classify.trusted(model, named, classes)
        else:
            chosen = await self._allowed(request.caller, model, named)
        if isinstance(chosen, classify.Denied):
            raise RefusedError(Code.CLASS_NOT_ALLOWED, chosen.message)
        request.qos_class = request.exchange.told[CLASS_HEADER] = chosen
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

    async def _wait(self, request: _Request, ask: Ask, read: Read, write: Write) -> Dispatch | Refused | None:
        """Wait for the verdict, or for the client to leave: None."""
        exchange = request.exchange
        future = self.desk.submit(ask)
        self._hold(request, max(0, exchange.held - ask.size))  # the queue counts the rest from here
        while not future.done():
            if request.pending is None:
                request.pending = asyncio.ensure_future(read())
            await asyncio.wait((future, request.pending), return_when=asyncio.FIRST_COMPLETED)
            if request.pending.done() and not future.done():
                message = await self._next(request, read)
                if message is None:
                    return None
                # Only a gRPC stream may go on while it waits; of others feed says what is wrong.
                replies = exchange.feed(message)
                if replies:
                    await _write_all(write, replies)
                    return None
                self._hold(request, max(0, exchange.held - ask.size))
        return future.result()

    def _enter(self, request: _Request, model: ServedModel, to: Dispatch) -> str:
        """Enter the request in the book of what is measured; returns what its log entry will be known by."""
        desk, headers = self.desk, request.exchange.headers
        return desk.book.handed(
            to.ask,
            desk.flow.promised(to.ask),
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
        elif way.wants is Wants.SERVER:
            await _write_all(write, exchange.answer(200, server_metadata(__version__), reason="server"))
        elif way.wants is Wants.MODEL_READY:
            model = self._find(exchange, way.model or "")
            if not world.ready(model.key):
                raise self._not_ready(repr(way.model), model.key)
            await _write_all(write, exchange.answer(200, b"{}", reason="ready"))
        elif way.wants is Wants.MODEL_LIST:
            listed = [
                _entry(name, world.models[key])
                for name, key in sorted(world.by_name.items())
                if await self._usable(request, world.models[key])
            ]
            await _write_all(write, exchange.answer(200, model_list(listed), reason="models"))
        elif way.wants is Wants.MODEL:
            entry = world.find(way.model or "")
            if entry is None or not await self._usable(request, entry):
                raise RefusedError(Code.MODEL_NOT_FOUND, f"the model {way.model!r} does not exist")
            body = model_entry(_entry(way.model or "", entry))
            await _write_all(write, exchange.answer(200, body, reason="model"))
        else:
            path = exchange.headers.get(":path", "").partition("?")[0]
            method = exchange.headers.get(":method", "")
            raise RefusedError(Code.UNKNOWN_URL, f"there is no {method} {path} here")


def _entry(name: str, model: ServedModel) -> ListedModel:
    return ListedModel(name, model.created_s, model.names[0] if name in model.adapters else None)


def _unknown(error: UnknowableError) -> RefusedError:
    code = Code.TOO_MANY_UNKNOWN if isinstance(error, CrowdedError) else Code.IDENTITY_UNKNOWN
    return RefusedError(code, str(error), retry_after_s=error.retry_after_s)


async def _write_all(write: Write, replies: list[pb.ProcessingResponse]) -> None:
    for reply in replies:
        await write(reply)
