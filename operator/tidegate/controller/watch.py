"""kopf, for the events of the three kinds only: it says that something changed, and no more.

kopf runs on a thread with an event loop of its own: when its operator ends, it cancels every task
that came into its loop after it began, and ours must not be among them. Only `on.event` is used,
since its other handlers write annotations on the users' objects; what it calls must not fail,
because kopf logs such errors and forgets them. Known ways in which it stops watching (an error in a
watch other than 410, a listing that fails for long, a CRD that goes) end its operator, which is then
started again here; the world's own resync covers what was missed meanwhile.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any, Final

import kopf

from tidegate.adapters.kube import Kind
from tidegate.adapters.kube.client import configure

log = logging.getLogger(__name__)

_BACKOFF_S: Final = (0.5, 1.0, 2.0, 5.0, 10.0)
_WATCH_S: Final = 60
_CLOSING_S: Final = 0.25


class KopfWatch:
    """Supervises kopf: `run` keeps it going until cancelled.

    Args:
        kinds: What to watch.
        kubeconfig: Path, or None for $KUBECONFIG or in-cluster.
        on_event: Called on the caller's event loop with the kind that changed.
        on_restart: Called there when kopf ended and is started again.
    """

    def __init__(
        self,
        kinds: tuple[Kind, ...],
        kubeconfig: str | None,
        on_event: Callable[[Kind], None],
        on_restart: Callable[[], None],
    ) -> None:
        self.alive = False
        self._kinds, self._kubeconfig = kinds, kubeconfig
        self._on_event, self._on_restart = on_event, on_restart

    async def run(self) -> None:
        """Start kopf, and start it again whenever it ends."""
        failures = 0
        while True:
            stop, ended = _Stop(), asyncio.Event()
            loop = asyncio.get_running_loop()
            problem: list[BaseException] = []
            thread = threading.Thread(
                target=self._thread, args=(loop, stop, ended, problem), name="kopf", daemon=True
            )
            thread.start()
            self.alive = True
            started = loop.time()
            try:
                await ended.wait()
            finally:
                self.alive = False
                stop.set()
                await asyncio.shield(asyncio.to_thread(thread.join, 5.0))
            failures = 0 if loop.time() - started > 60 else failures + 1
            delay = _BACKOFF_S[min(failures, len(_BACKOFF_S)) - 1] if failures else _BACKOFF_S[0]
            cause = f"{type(problem[0]).__name__}: {problem[0]}" if problem else "no error"
            log.warning(
                "kopf ended (%s); started again in %.1f s, every period lists until then", cause, delay
            )
            self._on_restart()
            await asyncio.sleep(delay)

    def _thread(
        self,
        caller: asyncio.AbstractEventLoop,
        stop: "_Stop",
        ended: asyncio.Event,
        problem: list[BaseException],
    ) -> None:
        try:
            asyncio.run(self._operator(caller, stop))
        except BaseException as error:
            problem.append(error)
        if not caller.is_closed():
            caller.call_soon_threadsafe(ended.set)

    async def _operator(self, caller: asyncio.AbstractEventLoop, stop: "_Stop") -> None:
        # A watcher's error is logged by kopf, and again by asyncio when its task is collected.
        asyncio.get_running_loop().set_exception_handler(lambda _, c: log.debug("kopf: %s", c.get("message")))
        registry = kopf.OperatorRegistry()

        async def login(**_: Any) -> kopf.ConnectionInfo:
            return await _credentials(self._kubeconfig)

        kopf.on.login(registry=registry)(login)
        for kind in self._kinds:
            group, _, version = kind.api_version.partition("/")

            async def changed(kind: Kind = kind, **_: Any) -> None:
                caller.call_soon_threadsafe(self._on_event, kind)

            kopf.on.event(group, version, kind.plural, id=kind.plural, registry=registry)(changed)
        try:
            await kopf.operator(
                registry=registry,
                settings=_settings(),
                standalone=True,
                clusterwide=True,
                stop_flag=stop.here(),
            )
        finally:
            # TLS connections close a moment after their sessions; the loop must not go before them.
            await asyncio.sleep(_CLOSING_S)


class _Stop:
    """A flag set from another thread.

    kopf takes a threading.Event too, but waits for it on a thread of its own, which then keeps its
    loop from closing when the operator dies by itself.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._set = False
        self._flag: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def here(self) -> asyncio.Event:
        """The flag in the loop that asks for it."""
        event = asyncio.Event()
        with self._lock:
            self._flag = (asyncio.get_running_loop(), event)
            if self._set:
                event.set()
        return event

    def set(self) -> None:
        """Ask it to stop."""
        with self._lock:
            self._set = True
            if self._flag and not self._flag[0].is_closed():
                self._flag[0].call_soon_threadsafe(self._flag[1].set)


def _settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False  # our own events are deduplicated
    settings.scanning.disabled = True  # a change of CRDs ends the operator, and it is started again
    settings.process.ultimate_exiting_timeout = None
    settings.watching.server_timeout = _WATCH_S  # a silent watch is renewed
    settings.watching.client_timeout = _WATCH_S + 10
    settings.watching.connect_timeout = 5.0
    settings.networking.request_timeout = 30.0
    settings.networking.error_backoffs = (0.5, 1, 2)
    return settings


async def _credentials(kubeconfig: str | None) -> kopf.ConnectionInfo:
    """The same identity as our own client's, read anew: tokens in files rotate."""
    found = await configure(kubeconfig)
    header = await found.get_api_key_with_prefix("BearerToken", alias="authorization")
    scheme, _, token = (header or "").rpartition(" ")
    return kopf.ConnectionInfo(
        server=found.host,
        ca_path=found.ssl_ca_cert,
        insecure=not found.verify_ssl,
        scheme=scheme or None,
        token=token or None,
        certificate_path=found.cert_file,
        private_key_path=found.key_file,
    )
