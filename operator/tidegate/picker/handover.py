"""What an engine gets of a request: headers to set, and the body or messages as it wants them. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from tidegate.core.types import QoSClass
from tidegate.facts.endpoints import ServedModel
from tidegate.picker import classify
from tidegate.picker.errors import OPENAI
from tidegate.picker.exchange import Exchange, whole
from tidegate.picker.kservegrpc import Rewrite, rewriter
from tidegate.picker.protocols import Reads, engine_path, for_engine

VLLM_PRIORITY_HEADER: Final = "x-vllm-priority"
BINARY_HEADER: Final = "inference-header-content-length"


@dataclass(slots=True)
class HandOver:
    """Headers to set beside the destination; another body than the client's; what messages become."""

    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    rewrite: Rewrite = bytes


def json_length(exchange: Exchange) -> int | None:
    """Where binary tensors follow a KServe v2 body's JSON: how long that is."""
    return whole(exchange.headers.get(BINARY_HEADER, ""))


def hand_over(
    exchange: Exchange,
    asked: str,
    model: ServedModel,
    qos: QoSClass | None,
    classes: Mapping[str, QoSClass],
    *,
    in_order: bool,
) -> HandOver:
    """Make it fit the engine.

    Args:
        exchange: The request, whole.
        asked: The name by which the client asked for the model.
        model: The model.
        qos: The class, None for what no GPU works on.
        classes: All that exist.
        in_order: Every class has the same priority in the engine.

    Raises:
        RefusedError: The body cannot be written again.
    """
    way, called = exchange.way, model.engine_name(asked)
    renamed = called if called != asked else None
    made = HandOver()
    if model.protocol == OPENAI:
        inside = None
        if qos is not None:
            priority = 0 if in_order else classify.vllm_priority(qos)
            made.headers[VLLM_PRIORITY_HEADER] = str(priority)
            # Where nothing is generated, vLLM reads the body's own field and not the header.
            inside = None if way.generates else priority
        if way.reads is Reads.OPENAI and (renamed or inside is not None):
            made.body, _ = for_engine(exchange.body, model=renamed, vllm_priority=inside)
        return made
    level = None
    if qos is not None and model.engine == "Triton":
        level = 1 if in_order else classify.triton_priority(qos.name, model, classes)
    if way.grpc:
        made.rewrite = rewriter(way, asked, called, level)
        return made
    if renamed:
        made.headers[":path"] = engine_path(exchange.headers.get(":path", ""), called)
    if level is not None and way.reads is Reads.KSERVE:
        made.body, length = for_engine(exchange.body, json_length(exchange), priority=level)
        if length is not None:
            made.headers[BINARY_HEADER] = str(length)
    return made
