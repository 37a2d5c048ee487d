"""The load generator: replays a trace against a gateway and counts what the client saw."""
