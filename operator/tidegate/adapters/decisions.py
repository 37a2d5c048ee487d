"""The decision log's format: what a queue was told and what it answered, as JSON lines.

It stands with the adapters because it is a format that leaves the process, and because the picker
writes it and the simulator reads it, which may not import each other. It is pure: bytes in, values
out. What a line holds is derived from core's dataclasses, so a field added there needs no change
here. A log written before a field existed has its default; a field that is not known is an error,
since what it meant would be missing from the replay.

The first line says format, version and Policy; each one after it is a call of Flow, in the order in
which they ended. Floats are written so that they are read back the same, bit for bit; infinities
and NaN, for which JSON has no words, are not read back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from tidegate.core.flow import Ask, Dispatch, Ended, Endpoint, Model, Policy, Refused
from tidegate.core.load import EngineReport
from tidegate.core.types import QoSClass

FORMAT: Final = "tidegate-decisions"
VERSION: Final = 1
# Strict: "5" is no number. It holds for core's dataclasses inside, too.
_CONFIG: Final = ConfigDict(extra="forbid", strict=True)

Expiries = tuple[tuple[Ask, Refused], ...]
Recalls = tuple[tuple[Ask, str], ...]


class DecisionsError(ValueError):
    """A line is not what this version writes; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class SetWorldCall:
    """`Flow.set_world`. Classes and models are listed: each has its key in it."""

    call: Literal["set_world"] = field(default="set_world", kw_only=True)
    now: float
    classes: tuple[QoSClass, ...]
    models: tuple[Model, ...]
    endpoints: tuple[Endpoint, ...]
    answer: None = None


@dataclass(frozen=True, slots=True)
class ReportCall:
    """`Flow.report`. Its time is the report's own."""

    call: Literal["report"] = field(default="report", kw_only=True)
    address: str
    report: EngineReport
    own_before: int
    own_tokens_before: int
    answer: None = None


@dataclass(frozen=True, slots=True)
class AdmitCall:
    """`Flow.admit`, and why not."""

    call: Literal["admit"] = field(default="admit", kw_only=True)
    now: float
    ask: Ask
    answer: Refused | None


@dataclass(frozen=True, slots=True)
class DispatchCall:
    """`Flow.dispatch`, and who went where, in order."""

    call: Literal["dispatch"] = field(default="dispatch", kw_only=True)
    now: float
    answer: tuple[Dispatch, ...]


@dataclass(frozen=True, slots=True)
class FinishCall:
    """`Flow.finish`, and where the request stood."""

    call: Literal["finish"] = field(default="finish", kw_only=True)
    now: float
    request: int
    whole: bool
    answer: Ended | None


@dataclass(frozen=True, slots=True)
class MeasuredCall:
    """`Flow.measured`."""

    call: Literal["measured"] = field(default="measured", kw_only=True)
    request: int
    prompt_tokens: int
    output_tokens: int
    answer: None = None


@dataclass(frozen=True, slots=True)
class ExpireCall:
    """`Flow.expire`, and whose time was over, in order."""

    call: Literal["expire"] = field(default="expire", kw_only=True)
    now: float
    answer: Expiries


@dataclass(frozen=True, slots=True)
class ServedCall:
    """`Flow.served`, and whether the room was moved."""

    call: Literal["served"] = field(default="served", kw_only=True)
    now: float
    request: int
    address: str
    answer: bool


@dataclass(frozen=True, slots=True)
class RecallCall:
    """`Flow.recall`, and what was to be aborted where, in order."""

    call: Literal["recall"] = field(default="recall", kw_only=True)
    now: float
    answer: Recalls


Call = (
    SetWorldCall
    | ReportCall
    | AdmitCall
    | DispatchCall
    | FinishCall
    | MeasuredCall
    | ServedCall
    | ExpireCall
    | RecallCall
)
Answer = Refused | tuple[Dispatch, ...] | Ended | Expiries | Recalls | bool | None


@dataclass(frozen=True, slots=True)
class _Header:
    __pydantic_config__ = _CONFIG
    format: str
    version: int
    policy: Policy


_CALL: Final[TypeAdapter[Call]] = TypeAdapter(Annotated[Call, Field(discriminator="call")], config=_CONFIG)
_HEADER: Final = TypeAdapter(_Header)


def encode(call: Call) -> bytes:
    """One line, with its end. Raises TypeError for what JSON cannot hold."""
    return orjson.dumps(call, default=_plain, option=orjson.OPT_APPEND_NEWLINE)


def decode(line: bytes) -> Call:
    """Read a line. Raises DecisionsError."""
    try:
        return _CALL.validate_json(line)
    except ValidationError as error:
        raise DecisionsError(_words(error)) from error


def encode_header(policy: Policy) -> bytes:
    """The first line of a log, with its end."""
    header = _Header(FORMAT, VERSION, policy)
    return orjson.dumps(header, default=_plain, option=orjson.OPT_APPEND_NEWLINE)


def decode_header(line: bytes) -> Policy:
    """Read the first line. Raises DecisionsError, before all else for another format or version."""
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DecisionsError(f"this is no decision log: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DecisionsError(f'this is no decision log: it does not begin with {{"format":"{FORMAT}",…}}')
    if found.get("version") != VERSION:
        raise DecisionsError(f"version {found.get('version')} of the log; this program reads {VERSION}")
    try:
        return _HEADER.validate_json(line).policy
    except ValidationError as error:
        raise DecisionsError(_words(error)) from error


def _plain(value: Any) -> Any:
    """What orjson does not know of the values a dataclass may hold."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} cannot be written to a decision log")


def _words(error: ValidationError) -> str:
    """The first thing that is wrong, and where in the line."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else first["msg"]
