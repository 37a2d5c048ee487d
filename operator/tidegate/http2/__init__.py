"""A small HTTP/2 server for gRPC over asyncio: the picker's hot path (docs/designs/0005-frames.md)."""
