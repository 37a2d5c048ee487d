"""gRPC health checks."""

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tidegate.conformance.probe import Probe
from tidegate.conformance.rules import BrokenError, Level, NotRunError, rule

_STATUS = health_pb2.HealthCheckResponse.ServingStatus


@rule("health.liveness", Level.MUST)
async def liveness(probe: Probe) -> None:
    """The health service `liveness` is SERVING while it can answer at all."""
    await _serving(probe, "liveness")


@rule("health.readiness", Level.MUST)
async def readiness(probe: Probe) -> None:
    """The health service `readiness` is SERVING once it takes requests."""
    await _serving(probe, "readiness")


@rule("health.ext-proc", Level.MUST)
async def ext_proc(probe: Probe) -> None:
    """The health service `envoy.service.ext_proc.v3.ExternalProcessor` is SERVING once it takes requests."""
    await _serving(probe, "envoy.service.ext_proc.v3.ExternalProcessor")


@rule("health.unknown", Level.SHOULD, "gRPC health")
async def unknown(probe: Probe) -> None:
    """A service that there is not is NOT_FOUND."""
    said = await _check(probe, "conformance.no.such.Service")
    if said not in ("NOT_FOUND", "SERVICE_UNKNOWN"):
        raise BrokenError(f"it is {said}")


async def _serving(probe: Probe, service: str) -> None:
    said = await _check(probe, service)
    if said != "SERVING":
        raise BrokenError(f"it is {said}")


async def _check(probe: Probe, service: str) -> str:
    if probe.health is None:
        raise NotRunError("give the address of its health checks by --health")
    stub = health_pb2_grpc.HealthStub(probe.health)
    try:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await stub.Check(request, timeout=probe.target.timeout_s)
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return str(_STATUS.Name(answer.status))
