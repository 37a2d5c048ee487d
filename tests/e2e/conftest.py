"""The whole stack: every part, four nodes of four emulated GPUs, engines that run fast."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from conftest import say
from support.builders import admission_settled
from support.chat import Caller
from tidegate.adapters.kube import Kube
from tidegate.local.cluster import EVERYTHING, LocalCluster

ENGINE_ENV = {"TIDEGATE_EMULATOR_SPEED": "20", "TIDEGATE_EMULATOR_COLD_START": "0.5"}
"""Steps twenty times as fast as the real engine's, and half a second from start to ready."""


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A cluster with everything in it."""
    with LocalCluster.start(
        tmp_path_factory.mktemp("stack"),
        nodes=4,
        gpus_per_node=4,
        parts=EVERYTHING,
        engine_env=ENGINE_ENV,
        progress=say,
    ) as cluster:
        yield cluster


@pytest.fixture
async def kube(stack: LocalCluster) -> AsyncIterator[Kube]:
    """A client of `stack` that may do everything; `namespace` and `make_namespace` use it too."""
    async with await Kube.connect(str(stack.kubeconfig)) as client:
        await admission_settled(client)
        yield client


@pytest.fixture(scope="session")
def examples(stack: LocalCluster) -> LocalCluster:
    """`stack` with the examples applied and every model ready."""
    stack.kubectl("apply", "-f", str(Path(__file__).parents[2] / "examples"))
    stack.kubectl("wait", "--for=condition=Ready", "mdep", "--all", "-A", "--timeout=120s")
    return stack


@pytest.fixture
async def gateway(examples: LocalCluster) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the gateway, as nobody."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=examples.url("gateway"), timeout=60, limits=limits) as client:
        yield client


@pytest.fixture(scope="session")
def tokens(examples: LocalCluster) -> dict[str, str]:
    """Bearer tokens by class, of the examples' callers."""
    return {
        "interactive": examples.token("chat", "team-a"),
        "standard": examples.token("coder", "team-b"),
        "batch": examples.token("pipeline", "team-b"),
    }


@pytest.fixture
def chat(gateway: httpx.AsyncClient, tokens: dict[str, str]) -> Caller:
    """Who may use interactive."""
    return Caller(gateway, tokens["interactive"])


@pytest.fixture
def pipeline(gateway: httpx.AsyncClient, tokens: dict[str, str]) -> Caller:
    """Who may use batch."""
    return Caller(gateway, tokens["batch"])
