"""What Envoy's log says is read within bounds, joined with the right request, and accounted for once."""

from typing import Any

import pytest
from envoy.data.accesslog.v3 import accesslog_pb2

from support.book import BEGAN, CHAT, MODEL, Stage, entry
from tidegate.core.flow import Ask
from tidegate.core.types import Objectives
from tidegate.picker.measure.book import GRACE_S, MOST_OPEN, Attainment
from tidegate.picker.measure.exports import OTHER, Top
from tidegate.picker.measure.record import MOST_TOKENS, End, Record, Source, read, unix_s
from tidegate.render.measure import REQUEST_HEADER, access_log


@pytest.mark.parametrize(
    ("noted", "more", "tokens"),
    [
        ({"end": "12:345:"}, {}, (12, 345, Source.USAGE)),
        ({"end": ":345:"}, {}, (None, 345, Source.USAGE)),
        ({"end": "12:345:9"}, {}, (12, 345, Source.USAGE)),
        ({"end": f"1:{MOST_TOKENS + 1}:9"}, {}, (None, 9, Source.EVENTS)),
        ({"end": "1:-5:9"}, {}, (None, 9, Source.EVENTS)),
        ({"end": "1:5001:9"}, {"size": 1000}, (None, 9, Source.EVENTS)),  # more than its bytes can say
        ({"end": "1:5000:9"}, {"size": 1000}, (1, 5000, Source.USAGE)),
        ({"end": "1:٣:"}, {}, (None, None, Source.ESTIMATE)),  # a digit, but none of ours
        ({"end": "1:" + "9" * 60}, {}, (None, None, Source.ESTIMATE)),
        ({"end": "x" * 5000}, {}, (None, None, Source.ESTIMATE)),
        ({"end": "::0"}, {}, (None, 0, Source.EVENTS)),
        ({"end": "::0", "first": f"{BEGAN}000000"}, {}, (None, None, Source.ESTIMATE)),
        (
            {"end": "::0", "first": f"{BEGAN}000000"},
            {"flags": "downstream_remote_reset"},
            (None, 1, Source.EVENTS),
        ),
        ({"end": "::::"}, {}, (None, None, Source.ESTIMATE)),
        (
            {"seen": "64:6400"},
            {"size": 9600, "flags": "downstream_connection_termination"},
            (None, 96, Source.EVENTS),
        ),
        ({"seen": "64:6400"}, {"size": 100}, (None, 64, Source.EVENTS)),
        ({"seen": "64:0"}, {"size": 100}, (None, 64, Source.EVENTS)),
        ({"seen": "x:y"}, {}, (None, None, Source.ESTIMATE)),
        ({"first": f"{BEGAN}000000"}, {"flags": "upstream_remote_reset"}, (None, 1, Source.EVENTS)),
        ({}, {}, (None, None, Source.ESTIMATE)),
    ],
)
def test_tokens_are_read_within_bounds(noted: dict[str, str], more: dict[str, Any], tokens: Any) -> None:
    record = read(entry(noted, **more))
    assert record is not None
    assert (record.prompt_tokens, record.output_tokens, record.source) == tokens


@pytest.mark.parametrize(
    ("text", "first"),
    [
        (f"{BEGAN}500000", BEGAN + 0.5),
        (f"{BEGAN - 1}999000", float(BEGAN)),  # a millisecond early is the clock's grain
        (f"{BEGAN - 10}000000", None),  # ten seconds early is a clock that jumped
        (f"{BEGAN + 10**6}000000", None),
        ("soon", None),
        ("", None),
    ],
)
def test_a_first_token_is_within_its_request(text: str, first: float | None) -> None:
    record = read(entry({"first": text}))
    assert record is not None
    assert record.first_s == first


@pytest.mark.parametrize(
    ("flags", "end"),
    [
        ("", End.WHOLE),
        ("upstream_connection_termination", End.LOST),
        ("upstream_remote_reset", End.LOST),
        ("downstream_connection_termination", End.LEFT),
        ("downstream_remote_reset", End.LEFT),
    ],
)
def test_how_it_ended(flags: str, end: End) -> None:
    record = read(entry(flags=flags))
    assert record is not None
    assert record.end is end
    assert record.ended_s == BEGAN + 2.0


@pytest.mark.parametrize(
    ("grpc", "status"),
    [
        (("", ""), 200),
        (("0", ""), 200),
        (("", "0"), 200),
        (("", "14"), 503),
        (("14", ""), 503),
        (("0", "14"), 503),  # what comes last is what came of it
        (("", "3"), 400),
        (("", "x"), 200),
        (("", "-1"), 200),
    ],
)
def test_over_grpc_its_own_status_counts(grpc: tuple[str, str], status: int) -> None:
    record = read(entry(grpc=grpc))
    assert record is not None
    assert record.status == status


def test_envoy_logs_the_status_of_grpc() -> None:
    config = access_log("measure")["typed_config"]
    assert config["additional_response_headers_to_log"] == ["grpc-status"]
    assert config["additional_response_trailers_to_log"] == ["grpc-status"]


@pytest.mark.parametrize(
    ("grpc", "status", "details", "missed"),
    [
        (("", "14"), 200, "via_upstream", 1),
        (("14", ""), 200, "via_upstream", 1),
        (("", ""), 500, "via_upstream", 1),
        (("", ""), 404, "via_upstream", 0),  # the client's mistake
        (("", "3"), 200, "via_upstream", 0),
        # Envoy's own words: it is tried again, as another.
        (("14", ""), 200, "upstream_reset_before_response_started{connection_termination}", 0),
        (("", ""), 503, "upstream_reset_before_response_started{connection_termination}", 0),
    ],
)
def test_an_engine_that_answers_with_its_own_error_has_missed(
    grpc: tuple[str, str], status: int, details: str, missed: int
) -> None:
    stage = Stage()
    line = entry(grpc=grpc, status=status, details=details)
    line.request.request_headers[REQUEST_HEADER] = stage.handed()
    stage.book.take(read(line), 12.0)
    assert stage.value("tidegate_promises_total", outcome="missed") == missed
    assert stage.value("tidegate_promises_total") == missed


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("1700000000.123456", 1700000000.123456),
        ("1700000000", 1700000000.0),
        ("1700000000.", 1700000000.0),
        ("-1", None),
        ("nan", None),
        ("1e9", None),
        ("999999999999", None),
        ("1." + "1" * 99, None),
        ("", None),
        ("0", None),
    ],
)
def test_the_header_of_the_arrival(text: str, time: float | None) -> None:
    assert unix_s(text) == time


def test_what_names_no_request_is_no_record() -> None:
    nameless = entry()
    del nameless.request.request_headers[REQUEST_HEADER]
    timeless = entry()
    timeless.common_properties.ClearField("start_time")
    assert (read(nameless), read(timeless), read(accesslog_pb2.HTTPAccessLogEntry())) == (None, None, None)


# ── the book ────────────────────────────────────────────────────────────────────────────────────


def record(request: str, **more: Any) -> Record:
    given = {"first_s": BEGAN + 0.5, "ended_s": BEGAN + 1.5, "prompt_tokens": 90, "output_tokens": 11}
    return Record(request, 200, End.WHOLE, BEGAN, **(given | {"source": Source.USAGE} | more))


def test_an_entry_is_joined_with_its_request_and_counted_once() -> None:
    stage = Stage()
    name = stage.handed(tenant="acme", gpus=4)
    stage.book.take(record(name), 12.0)
    stage.book.take(record(name), 12.0)
    stage.book.ended(7, 12.0, whole=True)
    stage.book.sweep(12.0 + GRACE_S)
    assert stage.value("tidegate_measurements_total", outcome="measured") == 1
    assert stage.value("tidegate_measurements_total", outcome="unknown") == 1
    assert stage.value("tidegate_measurements_total", outcome="estimated") == 0
    labels = {"namespace": "ns", "model": "m", "qos_class": "high"}
    # From the client's arrival, not from the attempt's beginning a quarter of a second later.
    assert stage.value("tidegate_ttft_seconds_sum", **labels) == pytest.approx(0.75)
    assert stage.value("tidegate_tpot_seconds_sum", **labels) == pytest.approx(0.1)
    assert stage.value("tidegate_completion_seconds_sum", **labels) == pytest.approx(1.75)
    assert stage.value("tidegate_served_tokens_total", kind="prompt", source="usage") == 90
    assert stage.value("tidegate_served_tokens_total", kind="output", source="usage") == 11
    assert stage.value("tidegate_promises_total", outcome="kept", **labels) == 1
    assert stage.told == [(7, 90, 11)]
    [(key, (prompt, output, gpu_s))] = list(stage.book.tenants)
    assert (key, prompt, output) == ((*MODEL, "high", "acme"), 90, 11)
    assert gpu_s == pytest.approx(stage.value("tidegate_served_gpu_seconds_total"))


def test_a_replica_of_four_gpus_uses_four_times_the_gpu_time() -> None:
    used = []
    for gpus in (1, 4):
        stage = Stage()
        stage.book.take(record(stage.handed(gpus=gpus)), 12.0)
        used.append(stage.value("tidegate_served_gpu_seconds_total"))
    assert used[0] > 0
    assert used[1] == pytest.approx(4 * used[0])


@pytest.mark.parametrize("forged", ["7", "7-", "7-0123456789abcdef", "-", "", "٧-x", "9" * 30 + "-x", "8-x"])
def test_an_entry_that_does_not_know_the_secret_is_not_taken(forged: str) -> None:
    stage = Stage()
    stage.handed()
    stage.book.take(record(forged), 12.0)
    assert stage.value("tidegate_measurements_total", outcome="unknown") == 1
    assert stage.value("tidegate_promises_total") == 0


def test_what_no_entry_came_for_is_estimated_and_says_so() -> None:
    stage = Stage()
    stage.handed(streamed=True)
    stage.book.ended(7, 11.0, whole=True)
    stage.book.sweep(11.0 + GRACE_S - 0.1)
    assert stage.value("tidegate_measurements_total") == 0
    stage.book.sweep(11.0 + GRACE_S)
    assert stage.value("tidegate_measurements_total", outcome="estimated") == 1
    assert stage.value("tidegate_served_tokens_total", kind="output", source="estimate") == 50
    assert stage.value("tidegate_ttft_seconds_count") == 0  # nobody saw a first token
    assert stage.value("tidegate_promises_total", outcome="untold") == 1
    assert stage.told == []  # an estimate corrects nothing


@pytest.mark.parametrize(
    ("more", "outcome"),
    [
        ({}, "kept"),
        ({"first_s": BEGAN + 0.8}, "missed"),  # 1.05 s after the client came
        ({"end": End.LOST}, "missed"),
        ({"end": End.LEFT}, "untold"),
        ({"end": End.LEFT, "first_s": None, "ended_s": BEGAN + 5.0}, "missed"),  # it waited long enough
        ({"end": End.LEFT, "first_s": None, "ended_s": BEGAN + 0.1}, "untold"),
        ({"status": 503, "end": End.LOST}, None),  # before an answer: it is tried again, as another
        ({"status": 400}, None),  # the client's mistake
        ({"status": 503, "end": End.LEFT, "first_s": None, "ended_s": BEGAN + 5.0}, "missed"),
    ],
)
def test_which_promises_are_missed(more: dict[str, Any], outcome: str | None) -> None:
    stage = Stage()
    name = stage.handed()
    given = {"request": name, "status": 200, "end": End.WHOLE, "started_s": BEGAN, "first_s": BEGAN + 0.5}
    given |= {"ended_s": BEGAN + 1.5, "prompt_tokens": 90, "output_tokens": 11, "source": Source.USAGE}
    stage.book.take(Record(**(given | more)), 12.0)
    found = {w: stage.value("tidegate_promises_total", outcome=w) for w in ("kept", "missed", "untold")}
    assert found == {"kept": 0, "missed": 0, "untold": 0} | ({outcome: 1} if outcome else {})


def test_the_last_attempt_of_all_is_a_promise_missed() -> None:
    stage = Stage()
    for number, last in ((1, False), (2, True)):
        request = stage.handed(number, last=last)
        stage.book.take(Record(request, 503, End.LOST, BEGAN, ended_s=BEGAN + 1.0), 12.0)
        assert stage.value("tidegate_promises_total", outcome="missed") == int(last)


def test_a_refusal_is_a_promise_missed_where_one_was_made() -> None:
    stage = Stage()
    ask = Ask(1, MODEL, "high", 1, 1)
    stage.book.refused(ask, CHAT, 1.0)
    stage.book.refused(ask, Objectives(), 1.0)
    assert stage.value("tidegate_promises_total", outcome="missed") == 1
    [(model, qos_class, promised, good, judged)] = stage.book.attainment(1.0)
    assert (model, qos_class, promised.attainment, good, judged) == (MODEL, "high", 0.99, 0, 1)


def test_attainment_is_shown_over_the_class_s_window() -> None:
    stage = Stage()
    now = 10.0
    gauges = Attainment(stage.book, lambda: now)
    for n in range(1, 5):
        stage.book.take(record(stage.handed(n), first_s=BEGAN + (0.5 if n < 4 else 2.0)), now)
    shown = {f.name: [s.value for s in f.samples] for f in gauges.collect()}
    assert shown == {
        "tidegate_attainment_ratio": [0.75],
        "tidegate_attainment_objective_ratio": [0.99],
        "tidegate_attainment_kept_requests": [3],
        "tidegate_attainment_judged_requests": [4],
    }
    now += 3700.0
    assert all(not f.samples for f in gauges.collect())
    [row] = stage.book.describe(now)
    assert (row["attainment"], row["judged"], row["answers"], row["ttft_p99_s"]) == (None, 0, 0, None)


def test_what_stands_open_is_bounded() -> None:
    stage = Stage()
    for n in range(1, MOST_OPEN + 11):
        stage.handed(n)
    assert len(stage.book._open) == MOST_OPEN
    assert stage.value("tidegate_measurements_total", outcome="forgotten") == 10


def test_measured_lengths_make_the_estimate() -> None:
    stage = Stage()
    for n in range(1, 31):
        stage.book.take(record(stage.handed(n)), 12.0)
    assert stage.book.outputs.expected(MODEL, "high", "", 500) == 11


def test_the_heaviest_tenants_have_names_and_no_series_shrinks() -> None:
    top = Top(most=2)
    shown: dict[tuple[str, ...], float] = {}

    def add(tenant: str, gpu_s: float) -> None:
        top.add(MODEL, "high", tenant, (1.0, 1.0, gpu_s))
        now = {key: spent[2] for key, spent in top}
        assert all(value >= shown.get(key, 0.0) for key, value in now.items())
        shown.clear()
        shown.update(now)

    for tenant in ("a", "b", "small", "a", "b"):
        add(tenant, 1.0)
    assert {key[3] for key in shown} == {"a", "b", OTHER}
    for _ in range(10):
        add("c", 1.0)
    assert {key[3] for key in shown} == {"c", "b", OTHER} or {key[3] for key in shown} == {"a", "c", OTHER}
    for n in range(5000):
        add(f"t{n}", 0.001)
    assert len(shown) == 3
    assert len(top._candidates) <= 1000
