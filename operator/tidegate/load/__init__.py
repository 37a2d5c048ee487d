"""The load generator: replays traffic against a gateway and counts what the client saw."""
