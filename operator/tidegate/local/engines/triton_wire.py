"""KServe v2 over HTTP: infer (JSON and the binary tensor extension) and generate bodies."""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from tidegate.local.engines.triton_core import DEFAULT_MAX_TOKENS, VERSION, Ask, Code, TritonError

LENGTH_HEADER = "Inference-Header-Content-Length"
Tensors = Mapping[str, Sequence[Any]]

# Fixed-size datatypes that the inputs may have, as struct formats.
_FORMATS = {
    "BOOL": "?",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "FP32": "f",
    "FP64": "d",
}


@dataclass(frozen=True, slots=True)
class InferBody:
    """An infer request. `binary` when its output is to be sent as bytes after the JSON."""

    ask: Ask
    binary: bool


def parse_infer(raw: bytes, json_length: str | None) -> InferBody:
    """Read an infer body; `json_length` is the header that says where its JSON ends.

    Raises:
        TritonError: INVALID_ARG, with what is wrong.
    """
    length = len(raw)
    if json_length is not None:
        if not json_length.isdecimal() or int(json_length) > len(raw):
            raise TritonError(Code.INVALID, f"{LENGTH_HEADER} must be at most {len(raw)}, got {json_length}")
        length = int(json_length)
    body = _object(raw[:length])
    tensors, shape = _tensors(body, raw[length:])
    parameters = _mapping(body, "parameters")
    outputs = _sequence(body, "outputs")
    for output in outputs:
        if not isinstance(output, dict) or output.get("name") != "text_output":
            raise TritonError(Code.INVALID, "unexpected inference output: the only one is 'text_output'")
    wants = [_mapping(o, "parameters").get("binary_data") for o in outputs] or [
        parameters.get("binary_data_output")
    ]
    identity = body.get("id", "")
    if not isinstance(identity, str):
        raise TritonError(Code.INVALID, "id must be a string")
    ask = ask_from(tensors, parameters, shape=shape, identity=identity)
    return InferBody(ask, binary=wants[0] is True)


def parse_generate(raw: bytes, *, stream: bool) -> Ask:
    """Read a generate body: inputs at the top, sampling in `parameters` or beside them.

    Raises:
        TritonError: INVALID_ARG, with what is wrong.
    """
    body = _object(raw)
    tensors = {name: [value] for name, value in body.items() if name not in {"parameters", "id"}}
    parameters = {**body, **_mapping(body, "parameters")}
    return ask_from(tensors, parameters, identity=str(body.get("id", "")), stream=stream)


def ask_from(
    tensors: Tensors,
    parameters: Mapping[str, Any],
    *,
    shape: tuple[int, ...] = (1,),
    identity: str = "",
    stream: bool = False,
) -> Ask:
    """Turn inputs and parameters, named as Triton's vLLM backend names them, into plain values.

    Raises:
        TritonError: INVALID_ARG, with what is wrong.
    """
    prompts = tensors.get("text_input")
    if not prompts or not all(isinstance(p, str) for p in prompts):
        raise TritonError(Code.INVALID, "expected the input 'text_input', of type BYTES")
    sampling = {**_sampling(tensors), **parameters}
    for name in ("max_tokens", "min_tokens", "ignore_eos", "exclude_input_in_output"):
        if tensors.get(name):
            sampling[name] = tensors[name][0]
    if stream and len(prompts) > 1:
        raise TritonError(Code.INVALID, "a stream answers one text_input")
    maximum = _whole(sampling, "max_tokens", DEFAULT_MAX_TOKENS, 1)
    least = _whole(sampling, "min_tokens", 0, 0)
    if least > maximum:
        raise TritonError(Code.INVALID, f"min_tokens {least} exceeds max_tokens {maximum}")
    excluded = sampling.get("exclude_input_in_output")
    return Ask(
        prompts=tuple(prompts),
        shape=shape,
        id=identity,
        priority=_whole(parameters, "priority", 0, 0),
        max_tokens=maximum,
        min_tokens=least,
        ignore_eos=sampling.get("ignore_eos") is True,
        stream=stream,
        # The vLLM backend repeats the prompt in a whole answer, unless told not to.
        with_prompt=not stream and excluded is not True,
    )


def infer_answer(model: str, body: InferBody, texts: Sequence[str]) -> tuple[bytes, dict[str, str]]:
    """The body and headers that answer an infer request."""
    ask = body.ask
    output: dict[str, Any] = {"name": "text_output", "datatype": "BYTES", "shape": list(ask.shape)}
    tail = b""
    if body.binary:
        tail = b"".join(struct.pack("<I", len(t.encode())) + t.encode() for t in texts)
        output["parameters"] = {"binary_data_size": len(tail)}
    else:
        output["data"] = list(texts)
    answer = {"model_name": model, "model_version": VERSION, "outputs": [output]}
    head = orjson.dumps({"id": ask.id, **answer} if ask.id else answer)
    if not body.binary:
        return head, {"Content-Type": "application/json"}
    return head + tail, {"Content-Type": "application/octet-stream", LENGTH_HEADER: str(len(head))}


def strings(raw: bytes) -> Iterator[str]:
    """The elements of a BYTES tensor: four bytes of length, little endian, before each.

    Raises:
        TritonError: INVALID_ARG, the lengths do not add up or an element is not UTF-8.
    """
    position = 0
    while position < len(raw):
        if position + 4 > len(raw):
            raise TritonError(Code.INVALID, "BYTES tensor ends in the middle of a length")
        (length,) = struct.unpack_from("<I", raw, position)
        position += 4
        if position + length > len(raw):
            raise TritonError(Code.INVALID, "BYTES tensor ends in the middle of an element")
        try:
            yield raw[position : position + length].decode()
        except UnicodeDecodeError:
            raise TritonError(Code.INVALID, "BYTES tensor: an element is not UTF-8") from None
        position += length


def values(datatype: str, raw: bytes) -> list[Any]:
    """The elements of a tensor in its binary form.

    Raises:
        TritonError: INVALID_ARG, an unknown datatype or a size that is not whole.
    """
    if datatype == "BYTES":
        return list(strings(raw))
    letter = _FORMATS.get(datatype)
    if letter is None or len(raw) % struct.calcsize("<" + letter):
        raise TritonError(Code.INVALID, f"cannot read {len(raw)} bytes as a tensor of {datatype}")
    return [v for (v,) in struct.iter_unpack("<" + letter, raw)]


def _tensors(body: Mapping[str, Any], tail: bytes) -> tuple[dict[str, list[Any]], tuple[int, ...]]:
    """The inputs by name, and the shape of `text_input`."""
    tensors: dict[str, list[Any]] = {}
    shape: tuple[int, ...] = (1,)
    position = 0
    for tensor in _sequence(body, "inputs"):
        if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
            raise TritonError(Code.INVALID, "each of inputs must be an object with a name")
        name, size = tensor["name"], _mapping(tensor, "parameters").get("binary_data_size")
        if size is None:
            data = tensor.get("data")
            tensors[name] = list(_flat(data)) if isinstance(data, list) else []
        else:
            if type(size) is not int or not 0 <= size <= len(tail) - position:
                raise TritonError(Code.INVALID, f"input '{name}': binary_data_size does not match the body")
            tensors[name] = values(str(tensor.get("datatype")), tail[position : position + size])
            position += size
        dimensions = tensor.get("shape")
        if not isinstance(dimensions, list) or not all(type(d) is int and d > 0 for d in dimensions):
            raise TritonError(Code.INVALID, f"input '{name}': shape must be a list of positive whole numbers")
        count = 1
        for d in dimensions:
            count *= d
        if count != len(tensors[name]):
            raise TritonError(
                Code.INVALID,
                f"input '{name}': shape {dimensions} wants {count} elements, got {len(tensors[name])}",
            )
        if name == "text_input":
            shape = tuple(dimensions)
    return tensors, shape


def _flat(data: Sequence[Any]) -> Iterator[Any]:
    for item in data:
        if isinstance(item, list):
            yield from _flat(item)
        else:
            yield item


def _sampling(tensors: Tensors) -> dict[str, Any]:
    """The vLLM backend's `sampling_parameters` input: a string of JSON, whose values may be strings."""
    given = tensors.get("sampling_parameters")
    if not given:
        return {}
    found = given[0] if isinstance(given[0], dict) else _object(str(given[0]).encode())
    return {n: int(v) if isinstance(v, str) and v.isdecimal() else v for n, v in found.items()}


def _object(raw: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise TritonError(Code.INVALID, f"failed to parse the request JSON buffer: {error}") from None
    if not isinstance(body, dict):
        raise TritonError(Code.INVALID, "failed to parse the request JSON buffer: not an object")
    return body


def _mapping(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = body.get(name, {})
    if not isinstance(value, dict):
        raise TritonError(Code.INVALID, f"{name} must be an object")
    return value


def _sequence(body: Mapping[str, Any], name: str) -> list[Any]:
    value = body.get(name, [])
    if not isinstance(value, list):
        raise TritonError(Code.INVALID, f"{name} must be a list")
    return value


def _whole(given: Mapping[str, Any], name: str, default: int, least: int) -> int:
    value = given.get(name, default)
    if type(value) is not int or value < least:
        raise TritonError(Code.INVALID, f"{name} must be a whole number of at least {least}, got {value!r}")
    return value
