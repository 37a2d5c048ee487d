"""A profile's design, how times of tokens become samples, and how it is told."""

import json
from dataclasses import replace

import pytest
import yaml

from support.profiles import CHUNK, answers, design, line
from tidegate.core.stepfit import Fitted, Sample, Step, fit_steps
from tidegate.core.steptime import LLAMA3_8B_A100 as TRUTH
from tidegate.core.steptime import Branch, StepFit
from tidegate.profile import reduce, report
from tidegate.profile.client import Answer
from tidegate.profile.design import Decode, Limits, Mixed, Prefill, decode_tokens, trials
from tidegate.profile.run import Profile

LIMITS = [
    pytest.param(Limits(2048, 8192, 32), id="as vLLM comes"),
    pytest.param(Limits(8192, 131072, 256), id="a large one"),
    pytest.param(Limits(2048, 1024, 32), id="requests shorter than a chunk"),
    pytest.param(Limits(64, 256, 1), id="the least"),
    pytest.param(Limits(512, 4096, 5), id="five streams"),
]


# Design


@pytest.mark.parametrize("limits", LIMITS)
def test_every_request_fits_the_engine(limits):
    for trial in trials(limits):
        if isinstance(trial, Prefill):
            assert 1 <= trial.tokens < limits.max_model_len
        else:
            assert trial.streams <= limits.streams
            assert trial.context + decode_tokens(trial, limits, 0.001) < limits.max_model_len
        if isinstance(trial, Mixed):
            assert all(1 <= p < limits.max_model_len for p in trial.prompts)


@pytest.mark.parametrize("limits", LIMITS)
def test_each_kind_is_there_from_the_start(limits):
    plan = trials(limits)
    assert {type(t) for t in plan[:3]} == {Prefill, Decode, Mixed}
    assert {t.streams for t in plan if isinstance(t, Decode)} >= {1, limits.streams}
    assert len(plan) == len(set(plan))


def test_the_design_as_vllm_comes():
    plan = trials(Limits(2048, 8192, 32))
    prefills = sorted(t.tokens for t in plan if isinstance(t, Prefill))
    assert (prefills[0], prefills[-3:]) == (32, [2170, 3072, 4915])
    decodes = {(t.streams, t.context) for t in plan if isinstance(t, Decode)}
    short = {(n, 64) for n in (1, 2, 4, 8, 16, 32)}
    assert decodes == short | {(1, 6144), (8, 2048), (32, 512)}
    mixed = [(t.streams, t.context) for t in plan if isinstance(t, Mixed)]
    assert mixed == [(2, 64), (8, 64), (32, 64), (8, 2048)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param((2048, 8192, 0), "streams must be at least 1, got 0", id="no streams"),
        pytest.param((63, 8192, 1), "chunk must be at least 64 tokens", id="a small chunk"),
        pytest.param((256, 8192, 200), "chunk must be at least 400 tokens", id="many streams"),
        pytest.param((2048, 255, 32), "max_model_len must be at least 256, got 255", id="short requests"),
    ],
)
def test_limits_that_leave_nothing_to_measure(values, message):
    with pytest.raises(ValueError, match=message):
        Limits(*values)


def test_streams_outlast_what_is_measured():
    limits = Limits(2048, 8192, 32)
    trial = Mixed(8, 2048, (1000, 5000))
    # 16 steps to measure and 4 spare, 7 to send and 9 to prefill; a chunk and three, and 9 after each.
    assert decode_tokens(trial, limits, 0.01) == 16 + 4 + 7 + 9 + 1 + 3 + 2 * 9


# Samples


@pytest.mark.parametrize("prompt", [32, 500, 2048, 2049, 5000])
def test_a_prompt_alone(prompt):
    (answer,) = answers([(1.0, prompt, 1)])
    sample = reduce.prefill_sample(answer, CHUNK, 0.0)
    assert sample.requests == 1
    assert sum(s.prefill for s in sample.steps) == prompt
    assert sum(TRUTH.seconds(*s) for s in sample.steps) == pytest.approx(sample.seconds)


def test_the_round_trip_is_taken_off():
    (answer,) = answers([(1.0, 100, 1)])
    whole = reduce.prefill_sample(answer, CHUNK, 0.0)
    assert reduce.prefill_sample(answer, CHUNK, 0.005).seconds == pytest.approx(whole.seconds - 0.005)
    assert reduce.prefill_sample(answer, CHUNK, 10.0) is None


@pytest.mark.parametrize(("streams", "context"), [(1, 64), (8, 64), (32, 512), (4, 3000)])
def test_streams_that_decode(streams, context):
    tokens = decode_tokens(Decode(streams, context), Limits(CHUNK, 8192, 32), 0.02)
    sample = reduce.decode_sample(answers([(0.0, context, tokens)] * streams))
    (step,) = sample.steps
    assert (step.prefill, step.decodes, sample.requests) == (0, streams, 0)
    assert TRUTH.seconds(*step) == pytest.approx(sample.seconds, rel=1e-3)


def test_a_stall_and_jitter_hardly_move_a_decode():
    seen = answers([(0.0, 64, 24)] * 8, jitter=0.002)
    for answer in seen:
        answer.arrivals = [t + 0.5 * (i > 15) for i, t in enumerate(answer.arrivals)]
    sample = reduce.decode_sample(seen)
    assert sample.seconds == pytest.approx(TRUTH.seconds(*sample.steps[0]), rel=0.1)


@pytest.mark.parametrize(
    ("seconds", "kept", "apart"),
    [
        pytest.param([0.2], [0.2], 0.0, id="once"),
        pytest.param([0.3, 0.2], [0.2], 0.5, id="twice"),
        pytest.param([0.5, 0.2, 0.3], [0.2, 0.3], 1.5, id="an odd number"),
        pytest.param([0.2, 0.2, 0.2, 0.2], [0.2, 0.2], 0.0, id="a quiet machine"),
    ],
)
def test_the_slower_half_of_the_repeats_is_left_out(seconds, kept, apart):
    repeats = [Sample((Step(8),), s) for s in seconds]
    assert [s.seconds for s in reduce.undisturbed(repeats)] == kept
    assert reduce.apart([repeats, repeats[:1]]) == pytest.approx(apart)


def test_streams_that_take_turns_give_nothing():
    turns = [(0.0, 64, 20), (10.0, 64, 20)]
    assert reduce.decode_sample(answers(turns)) is None


def mixed(prompts, streams=8, context=64, **more):
    """Streams from 0 s on, and a prompt each second from 2 s on: (streams, probes)."""
    requests = [(0.0, context, 700)] * streams + [(2.0 + i, p, 1) for i, p in enumerate(prompts)]
    seen = answers(requests, **more)
    return seen[:streams], seen[streams:]


@pytest.mark.parametrize("streams", [1, 8, 32])
def test_a_prompt_among_decodes(streams):
    background, probes = mixed((64, 500, 1800, 5000), streams)
    for probe in probes:
        sample = reduce.mixed_sample(background, probe, CHUNK)
        assert sum(s.prefill for s in sample.steps) == probe.prompt_tokens
        assert {s.decodes for s in sample.steps} == {streams}
        assert sum(TRUTH.seconds(*s) for s in sample.steps) == pytest.approx(sample.seconds, rel=2e-3)


def test_jitter_hardly_moves_a_mixed_step():
    background, (probe,) = mixed((1800,), jitter=0.002)
    sample = reduce.mixed_sample(background, probe, CHUNK)
    assert sample.seconds == pytest.approx(TRUTH.seconds(*sample.steps[0]), rel=0.05)


def test_a_prompt_after_the_streams_or_before_them_gives_nothing():
    background, _ = mixed(())
    early, late = Answer(-1.0, [-0.5], 100), Answer(100.0, [101.0], 100)
    assert reduce.mixed_sample(background, early, CHUNK) is None
    assert reduce.mixed_sample(background, late, CHUNK) is None


def at_probe(answer: Answer, probe: Answer) -> int:
    """The token that came with a probe's first."""
    return min(range(len(answer.arrivals)), key=lambda i: abs(answer.arrivals[i] - probe.arrivals[0]))


@pytest.mark.parametrize(
    ("token", "late_s"),
    [
        pytest.param(-1, 0.5, id="the one before came with it"),
        pytest.param(0, 0.014, id="the one with it came with the next"),
        pytest.param(-2, 0.014, id="an earlier one was late"),
    ],
)
def test_one_late_token_does_not_move_a_mixed_step(token, late_s):
    background, (probe,) = mixed((1800,))
    expected = reduce.mixed_sample(background, probe, CHUNK)
    for answer in background:
        at = at_probe(answer, probe) + token
        answer.arrivals[at] = min(answer.arrivals[at] + late_s, answer.arrivals[at + 1])
    assert reduce.mixed_sample(background, probe, CHUNK).seconds == pytest.approx(expected.seconds, rel=0.01)


def test_a_probe_whose_token_comes_a_step_late_is_found_all_the_same():
    background, (probe,) = mixed((1800,))
    expected = reduce.mixed_sample(background, probe, CHUNK)
    probe.arrivals[0] += 0.014
    assert reduce.mixed_sample(background, probe, CHUNK).seconds == pytest.approx(expected.seconds, rel=2e-3)


@pytest.mark.parametrize(
    ("engine", "verdict"),
    [
        pytest.param(CHUNK, 0, id="as said"),
        pytest.param(CHUNK // 2, -1, id="half of it"),
        pytest.param(CHUNK * 2, 1, id="twice"),
        pytest.param(CHUNK * 4, 1, id="four times"),
    ],
)
def test_a_chunk_that_is_not_the_engines_shows(engine, verdict):
    background, (probe,) = mixed((4896,), chunk=engine)
    assert reduce.wrong_chunk(background, probe, CHUNK) == verdict


def test_a_prompt_of_one_chunk_says_nothing_about_it():
    background, (probe,) = mixed((500,))
    assert reduce.wrong_chunk(background, probe, CHUNK) == 0


def test_all_of_it_together_finds_the_engine_again():
    """Every trial of the design against the modelled engine, with jitter, in virtual time."""
    limits = Limits(CHUNK, 8192, 32)
    samples = []
    for trial in trials(limits):
        match trial:
            case Prefill(tokens):
                (answer,) = answers([(0.0, tokens, 1)], jitter=0.001)
                samples.append(reduce.prefill_sample(answer, CHUNK, 0.001))
            case Decode(streams, context):
                seen = answers([(0.0, context, decode_tokens(trial, limits, 0.02))] * streams, jitter=0.001)
                samples.append(reduce.decode_sample(seen))
            case Mixed(streams, context, prompts):
                background, probes = mixed(prompts, streams, context, jitter=0.001)
                samples += [reduce.mixed_sample(background, p, CHUNK) for p in probes]
    found = fit_steps(samples, name="a", source="b").fit
    assert found.residual.median < 0.03
    for prefill in (0, 64, 300, 600, 1500):
        for decodes in (0, 1, 8, 32):
            if prefill + decodes:
                step = (prefill, decodes, decodes * 100)
                assert found.seconds(*step) == pytest.approx(TRUTH.seconds(*step), rel=0.07), step


# Telling it


def profile_of(fitted: Fitted, samples, notes=()) -> Profile:
    return Profile("org/Llama-3.1_8B", fitted, samples, 0.0012, 41.7, 2.4, list(notes))


ONE_LINE = design(line(Branch(0.010, 0.0, 1e-4, 2e-4, 1e-7, 1e-6)), request_s=0.004)


def test_text_has_units_residuals_and_what_is_not_known():
    decodes = [s for s in ONE_LINE if s.steps[0].prefill == 0]
    found = fit_steps(decodes, name="a", source="b")
    text = report.as_text(profile_of(found, decodes, ["the note"]))
    assert "9 samples in 42 s, 2.4 rounds" in text
    assert ["decode", "200.00", "µs"] in [row.split() for row in text.splitlines()]
    assert "not identified: per_prefill_s\nnot identified: per_prefill_context_s\n" in text
    assert "residuals: median 0.0%, 90th percentile 0.0% of the time" in text
    assert text.endswith("note: the note")


def test_text_of_two_lines_and_of_a_whole_fit():
    text = report.as_text(profile_of(Fitted(TRUTH, 0.0021, ()), []))
    assert "up to 512 tokens" in text
    rows = [row.split() for row in text.splitlines()]
    assert ["prefill", "token", "81.30", "µs", "95.82", "µs"] in rows
    assert "outside of steps: 2.1 ms a request, after a round trip of 1.2 ms" in text
    assert "every term is identified" in text
    assert "attention" not in text
    assert "repeats" not in text


def test_text_of_attention_and_of_repeats_that_were_apart():
    fit = replace(TRUTH, per_prefill_pair_s=7e-8)
    text = report.as_text(replace(profile_of(Fitted(fit, 0.0, ()), []), left_out=12, spread=0.31))
    rows = [row.split() for row in text.splitlines()]
    assert ["pair", "of", "attention", "70.00", "ns", "70.00", "ns"] in rows
    assert "repeats: the slowest took 31% longer than the fastest" in text
    assert "the slower half, 12 samples, was left out" in text


def test_json_can_be_read_back():
    fitted = fit_steps(ONE_LINE, name="a", source="b")
    data = json.loads(json.dumps(report.as_json(profile_of(fitted, ONE_LINE))))
    assert StepFit.from_json(data["fit"]) == fitted.fit
    assert len(data["samples"]) == len(ONE_LINE)
    assert Step(**data["samples"][0]["steps"][0]) == ONE_LINE[0].steps[0]


def test_the_configmap_holds_the_fit():
    fitted = fit_steps(ONE_LINE, name="a", source="b")
    manifest = yaml.safe_load(report.as_configmap(profile_of(fitted, ONE_LINE)))
    assert (manifest["apiVersion"], manifest["kind"]) == ("v1", "ConfigMap")
    assert manifest["metadata"]["name"] == "step-time-org-llama-3.1-8b"
    assert StepFit.from_json(json.loads(manifest["data"]["step-time.json"])) == fitted.fit


@pytest.mark.parametrize(
    ("model", "name"),
    [
        pytest.param("org/Llama-3.1_8B", "step-time-org-llama-3.1-8b", id="a usual one"),
        pytest.param("..//__", "step-time", id="nothing that can stay"),
        pytest.param("a-.-b", "step-time-a.b", id="no label may begin or end with a dash"),
        pytest.param("x" * 80, "step-time-xxxxx", id="a long one"),
    ],
)
def test_names_of_configmaps(model, name):
    made = report.configmap_name(model)
    assert made.startswith(name)
    assert len(made) <= 63
    assert made == name or len(model) > 50
