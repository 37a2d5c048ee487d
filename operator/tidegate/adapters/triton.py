"""What a Triton server says of itself, asked through tritonclient."""

from typing import Final

PORT: Final = 8001
"""tritonserver's gRPC port, as rendered in its arguments."""


async def readiness(host: str, port: int = PORT, timeout_s: float = 2.0) -> str:
    """Say in a few words why a Triton server is not ready, or that it is.

    Asked only where a Triton replica runs and its probe fails: the probe knows no reasons, the
    repository index does. An unreachable server is said to be so; nothing is raised for it.
    """
    # tritonclient's HTTP side needs gevent even for its asyncio part; its gRPC side does not.
    from tritonclient.grpc.aio import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    async with InferenceServerClient(f"{host}:{port}") as client:
        try:
            if not await client.is_server_live(client_timeout=timeout_s):
                return "Triton is not live yet"
            if await client.is_server_ready(client_timeout=timeout_s):
                return "Triton is ready"
            index = await client.get_model_repository_index(client_timeout=timeout_s)
        except InferenceServerException as error:
            return f"Triton at {host}:{port} does not answer: {error.message()}"
    waiting = [f"{m.name} {m.state or 'not loaded'}" + (f" ({m.reason})" if m.reason else "")
               for m in index.models if m.state != "READY"]  # fmt: skip
    return f"Triton loads its models: {', '.join(sorted(waiting)) or 'none are in its repository'}"
