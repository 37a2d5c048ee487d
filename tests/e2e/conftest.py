"""The whole stack: every part, four nodes of four emulated GPUs, engines that run fast."""

from collections.abc import AsyncIterator, Iterator

import pytest

from conftest import say
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
        yield client
