"""Envoy's bootstrap: one listener for clients, the picker asked once per attempt, engines by address.

Envoy carries the bytes. The picker answers with the destination in a header, and an ORIGINAL_DST
cluster connects there. A request passes two listeners of the one process: `gateway` faces the
client and tries again, `admission` (an internal listener, no socket) asks the picker and goes to
the engine. So an attempt that an engine or the picker left before it began to answer is admitted,
queued and placed anew, and its room is accounted for like any other's. The facts behind the
choices were seen on Envoy 1.40 and are listed in docs/concepts/request-path.md.
"""

import ipaddress
from collections.abc import Iterable
from typing import Any, Final

from tidegate.render import measure
from tidegate.render.envoy_auth import GatewayAuth

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
    "x-tidegate-client",
    "x-tidegate-groups",
    measure.REQUEST_HEADER,
    measure.ARRIVED_HEADER,
    "x-tidegate-jwt",
    "x-tidegate-user",
    "x-envoy-attempt-count",
    "x-tidegate-retries",
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

AGAIN_HEADER: Final = "x-tidegate-again"
"""Between the two listeners: this failed before an answer began, and may be tried again."""

ATTEMPT_HEADER: Final = "x-envoy-attempt-count"
"""Between the two listeners: the how manieth attempt this is, from 1."""
RETRIES_HEADER: Final = "x-tidegate-retries"
"""Between the two listeners: whoever asks here tries again by itself. Others count attempts too."""
KEPT_BODY: Final = 1 << 20
"""Bytes of a body that the gateway listener keeps, to send it again."""

_TYPE: Final = "type.googleapis.com/"
_HTTP_OPTIONS: Final = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_UNLIMITED: Final = 1_000_000
_GRPC: Final = "-grpc"
"""Ends the name of a cluster's twin for gRPC."""
_HTTP2: Final = {"initial_stream_window_size": 1 << 20, "initial_connection_window_size": 256 << 20}
"""Many streams share a connection: a client that reads slowly must not fill it for the others."""
ATTEMPTS: Final = 8
"""With the back-off below they last about six seconds, longer than a picker takes to restart."""
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
    measure_port: int | None = None,
    auth: GatewayAuth | None = None,
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
        measure_port: The picker's port for what is measured of answers; None measures nothing.
        auth: What Envoy checks of callers by itself: JWTs and API keys.
    """
    config = {
        "node": {"id": "tidegate-gateway", "cluster": "tidegate"},
        "admin": {"address": _address(admin_host, admin_port)},
        "static_resources": {
            "listeners": [
                _gateway_listener(listen_host, listen_port, access_log, auth),
                _admission_listener(failure_mode_allow),
            ],
            "clusters": [
                _admission_cluster("admission", grpc=False),
                _admission_cluster(f"admission{_GRPC}", grpc=True),
                _picker_cluster(picker_host, picker_port),
                _engines_cluster("engines", grpc=False),
                _engines_cluster(f"engines{_GRPC}", grpc=True),
                *(auth.clusters() if auth is not None else ()),
            ],
        },
        "bootstrap_extensions": [
            {
                "name": "envoy.bootstrap.internal_listener",
                "typed_config": _typed("envoy.extensions.bootstrap.internal_listener.v3.InternalListener"),
            }
        ],
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
    if measure_port is not None:
        _measure(config, _picker_cluster(picker_host, measure_port, "measure"))
    return config


def _measure(config: Config, cluster: Config) -> None:
    """Add what notes when tokens come and how many, and tells the picker of it."""
    resources = config["static_resources"]
    gateway, admission = (x["filter_chains"][0]["filters"][0]["typed_config"] for x in resources["listeners"])
    gateway["route_config"]["request_headers_to_add"] = [measure.arrived()]
    admission["http_filters"].insert(-1, measure.lua_filter())
    admission["access_log"] = [measure.access_log(cluster["name"])]
    resources["clusters"].append(cluster)


def _gateway_listener(host: str, port: int, access_log: str | None, auth: GatewayAuth | None) -> Config:
    """What clients talk to: takes their internal headers away, checks who they are, and tries again."""
    forged = (*STRIPPED_HEADERS, *(auth.forged() if auth is not None else ()))
    checks = auth.filters() if auth is not None else []
    routes = _routes("admission", _again())
    if auth is not None:
        routes = [parted for route in routes for parted in auth.routes(route)]
    manager = _manager("gateway", routes, [_strip_filter(forged), *checks, _router_filter()])
    manager |= {
        "http2_protocol_options": {"max_concurrent_streams": 1000},
        "use_remote_address": True,
        # A client finds its request again by its own id.
        "preserve_external_request_id": True,
        "normalize_path": True,
        "merge_slashes": True,
        "request_headers_timeout": "10s",
        "common_http_protocol_options": {
            "idle_timeout": "300s",
            "headers_with_underscores_action": "DROP_HEADER",
        },
    }
    if access_log is not None:
        manager["access_log"] = [_access_log(access_log)]
    return {
        "name": "gateway",
        "address": _address(host, port),
        "per_connection_buffer_limit_bytes": KEPT_BODY,
        "filter_chains": [_chain(manager)],
    }


def _admission_listener(failure_mode_allow: bool) -> Config:
    """Where an attempt meets the picker and goes on to its engine."""
    # Only what surely never reached the engine is sent there again.
    again = {"retry_on": "connect-failure,refused-stream,reset-before-request", "num_retries": 1}
    filters = [_picker_filter(failure_mode_allow), _router_filter()]
    manager = _manager("admission", _routes("engines", again), filters)
    return {"name": "admission", "internal_listener": {}, "filter_chains": [_chain(manager)]}


def _manager(name: str, routes: list[Config], filters: list[Config]) -> Config:
    return _typed(
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix=name,
        codec_type="AUTO",
        # A request may wait in the queue, and a stream may pause, for as long as its class allows.
        stream_idle_timeout="0s",
        request_timeout="0s",
        local_reply_config=_local_replies(),
        route_config={
            "name": name,
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": routes,
                    "include_request_attempt_count": name == "gateway",
                }
            ],
        },
        http_filters=filters,
    )


def _chain(manager: Config) -> Config:
    return {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}


def _routes(cluster: str, retry_policy: Config) -> list[Config]:
    """To a cluster; gRPC to its twin, which speaks HTTP/2 as gRPC must."""
    ways: list[tuple[Config, str]] = [
        ({"prefix": "/", "grpc": {}}, cluster + _GRPC),
        ({"prefix": "/"}, cluster),
    ]
    return [
        {
            "match": match,
            "route": {"cluster": to, "timeout": "0s", "idle_timeout": "0s", "retry_policy": retry_policy},
            "response_headers_to_remove": [AGAIN_HEADER] if cluster == "admission" else [],
            "request_headers_to_add": [_added(RETRIES_HEADER)] if cluster == "admission" else [],
        }
        for match, to in ways
    ]


def _added(name: str) -> Config:
    return {"header": {"key": name, "value": "1"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


def _again() -> Config:
    """Try again what ended before an answer began: an engine that went, a picker that restarts.

    A body above the buffer limit of 1 MiB is not kept, and so is not sent again.
    """
    return {
        "retry_on": "retriable-headers",
        "retriable_headers": [{"name": AGAIN_HEADER, "present_match": True}],
        "num_retries": ATTEMPTS,
        "retry_back_off": {"base_interval": "0.1s", "max_interval": "2s"},
    }


def _strip_filter(names: Iterable[str]) -> Config:
    return {
        "name": "envoy.filters.http.header_mutation",
        "typed_config": _typed(
            "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation",
            mutations={"request_mutations": [{"remove": name} for name in dict.fromkeys(names)]},
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
    """Envoy's own errors in OpenAI's shape, over gRPC as plain text, which becomes `grpc-message`.

    The picker's immediate answers are left as they are.
    """
    picker = 'response.code_details.contains("ext_proc_error")'
    engine = 'response.code_details.contains("upstream_reset_before_response_started")'
    no_keys = 'response.code_details.contains("Jwks_remote_fetch")'
    denied = 'response.code_details.contains("jwt_authn_access_denied") || response.code == 401'
    other = f'!response.code_details.contains("{LOCAL_DETAILS}")'
    kinds = (
        (picker, "the picker, which admits requests, did not answer; try again", True),
        (engine, "the engine went away before it answered; try again", True),
        (other, "gateway: %LOCAL_REPLY_BODY%", False),
    )
    kind = 'request.headers["content-type"]'
    grpc = f'"content-type" in request.headers && {kind}.matches("^application/grpc($|[+])")'
    return {
        "mappers": [
            *(_reply(f"{why} && {grpc}", text, again=again, grpc=True) for why, text, again in kinds),
            *(_reply(why, text, again=again) for why, text, again in kinds[:2]),
            _auth_reply(no_keys, 503, "identity_unknown", "server_error"),
            _auth_reply(denied, 401, "invalid_token", "authentication_error"),
            *(_reply(why, text, again=again) for why, text, again in kinds[2:]),
        ]
    }


def _matches(expression: str) -> Config:
    return {
        "name": "envoy.access_loggers.extension_filters.cel",
        "typed_config": _typed(
            "envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter", expression=expression
        ),
    }


def _auth_reply(expression: str, status: int, code: str, kind: str) -> Config:
    """What Envoy's own checks of callers refuse, as the picker would say it."""
    error = {"message": "gateway: %LOCAL_REPLY_BODY%", "type": kind, "param": None, "code": code}
    reply: Config = {
        "filter": {
            "extension_filter": _matches(
                f"({expression}) && !response.code_details.contains('{LOCAL_DETAILS}')"
            )
        },
        "status_code": status,
        "body_format_override": {"json_format": {"error": error}},
    }
    if status == 503:
        reply["headers_to_add"] = [{"header": {"key": "retry-after", "value": "5"}}]
    return reply


def _reply(expression: str, message: str, *, again: bool = False, grpc: bool = False) -> Config:
    error = {
        "message": f"{message} (%RESPONSE_CODE_DETAILS%)",
        "type": "gateway_error",
        "param": None,
        "code": "%RESPONSE_CODE%",
    }
    shape: Config = {"json_format": {"error": error}}
    if grpc:
        shape = {"text_format_source": {"inline_string": f"{message} (%RESPONSE_CODE_DETAILS%)"}}
    reply: Config = {
        "filter": {"extension_filter": _matches(expression)},
        "body_format_override": shape,
    }
    if again:
        reply["headers_to_add"] = [{"header": {"key": AGAIN_HEADER, "value": "1"}}]
    return reply


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


def _admission_cluster(name: str, *, grpc: bool) -> Config:
    inside = {"envoy_internal_address": {"server_listener_name": "admission"}}
    cluster: Config = {
        "name": name,
        "type": "STATIC",
        "circuit_breakers": _breakers(),
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": inside}}]}],
        },
    }
    if grpc:
        http2 = _typed(_HTTP_OPTIONS, explicit_http_config={"http2_protocol_options": _HTTP2})
        cluster["typed_extension_protocol_options"] = {_HTTP_OPTIONS: http2}
    return cluster


def _picker_cluster(host: str, port: int, name: str = "picker") -> Config:
    return {
        "name": name,
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
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(host, port)}}]}],
        },
    }


def _engines_cluster(name: str, *, grpc: bool) -> Config:
    return {
        "name": name,
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "2s",
        "original_dst_lb_config": {"use_http_header": True, "http_header_name": DESTINATION_HEADER},
        "circuit_breakers": _breakers(),
        "typed_extension_protocol_options": {
            _HTTP_OPTIONS: _typed(
                _HTTP_OPTIONS,
                common_http_protocol_options={"idle_timeout": _UPSTREAM_IDLE},
                explicit_http_config={"http2_protocol_options": _HTTP2}
                if grpc
                else {"http_protocol_options": {}},
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
