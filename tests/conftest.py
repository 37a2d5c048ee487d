"""Fixtures for tests against real servers: a control plane, a client, a namespace.

They fail, and do not skip, where the programs cannot be had: a test that did not run proves nothing.
"""

import asyncio
import contextlib
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import hypothesis  # noqa: F401  # see below
import pytest

from support.builders import admission_settled
from tidegate.adapters.kube import ApiError, Kube, kinds
from tidegate.local.binaries import BinaryError, find_all
from tidegate.local.cluster import CONTROL_PLANE, LocalCluster
from tidegate.local.components import PROGRAMS

# pytest imports hypothesis at the very end when no test did, and there CPython 3.11.7 cannot compile
# it: "AST constructor recursion depth mismatch". Here it can.

MakeNamespace = Callable[..., Awaitable[str]]


def say(text: str) -> None:
    """Progress, past pytest's capture: a first build of the control plane takes minutes."""
    print(f"[local cluster] {text}", file=sys.__stderr__, flush=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the control plane before the first test, whose time limit does not allow for it."""
    wanted = {"control_plane", "stack"}
    fixtures = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if fixtures & wanted and not session.config.option.collectonly:
        # What goes wrong is told by the fixture that needs the programs.
        with contextlib.suppress(BinaryError):
            find_all(sorted({PROGRAMS[name] for name in CONTROL_PLANE}), say)


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """etcd, kube-apiserver, kube-controller-manager and the default scheduler, Tidegate installed."""
    with LocalCluster.start(
        tmp_path_factory.mktemp("control-plane"), parts=CONTROL_PLANE, progress=say
    ) as cluster:
        yield cluster


@pytest.fixture
async def kube(control_plane: LocalCluster) -> AsyncIterator[Kube]:
    """A client of `control_plane` that may do everything."""
    async with await Kube.connect(str(control_plane.kubeconfig)) as client:
        await admission_settled(client)
        yield client


@pytest.fixture
async def make_namespace(kube: Kube) -> AsyncIterator[MakeNamespace]:
    """`await make_namespace({"tidegate.dev/tier": "batch"})` returns a new namespace's name."""
    made: list[str] = []

    async def make(labels: dict[str, str] | None = None) -> str:
        name = f"test-{uuid.uuid4().hex[:8]}"
        await kube.create(kinds.NAMESPACE, {"metadata": {"name": name, "labels": labels or {}}})
        made.append(name)
        await _default_account(kube, name)
        return name

    yield make
    for name in made:
        await kube.delete(kinds.NAMESPACE, name)


@pytest.fixture
async def namespace(make_namespace: MakeNamespace) -> str:
    """A fresh namespace; one with labels comes from `make_namespace`."""
    return await make_namespace()


async def _default_account(kube: Kube, namespace: str) -> None:
    """Wait for the namespace's ServiceAccount, without which no pod is admitted."""
    async with asyncio.timeout(30):
        while True:
            try:
                await kube.get(kinds.SERVICE_ACCOUNT, "default", namespace)
            except ApiError as error:
                if error.status != 404:
                    raise
                await asyncio.sleep(0.05)
            else:
                return
