"""kopf rings when something changes, and is started again when it dies."""

import asyncio
import logging
import uuid
from pathlib import Path

import pytest
import yaml

from tidegate.adapters.kube import Kind, Kube
from tidegate.adapters.kube import kinds as k
from tidegate.api import names
from tidegate.controller.watch import KopfWatch
from tidegate.local.cluster import LocalCluster


async def test_an_event_rings_and_leaves_no_trace_on_the_object(
    control_plane: LocalCluster, kube: Kube, caplog: pytest.LogCaptureFixture
) -> None:
    heard: asyncio.Queue[Kind] = asyncio.Queue()
    config = str(control_plane.kubeconfig_for("tidegate-controller"))
    watch = KopfWatch((k.QOS_CLASS, k.GPU_POOL), config, heard.put_nowait, lambda: None)
    task = asyncio.create_task(watch.run())
    bystander = asyncio.create_task(asyncio.sleep(3600))  # kopf cancels what is in its own loop
    name = f"watched-{uuid.uuid4().hex[:6]}"
    try:
        body = {"apiVersion": names.API_VERSION, "kind": "QoSClass", "metadata": {"name": name}}
        await kube.create(k.QOS_CLASS, body | {"spec": {"priority": 1}})
        async with asyncio.timeout(20):
            while await heard.get() is not k.QOS_CLASS:
                pass
        meta = (await kube.get(k.QOS_CLASS, name))["metadata"]
        assert "annotations" not in meta
        assert "finalizers" not in meta
        await kube.delete(k.QOS_CLASS, name)
        async with asyncio.timeout(20):
            while await heard.get() is not k.QOS_CLASS:
                pass
        # The API server took the watch as kopf asks for it (its times are whole seconds).
        assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == []
        assert "kopf ended" not in caplog.text
    finally:
        await kube.delete(k.QOS_CLASS, name)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert not bystander.done()
    bystander.cancel()


async def test_kopf_that_dies_is_started_again(
    tmp_path: Path, unused_tcp_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{unused_tcp_port}"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    config = tmp_path / "kubeconfig"
    user = {"name": "u", "user": {"token": "t"}}
    whole = {"apiVersion": "v1", "kind": "Config", "current-context": "c"}
    config.write_text(yaml.safe_dump(whole | {"clusters": [cluster], "contexts": [context], "users": [user]}))
    restarted = asyncio.Event()
    watch = KopfWatch((k.QOS_CLASS,), str(config), lambda _: None, restarted.set)
    task = asyncio.create_task(watch.run())
    async with asyncio.timeout(60):
        await restarted.wait()
    assert not watch.alive
    assert "kopf ended" in caplog.text
    async with asyncio.timeout(10):
        while not watch.alive:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
