"""vLLM's command line as the emulator reads it."""

import pytest

from tidegate.local.engines.common import Knobs, count_tokens, draw_output
from tidegate.local.engines.vllm_args import parse
from tidegate.sim.types import Policy

KNOBS = Knobs()


@pytest.mark.parametrize(
    ("argv", "field", "expected"),
    [
        pytest.param(["--model", "m"], "names", ("m",), id="served under its own name"),
        pytest.param(["serve", "m"], "model", "m", id="vllm serve MODEL"),
        pytest.param(["m", "--port", "81"], "port", 81, id="positional model"),
        pytest.param(["--model", "m", "--served-model-name", "a", "b"], "names", ("a", "b"), id="names"),
        pytest.param(["--model=m"], "host", "127.0.0.1", id="host by default"),
        pytest.param(["--model=m", "--host", "127.0.0.5"], "host", "127.0.0.5", id="host"),
        pytest.param(["--model=m"], "max_model_len", 8192, id="length by default"),
        pytest.param(["--model=m", "--max-model-len", "2K"], "max_model_len", 2048, id="2K"),
        pytest.param(["--model=m", "--max-model-len", "2k"], "max_model_len", 2000, id="2k"),
        pytest.param(
            ["--model=m", "--num-gpu-blocks-override=11"], "max_model_len", 160, id="what the KV holds"
        ),
        pytest.param(
            ["--model=m", "--shutdown-timeout", "5"], "shutdown_timeout_s", 5.0, id="shutdown timeout"
        ),
        pytest.param(
            ["--model=m", "--swap-space", "4"], "not_emulated", ("--swap-space",), id="unknown flag"
        ),
        pytest.param(["--model=m", "--swap-space=4"], "not_emulated", ("--swap-space",), id="unknown with ="),
        pytest.param(["--model=m", "--seed", "-1"], "not_emulated", ("--seed",), id="negative value"),
        pytest.param(["--model=m", "--dtype", "bfloat16"], "not_emulated", (), id="harmless"),
    ],
)
def test_arguments(argv, field, expected):
    assert getattr(parse(argv, KNOBS), field) == expected


@pytest.mark.parametrize(
    ("argv", "field", "expected"),
    [
        pytest.param([], "max_num_seqs", 256, id="slots by default"),
        pytest.param(["--max-num-seqs=16"], "max_num_seqs", 16, id="slots"),
        pytest.param(["--max_num_seqs=16"], "max_num_seqs", 16, id="underscores"),
        pytest.param([], "max_num_batched_tokens", 2048, id="budget by default"),
        pytest.param(["--max-num-batched-tokens", "512"], "max_num_batched_tokens", 512, id="budget"),
        pytest.param(["--block-size", "32"], "block_size", 32, id="block size"),
        pytest.param([], "num_blocks", 25_000, id="blocks by default"),
        pytest.param(["--num-gpu-blocks-override", "4096"], "num_blocks", 4096, id="blocks"),
        pytest.param(["--scheduling-policy", "priority"], "policy", Policy.PRIORITY, id="policy"),
        pytest.param([], "async_scheduling", True, id="async by default"),
        pytest.param([], "enable_prefix_caching", False, id="no prefix cache unless asked for"),
        pytest.param(["--enable-prefix-caching"], "enable_prefix_caching", True, id="prefix cache"),
        pytest.param(["--no-enable-prefix-caching"], "enable_prefix_caching", False, id="and none"),
        pytest.param(["--no-async-scheduling"], "async_scheduling", False, id="not async"),
        pytest.param(
            ["--no-scheduler-reserve-full-isl"],
            "scheduler_reserve_full_isl",
            False,
            id="first chunk is enough",
        ),
    ],
)
def test_scheduler_settings(argv, field, expected):
    assert getattr(parse(["--model", "m", *argv], KNOBS).engine, field) == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param([], "required: --model", id="no model"),
        pytest.param(["a", "--model", "b"], "given twice", id="two models"),
        pytest.param(["--model", "m", "--max-num-seqs", "many"], "invalid", id="no number"),
        pytest.param(["--model", "m", "--port", "0"], "not a port", id="port"),
        pytest.param(["--model", "m", "stray"], "unrecognized arguments: stray", id="stray word"),
        pytest.param(["--model", "m", "--max-model-len", "long"], "8192, 8k or 8K", id="length"),
        pytest.param(
            ["--model", "m", "--max-num-batched-tokens", "8", "--max-num-seqs", "16"],
            "must be greater than or equal to max_num_seqs (16)",
            id="budget below slots",
        ),
        pytest.param(
            ["--model", "m", "--max-model-len", "8192", "--num-gpu-blocks-override", "16"],
            "240 tokens",
            id="context beyond the KV cache",
        ),
        pytest.param(["--model", "m", "--num-gpu-blocks-override", "1"], "null block", id="too few blocks"),
        pytest.param(["--model", "m", "--shutdown-timeout", "-1"], "negative", id="shutdown timeout"),
    ],
)
def test_nonsense_is_refused_as_argparse_does(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse(argv, KNOBS)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_knobs_from_the_environment():
    env = {
        "TIDEGATE_EMULATOR_SPEED": "2.5",
        "TIDEGATE_EMULATOR_COLD_START": "4",
        "TIDEGATE_EMULATOR_KV_BLOCKS": "4096",
        "POD_IP": "127.3.0.1",
    }
    knobs = Knobs.read(env)
    assert knobs == Knobs(speed=2.5, cold_start_s=4.0, kv_blocks=4096, bind="127.3.0.1")
    assert parse(["--model", "m", "--host", "0.0.0.0"], knobs).host == "127.3.0.1"
    assert parse(["--model", "m"], knobs).engine.num_blocks == 4096
    assert Knobs.read({}) == Knobs()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("TIDEGATE_EMULATOR_SPEED", "fast", id="no number"),
        pytest.param("TIDEGATE_EMULATOR_SPEED", "0", id="stands still"),
        pytest.param("TIDEGATE_EMULATOR_SPEED", "nan", id="nan"),
        pytest.param("TIDEGATE_EMULATOR_COLD_START", "-1", id="negative"),
        pytest.param("TIDEGATE_EMULATOR_KV_BLOCKS", "1", id="only the null block"),
    ],
)
def test_bad_knobs_name_the_variable(name, value):
    with pytest.raises(ValueError, match=name):
        Knobs.read({name: value})


@pytest.mark.parametrize(
    ("text", "tokens"), [("", 1), ("a", 1), ("abcd", 1), ("abcde", 2), ("é" * 4, 2), ("日本語", 3)]
)
def test_a_token_is_four_bytes(text, tokens):
    assert count_tokens(text) == tokens


def test_drawn_lengths_keep_their_bounds_and_mean():
    drawn = [draw_output(str(i).encode(), 1, 100_000) for i in range(4000)]
    assert all(ends for _, ends in drawn)
    assert sum(n for n, _ in drawn) / len(drawn) == pytest.approx(220, rel=0.06)
    assert all(10 <= draw_output(str(i).encode(), 10, 20)[0] <= 20 for i in range(200))
    assert draw_output(b"x", 5, 5) == (5, False)
