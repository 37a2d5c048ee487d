"""What both engine faces share: knobs, the stand-in for a tokenizer, and the process's life."""

import asyncio
import logging
import math
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from aiohttp import web

logger = logging.getLogger("tidegate.engine")

# A100 with Llama-3-8B: about 400k tokens of KV cache in blocks of 16.
DEFAULT_KV_BLOCKS = 25_000
# Mean length of an answer that ends by itself: about that of the Azure conversation trace.
MEAN_OUTPUT_TOKENS = 220.0
BYTES_PER_TOKEN = 4
# The text of one token, as long as the stand-in tokenizer says a token is.
WORD = " tok"
MAX_BODY_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Knobs:
    """The emulator's own settings, from the environment.

    `speed` divides step times and nothing else; `cold_start_s` passes before the port opens.
    """

    speed: float = 1.0
    cold_start_s: float = 0.0
    kv_blocks: int = DEFAULT_KV_BLOCKS
    bind: str = "127.0.0.1"

    @classmethod
    def read(cls, env: Mapping[str, str]) -> "Knobs":
        """Read `TIDEGATE_EMULATOR_*` and `POD_IP`.

        Raises:
            ValueError: a value is no number or out of range; names the variable.
        """
        return cls(
            speed=_number(env, "TIDEGATE_EMULATOR_SPEED", 1.0, above=0.0),
            cold_start_s=_number(env, "TIDEGATE_EMULATOR_COLD_START", 0.0),
            kv_blocks=int(_number(env, "TIDEGATE_EMULATOR_KV_BLOCKS", DEFAULT_KV_BLOCKS, above=1.0)),
            # All pods of a local cluster share the machine: each listens on its own loopback address.
            bind=env.get("POD_IP") or "127.0.0.1",
        )

    def address(self, host: str | None) -> str:
        """Where to listen when asked for `host`: "everywhere" means this pod's address."""
        return self.bind if host in {None, "", "0.0.0.0", "::"} else str(host)  # noqa: S104


def _number(env: Mapping[str, str], name: str, default: float, above: float | None = None) -> float:
    text = env.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name} must be a number, got {text!r}") from None
    if not math.isfinite(value) or value < 0 or (above is not None and value <= above):
        raise ValueError(f"{name} must be above {above or 0:g}, got {text}")
    return value


def count_tokens(text: str) -> int:
    """Tokens of a text: one for every four bytes of UTF-8, rounded up; never none."""
    return max(1, -(-len(text.encode()) // BYTES_PER_TOKEN))


def prompt_blocks(text: str | Sequence[int], block_size: int) -> tuple[tuple[str, int], ...]:
    """The full KV blocks of a prompt, text or token ids: a digest of what is in each, and its tokens."""
    raw: bytes | Sequence[int] = text.encode() if isinstance(text, str) else text
    size = block_size * BYTES_PER_TOKEN if isinstance(raw, bytes) else block_size
    parts = (raw[i : i + size] for i in range(0, len(raw) - size + 1, size))
    return tuple(
        (blake2b(p if isinstance(p, bytes) else repr(p).encode(), digest_size=16).hexdigest(), block_size)
        for p in parts
    )


def draw_output(prompt: bytes, min_tokens: int, max_tokens: int) -> tuple[int, bool]:
    """How long the answer to a prompt is, and whether it ended by itself.

    The same prompt always gets the same answer: the length is exponential, drawn from its hash.
    """
    hashed = int.from_bytes(blake2b(prompt, digest_size=8).digest())
    uniform = (hashed + 1) / 2.0**64
    drawn = max(1, min_tokens, math.ceil(-MEAN_OUTPUT_TOKENS * math.log(uniform)))
    return (drawn, True) if drawn < max_tokens else (max_tokens, False)


def orca_header(headers: Mapping[str, str], named: Sequence[tuple[str, float]]) -> dict[str, str]:
    """The ORCA load report that a request's `endpoint-load-metrics-format` asks for, in vLLM's form."""
    wanted = headers.get("endpoint-load-metrics-format", "").lower()
    if wanted == "json":
        inner = ", ".join(f'"{name}": {value}' for name, value in named)
        return {"endpoint-load-metrics": f'JSON {{"named_metrics": {{{inner}}}}}'}
    if wanted == "text":
        report = ", ".join(f"named_metrics.{name}={value}" for name, value in named)
        return {"endpoint-load-metrics": f"TEXT {report}"}
    return {}


def configure_logging() -> None:
    """Log to stderr, as the engines do; `kubectl logs` shows it."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(levelname)s %(asctime)s %(name)s: %(message)s",
        force=True,
    )


@dataclass(frozen=True, slots=True)
class Listener:
    """An application and the port it is served on."""

    app: web.Application
    port: int


@dataclass(frozen=True, slots=True)
class Face:
    """What an engine shows to the network.

    `start` opens what is not HTTP; `drain` runs when the ports are closed to new connections.
    """

    listeners: Sequence[Listener]
    drain: Callable[[], Awaitable[None]]
    start: Callable[[], Awaitable[None]] | None = None


async def serve(host: str, cold_start_s: float, make_face: Callable[[], Face]) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code.

    The face is made after the cold start, in the loop. What its `drain` leaves unfinished is cut off.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if cold_start_s > 0:
        logger.info("Cold start: loading for %g s", cold_start_s)
        try:
            await asyncio.wait_for(stop.wait(), cold_start_s)
        except TimeoutError:
            pass
        else:
            return 0
    face = make_face()
    runners: list[web.AppRunner] = []
    sites: list[web.TCPSite] = []
    try:
        for listener in face.listeners:
            # A client that leaves cancels its handler, which frees its slot in the engine.
            runner = web.AppRunner(
                listener.app, access_log=None, handler_cancellation=True, shutdown_timeout=0.2
            )
            runners.append(runner)
            await runner.setup()
            site = web.TCPSite(runner, host, listener.port, backlog=1024)
            sites.append(site)
            await site.start()
            logger.info("Listening on http://%s:%d", host, listener.port)
        if face.start is not None:
            await face.start()
        await stop.wait()
        logger.info("Shutting down")
        for site in sites:
            await site.stop()
        await face.drain()
    except OSError as error:
        logger.error("Cannot listen on %s: %s", host, error)  # noqa: TRY400 - a trace adds nothing
        return 1
    finally:
        for runner in runners:
            await runner.cleanup()
    return 0


def environment() -> Mapping[str, str]:
    """The process's environment; read when the server starts, not at import (the template forks)."""
    return os.environ
