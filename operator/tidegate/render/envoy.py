"""Envoy's bootstrap: one listener, the picker asked once per request, engines by address.

Envoy carries the bytes. The picker answers with the destination in a header, and an ORIGINAL_DST
cluster connects there. The facts behind the choices were seen on Envoy 1.40 and are listed in
docs/concepts/request-path.md.
"""

import ipaddress
from typing import Any, Final

DESTINATION_HEADER: Final = "x-gateway-destination-endpoint"
"""Names the engine, `ip:port`. Set by the picker only; a client's own is removed."""
LOCAL_DETAILS: Final = "tidegate"
"""Every immediate answer of the picker carries this in its response code details."""

STRIPPED_HEADERS: Final = (
    DESTINATION_HEADER,
    "x-gateway-destination-endpoint-subset",
    "x-gateway-destination-endpoint-served",
    "x-envoy-original-dst-host",
    "x-vllm-priority",
    "x-tidegate-class",
    "x-tidegate-user",
    "x-tidegate-groups",
    # A client of a private address counts as internal, and Envoy would obey these.
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-hedge-on-per-try-timeout",
    "x-envoy-max-retries",
    "x-envoy-retriable-header-names",
    "x-envoy-retriable-status-codes",
    "x-envoy-retry-grpc-on",
    "x-envoy-retry-on",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-upstream-rq-timeout-alt-response",
    "x-envoy-upstream-rq-timeout-ms",
)
"""What only our own parts may say. Envoy would pass them on, and be an open proxy."""

_TYPE: Final = "type.googleapis.com/"
_HTTP_OPTIONS: Final = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_UNLIMITED: Final = 1_000_000
_UPSTREAM_IDLE: Final = "4s"  # below the 5 s after which uvicorn, and so vLLM, closes an idle connection

Config = dict[str, Any]


def bootstrap(  # noqa: PLR0913 -- all by name, one place to see what can be chosen
    *,
    listen_host: str,
    listen_port: int,
    admin_host: str = "127.0.0.1",
    admin_port: int = 9901,
    picker_host: str,
    picker_port: int = 9002,
    failure_mode_allow: bool = False,
    access_log: str | None = None,
    max_connections: int = 10_000,
) -> Config:
    """Build the bootstrap as a dict; written as JSON or YAML it is what `envoy -c` reads.

    Args:
        listen_host: Address that clients reach, HTTP/1.1 and h2c.
        listen_port: Its port.
        admin_host: Address of the admin interface; keep it on loopback, it can stop Envoy.
        admin_port: Its port.
        picker_host: Host name or address of the picker.
        picker_port: Its ext_proc port.
        failure_mode_allow: Whether to go on without the picker. Without a destination there is
            no engine to go to, so this only changes how the failure looks, unless routes are added.
        access_log: File for the access log, such as `/dev/stderr`; None writes none.
        max_connections: Open client connections beyond which new ones are refused.
    """
    return {
        "node": {"id": "tidegate-gateway", "cluster": "tidegate"},
        "admin": {"address": _address(admin_host, admin_port)},
        "static_resources": {
            "listeners": [_listener(listen_host, listen_port, failure_mode_allow, access_log)],
            "clusters": [_picker_cluster(picker_host, picker_port), _engines_cluster()],
        },
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": _typed(
                        "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                        max_active_downstream_connections=max_connections,
                    ),
                }
            ]
        },
    }


def _listener(host: str, port: int, failure_mode_allow: bool, access_log: str | None) -> Config:
    manager = _typed(
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="gateway",
        codec_type="AUTO",
        http2_protocol_options={"max_concurrent_streams": 1000},
        use_remote_address=True,
        normalize_path=True,
        merge_slashes=True,
        # A request may wait in the queue, and a stream may pause, for as long as its class allows.
        stream_idle_timeout="0s",
        request_timeout="0s",
        request_headers_timeout="10s",
        common_http_protocol_options={
            "idle_timeout": "300s",
            "headers_with_underscores_action": "DROP_HEADER",
        },
        local_reply_config=_local_replies(),
        route_config={
            "name": "engines",
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": _route()}],
                }
            ],
        },
        http_filters=[_strip_filter(), _picker_filter(failure_mode_allow), _router_filter()],
    )
    if access_log is not None:
        manager["access_log"] = [_access_log(access_log)]
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    return {
        "name": "gateway",
        "address": _address(host, port),
        "per_connection_buffer_limit_bytes": 1 << 20,
        "filter_chains": [chain],
    }


def _route() -> Config:
    return {
        "cluster": "engines",
        "timeout": "0s",
        "idle_timeout": "0s",
        # Only what surely never reached the engine is sent again.
        "retry_policy": {"retry_on": "connect-failure,refused-stream,reset-before-request", "num_retries": 1},
    }


def _strip_filter() -> Config:
    return {
        "name": "envoy.filters.http.header_mutation",
        "typed_config": _typed(
            "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation",
            mutations={"request_mutations": [{"remove": name} for name in STRIPPED_HEADERS]},
        ),
    }


def _picker_filter(failure_mode_allow: bool) -> Config:
    return {
        "name": "envoy.filters.http.ext_proc",
        "typed_config": _typed(
            "envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor",
            grpc_service={"envoy_grpc": {"cluster_name": "picker"}, "timeout": "0s"},
            failure_mode_allow=failure_mode_allow,
            processing_mode={
                "request_header_mode": "SEND",
                "request_body_mode": "FULL_DUPLEX_STREAMED",
                "request_trailer_mode": "SEND",
                "response_header_mode": "SEND",
                "response_body_mode": "NONE",
                # With SKIP the stream ends at the response headers, and room is given back too early.
                "response_trailer_mode": "SEND",
            },
            message_timeout="10s",
            metadata_options={"receiving_namespaces": {"untyped": ["envoy.lb"]}},
            status_on_error={"code": 503},
        ),
    }


def _router_filter() -> Config:
    return {
        "name": "envoy.filters.http.router",
        "typed_config": _typed("envoy.extensions.filters.http.router.v3.Router"),
    }


def _local_replies() -> Config:
    """Envoy's own errors in OpenAI's shape; the picker's immediate answers are left as they are."""
    picker = 'response.code_details.contains("ext_proc_error")'
    other = f'!response.code_details.contains("{LOCAL_DETAILS}")'
    return {
        "mappers": [
            _reply(picker, "the picker, which admits requests, did not answer; try again"),
            _reply(other, "gateway: %LOCAL_REPLY_BODY%"),
        ]
    }


def _reply(expression: str, message: str) -> Config:
    matches = {
        "name": "envoy.access_loggers.extension_filters.cel",
        "typed_config": _typed(
            "envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter", expression=expression
        ),
    }
    error = {
        "message": f"{message} (%RESPONSE_CODE_DETAILS%)",
        "type": "gateway_error",
        "param": None,
        "code": "%RESPONSE_CODE%",
    }
    return {
        "filter": {"extension_filter": matches},
        "body_format_override": {"json_format": {"error": error}},
    }


def _access_log(path: str) -> Config:
    line = {
        "time": "%START_TIME%",
        "method": "%REQ(:METHOD)%",
        "path": "%REQ(:PATH)%",
        "status": "%RESPONSE_CODE%",
        "details": "%RESPONSE_CODE_DETAILS%",
        "flags": "%RESPONSE_FLAGS%",
        "upstream": "%UPSTREAM_HOST%",
        "ms": "%DURATION%",
        "sent": "%BYTES_SENT%",
    }
    return {
        "name": "envoy.access_loggers.file",
        "typed_config": _typed(
            "envoy.extensions.access_loggers.file.v3.FileAccessLog",
            path=path,
            log_format={"json_format": line},
        ),
    }


def _picker_cluster(host: str, port: int) -> Config:
    return {
        "name": "picker",
        "type": "STATIC" if _is_address(host) else "STRICT_DNS",
        "connect_timeout": "1s",
        "circuit_breakers": _breakers(),
        "typed_extension_protocol_options": {
            _HTTP_OPTIONS: _typed(
                _HTTP_OPTIONS,
                explicit_http_config={
                    "http2_protocol_options": {
                        # A picker that hangs without closing its socket is noticed in 15 s.
                        "connection_keepalive": {"interval": "10s", "timeout": "5s"}
                    }
                },
            )
        },
        "load_assignment": {
            "cluster_name": "picker",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(host, port)}}]}],
        },
    }


def _engines_cluster() -> Config:
    return {
        "name": "engines",
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "2s",
        "original_dst_lb_config": {"use_http_header": True, "http_header_name": DESTINATION_HEADER},
        "circuit_breakers": _breakers(),
        "typed_extension_protocol_options": {
            _HTTP_OPTIONS: _typed(
                _HTTP_OPTIONS,
                common_http_protocol_options={"idle_timeout": _UPSTREAM_IDLE},
                explicit_http_config={"http_protocol_options": {}},
            )
        },
    }


def _breakers() -> Config:
    """Envoy's defaults stop at 1,024; the queue is in the picker, with bounds of its own."""
    names = ("max_connections", "max_pending_requests", "max_requests", "max_retries")
    return {"thresholds": [dict.fromkeys(names, _UNLIMITED)]}


def _typed(name: str, **fields: Any) -> Config:
    return {"@type": _TYPE + name, **fields}


def _address(host: str, port: int) -> Config:
    return {"socket_address": {"address": host, "port_value": port}}


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
