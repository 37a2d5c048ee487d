"""What Envoy notes of an answer, and how it tells the picker: a Lua filter and a gRPC access log.

Response headers are not the first token: an engine may answer them before it begins. So a filter on
the way back looks at the body as it passes. It notes when a stream's first token came and, at the end, what
the engine says that it used; it keeps no more of the body than its last four chunks, 1 KiB of each.
The access log takes that to the picker in batches, with the header that names the request.
"""

from typing import Any, Final

REQUEST_HEADER: Final = "x-tidegate-request"
"""Names a request between the picker and the access log. A client's own is removed."""
ARRIVED_HEADER: Final = "x-tidegate-arrived"
"""When the client's request reached Envoy, in Unix seconds: the same for all its attempts."""
GRPC_STATUS: Final = "grpc-status"
NAMESPACE: Final = "tidegate"
"""Of the dynamic metadata in which the filter leaves what it saw."""
KEY_FIRST: Final = "first"
"""When a stream's first token passed: Unix time in microseconds, as text."""
KEY_SEEN: Final = "seen"
"""So far: `events:bytes`, written again each time that twice as many have passed."""
KEY_END: Final = "end"
"""At the end: `prompt:output:events`, as text. By the engine's own account, and as counted in a stream."""

_BATCH_S: Final = "0.2s"
_BATCH_BYTES: Final = 16 << 10

# One coroutine runs per answer; what is got from `handle` does not outlive a chunk. `look` bounds
# what is read of a chunk, whatever its size, and `tail` what is kept of it.
LUA: Final = """
local look, tail = 2048, 1024
local tokens = {
  '"content"%s*:%s*"[^"]', '"text"%s*:%s*"[^"]', '"text_output"%s*:%s*"[^"]', '"delta"%s*:%s*"[^"]',
  '"reasoning_content"%s*:%s*"[^"]', '"reasoning"%s*:%s*"[^"]', '"refusal"%s*:%s*"[^"]',
  '"tool_calls"%s*:%s*%[%s*{', '"finish_reason"%s*:%s*"',
}
local opening = '"role"%s*:%s*"assistant"%s*,%s*"content"%s*:%s*""'

local function note(handle, key, value)
  handle:streamInfo():dynamicMetadata():set("tidegate", key, value)
end

local function now(handle)
  return handle:timestampString(EnvoyTimestampResolution.MICROSECOND)
end

local function carries(text)
  for _, pattern in ipairs(tokens) do
    if text:find(pattern) then return true end
  end
  return false
end

local function events(text)
  local count, at = 0, 1
  while true do
    local _, last = text:find("\\n\\r?\\n", at)
    if not last then return count end
    count, at = count + 1, last + 1
  end
end

-- The last one only: what stands before it may be the client's own words, such as its tools.
local function usage(text)
  local last = text:match('^.*"usage"%s*:%s*(.*)$') or ""
  local used = last:match("^%b{}") or ""
  local out = used:match('"completion_tokens"%s*:%s*(%d+)') or used:match('"output_tokens"%s*:%s*(%d+)')
  local prompt = used:match('"prompt_tokens"%s*:%s*(%d+)') or used:match('"input_tokens"%s*:%s*(%d+)')
  if prompt or out then return (prompt or "") .. ":" .. (out or "0") end
  return ":"
end

local function whole(handle)
  local a, b, c, d = "", "", "", ""
  for chunk in handle:bodyChunks() do
    local length = chunk:length()
    if length > 0 then
      local kept = math.min(length, tail)
      a, b, c, d = b, c, d, chunk:getBytes(length - kept, kept)
    end
  end
  local used = usage(a .. b .. c .. d)
  if used ~= ":" then note(handle, "end", used .. ":") end
end

local function stream(handle)
  local any, first, count, bytes, told = nil, false, 0, 0, 16
  local a, b, c, d = "", "", "", ""
  for chunk in handle:bodyChunks() do
    local length = chunk:length()
    if length > 0 then
      local text = chunk:getBytes(0, math.min(length, look))
      if not first then
        any = any or now(handle)
        if text:find(opening) then count = count - 1 end
        if carries(text) then
          first = true
          note(handle, "first", now(handle))
        end
      end
      local found = events(text)
      if length > look then found = math.floor(found * length / look) end
      count, bytes = count + found, bytes + length
      if count >= told then
        note(handle, "seen", count .. ":" .. bytes)
        told = 2 * count
      end
      if length <= tail then
        a, b, c, d = b, c, d, text:sub(1, length)
      else
        a, b, c, d = b, c, d, chunk:getBytes(length - tail, tail)
      end
    end
  end
  if any and not first then note(handle, "first", any) end
  local last = a .. b .. c .. d
  local used = usage(last)
  if last:find("data: [DONE]", 1, true) then count = count - 1 end
  if used ~= ":" then count = count - 1 end
  note(handle, "end", used .. ":" .. math.max(0, count))
end

function envoy_on_response(handle)
  local headers = handle:headers()
  if headers:get(":status") ~= "200" then return end
  local kind = headers:get("content-type") or ""
  if kind:find("text/event-stream", 1, true) then
    stream(handle)
  elseif kind:find("json", 1, true) then
    whole(handle)
  end
end
"""


def lua_filter() -> dict[str, Any]:
    """The filter that looks at answers; it stands before the router."""
    return {
        "name": "tidegate.measure",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua",
            "default_source_code": {"inline_string": LUA},
        },
    }


def access_log(cluster: str) -> dict[str, Any]:
    """The log of the requests that the picker gave an engine, sent to `cluster` in batches."""
    named = {"name": REQUEST_HEADER, "present_match": True}
    return {
        "name": "envoy.access_loggers.http_grpc",
        "filter": {"header_filter": {"header": named}},
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
            "common_config": {
                "log_name": NAMESPACE,
                "transport_api_version": "V3",
                "grpc_service": {"envoy_grpc": {"cluster_name": cluster}},
                "buffer_flush_interval": _BATCH_S,
                "buffer_size_bytes": _BATCH_BYTES,
            },
            "additional_request_headers_to_log": [REQUEST_HEADER],
            # An answer without a body has it in its headers.
            "additional_response_headers_to_log": [GRPC_STATUS],
            "additional_response_trailers_to_log": [GRPC_STATUS],
        },
    }


def arrived() -> dict[str, Any]:
    """The header that says when the client's request came, for a route of the first listener."""
    return {
        "header": {"key": ARRIVED_HEADER, "value": "%START_TIME(%s.%6f)%"},
        "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
    }
