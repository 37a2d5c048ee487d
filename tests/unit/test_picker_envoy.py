"""Envoy's bootstrap: what must not be lost from it."""

from typing import Any

from tidegate.picker.service import VLLM_PRIORITY_HEADER
from tidegate.render.envoy import AGAIN_HEADER, DESTINATION_HEADER, bootstrap


def built(**more: Any) -> dict[str, Any]:
    return bootstrap(listen_host="0.0.0.0", listen_port=8080, picker_host="127.0.0.1", **more)


def manager(config: dict[str, Any], name: str = "admission") -> dict[str, Any]:
    listener = next(x for x in config["static_resources"]["listeners"] if x["name"] == name)
    return listener["filter_chains"][0]["filters"][0]["typed_config"]


def route(config: dict[str, Any], name: str) -> dict[str, Any]:
    return manager(config, name)["route_config"]["virtual_hosts"][0]["routes"][0]


def test_internal_headers_are_removed_before_anything_acts_on_them() -> None:
    strip, router = manager(built(), "gateway")["http_filters"]
    removed = {m["remove"] for m in strip["typed_config"]["mutations"]["request_mutations"]}
    assert {
        DESTINATION_HEADER,
        VLLM_PRIORITY_HEADER,
        "x-envoy-original-dst-host",
        "x-envoy-retry-on",
    } <= removed
    assert router["name"] == "envoy.filters.http.router"


def test_the_picker_sees_requests_whole_and_holds_room_to_the_last_byte() -> None:
    picker, router = manager(built())["http_filters"]
    assert (picker["name"], router["name"]) == ("envoy.filters.http.ext_proc", "envoy.filters.http.router")
    assert picker["typed_config"]["processing_mode"] == {
        "request_header_mode": "SEND",
        "request_body_mode": "FULL_DUPLEX_STREAMED",
        "request_trailer_mode": "SEND",
        "response_header_mode": "SEND",
        "response_body_mode": "NONE",
        "response_trailer_mode": "SEND",
    }


def test_streams_have_no_timeouts_and_breakers_are_out_of_the_way() -> None:
    config = built()
    for name in ("gateway", "admission"):
        action = route(config, name)["route"]
        found = (action["timeout"], action["idle_timeout"], manager(config, name)["stream_idle_timeout"])
        assert found == ("0s",) * 3
    for cluster in config["static_resources"]["clusters"]:
        assert min(cluster["circuit_breakers"]["thresholds"][0].values()) >= 100_000


def test_only_what_ended_before_an_answer_is_tried_again_and_no_client_is_told() -> None:
    policy = route(built(), "gateway")["route"]["retry_policy"]
    assert policy["retry_on"] == "retriable-headers"
    assert policy["retriable_headers"] == [{"name": AGAIN_HEADER, "present_match": True}]
    assert route(built(), "gateway")["response_headers_to_remove"] == [AGAIN_HEADER]
    mappers = manager(built())["local_reply_config"]["mappers"]
    again = [
        m for m in mappers if any(h["header"]["key"] == AGAIN_HEADER for h in m.get("headers_to_add", []))
    ]
    assert again == mappers[:2]


def test_defaults_are_closed() -> None:
    config = built()
    assert config["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"
    assert manager(config)["http_filters"][0]["typed_config"]["failure_mode_allow"] is False
    assert "access_log" not in manager(config, "gateway")
    assert manager(built(access_log="/dev/stderr"), "gateway")["access_log"]


def test_the_same_arguments_build_the_same() -> None:
    assert built() == built()
