"""A small HTTP/2 server for gRPC over asyncio: the picker's hot path (docs/designs/0004-frames.md)."""
