"""Writes what the queue was told and answered to a file, so that it can be replayed.

Every call that may change the queue is recorded, and so are rounds in which nobody went or expired:
that they stayed is an answer too, and replay compares it. What is written is the beginning of what
happened, without a gap: where one would come, recording ends.

Serving comes first. A call is encoded where it happens and written by a thread of its own; what
waits for the disk is bounded, as is the file.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

from tidegate.adapters.decisions import (
    AdmitCall,
    Call,
    DispatchCall,
    ExpireCall,
    FinishCall,
    MeasuredCall,
    RecallCall,
    ReportCall,
    ServedCall,
    SetWorldCall,
    encode,
    encode_header,
)
from tidegate.core.flow import Ask, Dispatch, Ended, Endpoint, Flow, Model, ModelKey, Policy, Refused
from tidegate.core.load import EngineReport
from tidegate.core.types import QoSClass

log = logging.getLogger(__name__)

MAX_BYTES: Final = 1 << 30
_PENDING_BYTES: Final = 32 << 20
"""What a disk that stands still may leave in memory: a minute of about a thousand requests a second."""
_PERIOD_S: Final = 0.25
_CLOSE_S: Final = 2.0


class Stop(StrEnum):
    """Why recording was given up."""

    DISK = "disk"
    BEHIND = "behind"
    FULL = "full"
    UNWRITABLE = "unwritable"
    RAISED = "raised"


class DecisionLog:
    """A file of calls. `add` is called on one thread, the event loop's, and never waits.

    As a context manager it surrounds one call of Flow: one that raises has changed what nobody can
    tell, so nothing is recorded from there on.
    """

    def __init__(
        self,
        path: Path,
        policy: Policy,
        on_stop: Callable[[Stop], None] = lambda _reason: None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Nothing is opened yet: `start` does.

        Args:
            path: The file. One that is there is set aside as NAME.old.
            policy: What the recorded Flow obeys.
            on_stop: Called once if recording is given up, on whichever thread finds out.
            max_bytes: Where the file ends. It cannot be rotated: replay starts with an empty queue.
        """
        self._path, self._on_stop, self._max_bytes = path, on_stop, max_bytes
        header = encode_header(policy)
        self._lines: deque[bytes] = deque([header])
        self._added, self._written = len(header), 0
        self._stopped, self._lock = False, threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="decision-log", daemon=True)

    def start(self) -> None:
        """Open the file and begin to write, on the log's own thread."""
        self._thread.start()

    def close(self) -> None:
        """Write what is left. Waits for the disk, two seconds at most; what comes later is not recorded."""
        self._closing.set()
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            log.warning("%s: the disk does not answer; the log lacks its end", self._path)
        self._stopped = True

    def add(self, call: Call) -> None:
        """Record a call that has ended."""
        if self._stopped:
            return
        try:
            line = encode(call)
        except TypeError as error:
            self._give_up(Stop.UNWRITABLE, str(error))
            return
        self._added += len(line)
        if self._added > self._max_bytes:
            self._give_up(Stop.FULL, f"it would be larger than {self._max_bytes} bytes")
        elif self._added - self._written > _PENDING_BYTES:
            self._give_up(Stop.BEHIND, f"{_PENDING_BYTES} bytes wait to be written")
        else:
            self._lines.append(line)

    def take(self) -> bytes:
        """What was added since it was last taken, in whole lines."""
        return b"".join(self._lines.popleft() for _ in range(len(self._lines)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._give_up(Stop.RAISED, f"the queue raised {error!r}")

    def _run(self) -> None:
        try:
            _set_aside(self._path)
            with self._path.open("wb") as file:
                while not self._closing.wait(_PERIOD_S):
                    self._write(file)
                self._write(file)
        except OSError as error:
            self._give_up(Stop.DISK, str(error))
            self._lines.clear()

    def _write(self, file: BinaryIO) -> None:
        if taken := self.take():
            file.write(taken)
            file.flush()
            self._written += len(taken)

    def _give_up(self, reason: Stop, message: str) -> None:
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
        log.error("%s: decisions are not recorded any more: %s", self._path, message)
        self._on_stop(reason)


def _set_aside(path: Path) -> None:
    """Keep the log of the picker before this one: it may be the one of interest."""
    if path.is_file() and path.stat().st_size > 0:
        path.replace(path.with_name(f"{path.name}.old"))


class RecordedFlow(Flow):
    """Flow itself, unchanged, with every call that changes it recorded after its answer."""

    def __init__(self, policy: Policy, decisions: DecisionLog) -> None:
        super().__init__(policy)
        self._decisions = decisions

    def set_world(
        self,
        classes: Mapping[str, QoSClass],
        models: Mapping[ModelKey, Model],
        endpoints: Iterable[Endpoint],
        now: float,
    ) -> None:
        """As Flow does."""
        listed = tuple(endpoints)
        with self._decisions:
            super().set_world(classes, models, listed, now)
        self._decisions.add(SetWorldCall(now, tuple(classes.values()), tuple(models.values()), listed))

    def report(self, address: str, report: EngineReport, own_before: int, own_tokens_before: int) -> None:
        """As Flow does."""
        with self._decisions:
            super().report(address, report, own_before, own_tokens_before)
        self._decisions.add(ReportCall(address, report, own_before, own_tokens_before))

    def admit(self, ask: Ask, now: float) -> Refused | None:
        """As Flow does."""
        with self._decisions:
            answer = super().admit(ask, now)
        self._decisions.add(AdmitCall(now, ask, answer))
        return answer

    def dispatch(self, now: float) -> list[Dispatch]:
        """As Flow does."""
        with self._decisions:
            answer = super().dispatch(now)
        self._decisions.add(DispatchCall(now, tuple(answer)))
        return answer

    def served(self, request: int, address: str, now: float) -> bool:
        """As Flow does."""
        with self._decisions:
            answer = super().served(request, address, now)
        self._decisions.add(ServedCall(now, request, address, answer))
        return answer

    def finish(self, request: int, now: float, *, whole: bool = True) -> Ended | None:
        """As Flow does."""
        with self._decisions:
            answer = super().finish(request, now, whole=whole)
        self._decisions.add(FinishCall(now, request, whole, answer))
        return answer

    def measured(self, request: int, prompt_tokens: int, output_tokens: int) -> None:
        """As Flow does."""
        with self._decisions:
            super().measured(request, prompt_tokens, output_tokens)
        self._decisions.add(MeasuredCall(request, prompt_tokens, output_tokens))

    def expire(self, now: float) -> list[tuple[Ask, Refused]]:
        """As Flow does."""
        with self._decisions:
            answer = super().expire(now)
        self._decisions.add(ExpireCall(now, tuple(answer)))
        return answer

    def recall(self, now: float) -> list[tuple[Ask, str]]:
        """As Flow does."""
        with self._decisions:
            answer = super().recall(now)
        self._decisions.add(RecallCall(now, tuple(answer)))
        return answer
