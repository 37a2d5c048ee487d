"""The emulated Triton's command line, its repository, and its bodies."""

import json
import struct

import pytest

from tidegate.local.engines.common import Knobs
from tidegate.local.engines.promtext import Histogram, family, labels
from tidegate.local.engines.triton_args import NoModelsError, parse
from tidegate.local.engines.triton_core import Ask, Code, TritonError
from tidegate.local.engines.triton_wire import infer_answer, parse_generate, parse_infer, strings, values

KNOBS = Knobs()
ENV = {"TIDEGATE_EMULATOR_MODELS": "m, k"}


def bytes_tensor(*texts: str) -> bytes:
    return b"".join(struct.pack("<I", len(t.encode())) + t.encode() for t in texts)


@pytest.mark.parametrize(
    ("argv", "load"),
    [
        pytest.param([], {"m", "k"}, id="all are loaded"),
        pytest.param(["--model-control-mode=explicit"], set(), id="explicit loads none"),
        pytest.param(
            ["--model-control-mode=explicit", "--load-model=k"], {"k"}, id="explicit loads what is named"
        ),
        pytest.param(
            ["--model-control-mode", "explicit", "--load-model", "*"], {"m", "k"}, id="star loads all"
        ),
    ],
)
def test_what_is_loaded(argv, load):
    assert parse(argv, KNOBS, ENV).load == load


def test_ports_and_names():
    args = parse(["tritonserver", "--http-port", "1", "--metrics-port=2", "--allow-grpc=false"], KNOBS, ENV)
    assert (args.http_port, args.metrics_port, args.grpc_port) == (1, 2, None)
    assert [m.name for m in args.models] == ["m", "k"]
    args = parse(["--load-model=a", "--allow-metrics=0", "--log-verbose=1"], KNOBS, {})
    assert [m.name for m in args.models] == ["a"]
    assert (args.metrics_port, args.grpc_port, args.not_emulated) == (None, 8001, ("--log-verbose",))


def test_the_repository_goes_before_the_environment(tmp_path):
    (tmp_path / "llama" / "1").mkdir(parents=True)
    (tmp_path / "plain").mkdir()
    settings = {"model": "x", "max_num_seqs": 16, "num_gpu_blocks_override": 101, "max_model_len": 9999}
    (tmp_path / "llama" / "1" / "model.json").write_text(json.dumps(settings))
    env = ENV | {"TIDEGATE_EMULATOR_MAX_NUM_SEQS": "8", "TIDEGATE_EMULATOR_MAX_NUM_BATCHED_TOKENS": "512"}
    args = parse([f"--model-repository={tmp_path}"], KNOBS, env)
    llama, plain = args.models
    assert (llama.name, llama.engine.max_num_seqs, llama.max_model_len) == ("llama", 16, 1600)
    assert (plain.name, plain.engine.max_num_seqs, plain.engine.max_num_batched_tokens) == ("plain", 8, 512)


def test_a_model_to_load_that_the_repository_lacks_is_told(tmp_path):
    (tmp_path / "llama").mkdir()
    argv = [f"--model-repository={tmp_path}", "--model-control-mode=explicit", "--load-model=zz"]
    with pytest.raises(NoModelsError, match="zz is not in the repository"):
        parse(argv, KNOBS, {})


def test_a_server_without_models_ends():
    with pytest.raises(NoModelsError, match="TIDEGATE_EMULATOR_MODELS"):
        parse(["--model-repository=/nowhere"], KNOBS, {})


@pytest.mark.parametrize(
    ("argv", "env", "message"),
    [
        pytest.param(["--http-port=0"], ENV, "not a port", id="port"),
        pytest.param(["--model-control-mode=maybe"], ENV, "invalid choice", id="mode"),
        pytest.param(["--allow-grpc=perhaps"], ENV, "neither true nor false", id="switch"),
        pytest.param(["stray"], ENV, "unrecognized arguments: stray", id="stray word"),
        pytest.param([], ENV | {"TIDEGATE_EMULATOR_MAX_NUM_SEQS": "x"}, "MAX_NUM_SEQS", id="slots"),
    ],
)
def test_nonsense_is_refused(argv, env, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse(argv, KNOBS, env)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def infer(**changes) -> dict:
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["hi"]}
    return {"inputs": [tensor], **changes}


def test_infer_as_json():
    body = infer(id="7", parameters={"priority": 1, "max_tokens": 9})
    assert parse_infer(json.dumps(body).encode(), None).ask == Ask(("hi",), id="7", priority=1, max_tokens=9)


def test_infer_with_binary_tensors():
    texts = bytes_tensor("hello", "wörld")
    tokens = struct.pack("<i", 5)
    tensors = [
        {
            "name": "text_input",
            "datatype": "BYTES",
            "shape": [2, 1],
            "parameters": {"binary_data_size": len(texts)},
        },
        {
            "name": "max_tokens",
            "datatype": "INT32",
            "shape": [1],
            "parameters": {"binary_data_size": len(tokens)},
        },
    ]
    head = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True}}).encode()
    body = parse_infer(head + texts + tokens, str(len(head)))
    assert body.binary
    assert body.ask == Ask(("hello", "wörld"), shape=(2, 1), max_tokens=5)
    payload, headers = infer_answer("m", body, ["a", "bcd"])
    length = int(headers["Inference-Header-Content-Length"])
    output = json.loads(payload[:length])["outputs"][0]
    assert output["shape"] == [2, 1]
    assert output["parameters"]["binary_data_size"] == len(payload) - length
    assert list(strings(payload[length:])) == ["a", "bcd"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param({"text_input": "hi"}, Ask(("hi",)), id="defaults"),
        pytest.param(
            {"text_input": "hi", "max_tokens": 5, "priority": 2},
            Ask(("hi",), max_tokens=5, priority=2),
            id="top",
        ),
        pytest.param(
            {"text_input": "hi", "parameters": {"max_tokens": 5, "priority": 2, "ignore_eos": True}},
            Ask(("hi",), max_tokens=5, priority=2, ignore_eos=True),
            id="parameters",
        ),
        pytest.param(
            {"text_input": "hi", "sampling_parameters": '{"max_tokens": "5", "min_tokens": 2}'},
            Ask(("hi",), max_tokens=5, min_tokens=2),
            id="sampling parameters as a string",
        ),
        pytest.param(
            {"text_input": "hi", "exclude_input_in_output": True},
            Ask(("hi",), with_prompt=False),
            id="no prompt",
        ),
    ],
)
def test_generate(body, expected):
    assert parse_generate(json.dumps(body).encode(), stream=False) == expected


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        pytest.param(b"{", "failed to parse the request JSON", id="no JSON"),
        pytest.param(b"[]", "not an object", id="no object"),
        pytest.param(b"{}", "text_input", id="no inputs"),
        pytest.param(infer(inputs={}), "inputs must be a list", id="inputs no list"),
        pytest.param(infer(inputs=[{}]), "with a name", id="no name"),
        pytest.param(infer(outputs=[{"name": "logits"}]), "unexpected inference output", id="other output"),
        pytest.param(infer(parameters={"priority": -1}), "priority must be", id="negative priority"),
        pytest.param(infer(parameters={"max_tokens": "x"}), "max_tokens must be", id="max_tokens"),
        pytest.param(infer(parameters={"min_tokens": 17}), "exceeds max_tokens", id="min_tokens"),
        pytest.param(
            infer(inputs=[{"name": "text_input", "datatype": "BYTES", "shape": [2], "data": ["hi"]}]),
            "wants 2 elements, got 1",
            id="shape",
        ),
        pytest.param(
            infer(inputs=[{"name": "t", "shape": [1], "parameters": {"binary_data_size": 4}}]),
            "binary_data_size does not match",
            id="binary data missing",
        ),
    ],
)
def test_bad_infer_bodies(raw, message):
    raw = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
    with pytest.raises(TritonError, match=message) as error:
        parse_infer(raw, None)
    assert error.value.code is Code.INVALID


@pytest.mark.parametrize(
    ("datatype", "raw", "message"),
    [
        pytest.param("BYTES", b"\x01\x00", "in the middle of a length", id="length cut"),
        pytest.param("BYTES", b"\x09\x00\x00\x00abc", "in the middle of an element", id="element cut"),
        pytest.param("BYTES", b"\x01\x00\x00\x00\xff", "not UTF-8", id="no text"),
        pytest.param("INT32", b"\x01\x00", "cannot read 2 bytes", id="size"),
        pytest.param("FP8", b"\x01", "cannot read 1 bytes", id="datatype"),
    ],
)
def test_bad_binary_tensors(datatype, raw, message):
    with pytest.raises(TritonError, match=message):
        values(datatype, raw)


def test_a_json_length_beyond_the_body_is_refused():
    with pytest.raises(TritonError, match="Inference-Header-Content-Length"):
        parse_infer(b"{}", "3")


def test_prometheus_text():
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7.0):
        histogram.observe(value)
    text = labels({"model": 'a"b\\c\nd'})
    assert text == 'model="a\\"b\\\\c\\nd"'
    assert histogram.render("h", "Help.", 'm="x"') == [
        "# HELP h Help.",
        "# TYPE h histogram",
        'h_bucket{m="x",le="0.1"} 2.0',
        'h_bucket{m="x",le="1.0"} 3.0',
        'h_bucket{m="x",le="+Inf"} 4.0',
        'h_sum{m="x"} 7.65',
        'h_count{m="x"} 4.0',
    ]
    assert family("g", "gauge", "Help.", [('m="x"', 2)])[-1] == 'g{m="x"} 2.0'
