"""The Kubernetes client and its reflector against a real API server."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from support.wait import becomes
from tidegate.adapters.kube import ApiError, Kube, Reflector, kinds
from tidegate.local.cluster import LocalCluster

Obj = dict[str, Any]


def config_map(name: str, namespace: str, **data: str) -> Obj:
    return {"metadata": {"name": name, "namespace": namespace, "labels": {"t": "client"}}, "data": data}


@contextlib.asynccontextmanager
async def running(reflector: Reflector) -> AsyncIterator[Reflector]:
    task = asyncio.create_task(reflector.run())
    try:
        yield reflector
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_create_get_list_delete(kube: Kube, namespace: str) -> None:
    made = await kube.create(kinds.CONFIG_MAP, config_map("a", namespace, x="1"))
    assert made["metadata"]["uid"]
    await kube.create(kinds.CONFIG_MAP, config_map("b", namespace, x="2"))
    found, version = await kube.list(kinds.CONFIG_MAP, namespace, labels="t=client")
    assert [o["metadata"]["name"] for o in found] == ["a", "b"]
    assert {(o["apiVersion"], o["kind"]) for o in found} == {("v1", "ConfigMap")}
    assert int(version) >= int(made["metadata"]["resourceVersion"])
    only, _ = await kube.list(kinds.CONFIG_MAP, namespace, fields="metadata.name=b")
    assert [o["data"] for o in only] == [{"x": "2"}]
    with pytest.raises(ApiError) as wrong:
        await kube.delete(kinds.CONFIG_MAP, "a", namespace, uid="another")
    assert (wrong.value.status, wrong.value.reason) == (409, "Conflict")
    await kube.delete(kinds.CONFIG_MAP, "a", namespace, uid=made["metadata"]["uid"])
    await kube.delete(kinds.CONFIG_MAP, "a", namespace)  # gone already is no error
    with pytest.raises(ApiError) as gone:
        await kube.get(kinds.CONFIG_MAP, "a", namespace)
    assert (gone.value.status, gone.value.reason) == (404, "NotFound")
    assert 'configmaps "a" not found' in gone.value.message


async def test_a_stale_replace_is_a_conflict(kube: Kube, namespace: str) -> None:
    first = await kube.create(kinds.CONFIG_MAP, config_map("a", namespace, x="1"))
    await kube.merge(kinds.CONFIG_MAP, "a", {"data": {"x": "2"}}, namespace)
    with pytest.raises(ApiError) as stale:
        await kube.replace(kinds.CONFIG_MAP, first | {"data": {"x": "3"}})
    assert (stale.value.status, stale.value.reason) == (409, "Conflict")
    patch = {"metadata": {"resourceVersion": first["metadata"]["resourceVersion"]}, "data": {"x": "4"}}
    with pytest.raises(ApiError) as conditional:
        await kube.merge(kinds.CONFIG_MAP, "a", patch, namespace)
    assert conditional.value.status == 409
    with pytest.raises(ApiError) as twice:
        await kube.create(kinds.CONFIG_MAP, config_map("a", namespace))
    assert (twice.value.status, twice.value.reason) == (409, "AlreadyExists")


async def test_apply_owns_fields_and_force_takes_them(kube: Kube, namespace: str) -> None:
    await kube.apply(kinds.CONFIG_MAP, config_map("a", namespace, x="1"), manager="one")
    with pytest.raises(ApiError) as taken:
        await kube.apply(kinds.CONFIG_MAP, config_map("a", namespace, x="2"), manager="two")
    assert taken.value.status == 409
    assert ".data.x" in taken.value.message
    forced = await kube.apply(kinds.CONFIG_MAP, config_map("a", namespace, x="2"), manager="two", force=True)
    again = await kube.apply(kinds.CONFIG_MAP, config_map("a", namespace, x="2"), manager="two", force=True)
    assert again["metadata"]["resourceVersion"] == forced["metadata"]["resourceVersion"], (
        "no change, no write"
    )


async def test_an_invalid_object_says_what_is_wrong(kube: Kube, namespace: str) -> None:
    with pytest.raises(ApiError) as invalid:
        await kube.create(kinds.CONFIG_MAP, config_map("Not_A_Name", namespace))
    assert (invalid.value.status, invalid.value.reason) == (422, "Invalid")
    assert "metadata.name" in invalid.value.message


async def test_a_watch_tells_what_happened_in_order(kube: Kube, namespace: str) -> None:
    _, version = await kube.list(kinds.CONFIG_MAP, namespace)
    await kube.create(kinds.CONFIG_MAP, config_map("a", namespace, x="1"))
    await kube.merge(kinds.CONFIG_MAP, "a", {"data": {"x": "2"}}, namespace)
    await kube.delete(kinds.CONFIG_MAP, "a", namespace)
    seen = []
    async with asyncio.timeout(20):
        async with contextlib.aclosing(
            kube.watch(kinds.CONFIG_MAP, namespace, since=version, labels="t=client")
        ) as events:
            async for event, obj in events:
                if event != "BOOKMARK":
                    seen.append((event, obj["data"]["x"]))
                if event == "DELETED":
                    break
    assert seen == [("ADDED", "1"), ("MODIFIED", "2"), ("DELETED", "2")]


async def test_large_objects_pass_through_a_watch(kube: Kube, namespace: str) -> None:
    # One line of a watch is longer than any default buffer.
    async with running(Reflector(kube, kinds.CONFIG_MAP, namespace=namespace)) as copy:
        await copy.synced.wait()
        await kube.create(kinds.CONFIG_MAP, config_map("big", namespace, x="y" * 900_000))
        await becomes(lambda: (namespace, "big") in copy.objects, "the copy")
        assert len(copy.objects[namespace, "big"]["data"]["x"]) == 900_000


async def test_no_answer_is_status_0(kube: Kube) -> None:
    async with Proxy(kube) as proxy:
        await proxy.close()
        with pytest.raises(ApiError) as none:
            await proxy.kube.get(kinds.NAMESPACE, "default")
    assert (none.value.status, none.value.reason) == (0, "ConnectionFailed")
    assert "/api/v1/namespaces/default" in none.value.message


class Proxy:
    """A client that reaches the API server through a port which can be cut and opened again."""

    def __init__(self, kube: Kube) -> None:
        self._inner = kube
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def __aenter__(self) -> "Proxy":
        await self.open()
        self.kube = Kube(self._inner._api)
        self.kube._host = f"https://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._writers:
            writer.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._writers.clear()
        self._tasks.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self._inner.host.removeprefix("https://").split(":")
        up_reader, up_writer = await asyncio.open_connection(host, int(port))
        self._writers |= {writer, up_writer}
        self._tasks |= {
            asyncio.create_task(_pump(reader, up_writer)),
            asyncio.create_task(_pump(up_reader, writer)),
        }


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def test_a_reflector_follows_and_hears_what_it_missed(kube: Kube, namespace: str) -> None:
    heard: list[tuple[str, str]] = []
    async with Proxy(kube) as proxy:
        reflector = Reflector(
            proxy.kube,
            kinds.CONFIG_MAP,
            namespace=namespace,
            labels="t=client",
            on_change=lambda event, obj: heard.append((event, obj["metadata"]["name"])),
        )
        for name in ("stays", "changes", "goes"):
            await kube.create(kinds.CONFIG_MAP, config_map(name, namespace, x="1"))
        async with running(reflector):
            await becomes(lambda: len(reflector.objects) == 3, "the copy")
            assert reflector.connected
            await kube.create(kinds.CONFIG_MAP, config_map("early", namespace))
            await becomes(lambda: ("ADDED", "early") in heard, "the event")
            await proxy.close()
            await becomes(lambda: not reflector.connected, "the loss")
            assert len(reflector.objects) == 4, "the last copy is kept"
            heard.clear()
            await kube.merge(kinds.CONFIG_MAP, "changes", {"data": {"x": "2"}}, namespace)
            await kube.delete(kinds.CONFIG_MAP, "goes", namespace)
            await kube.create(kinds.CONFIG_MAP, config_map("new", namespace))
            await proxy.open()
            await becomes(lambda: len(heard) == 3, "the event")
            assert sorted(heard) == [("ADDED", "new"), ("DELETED", "goes"), ("MODIFIED", "changes")]
            assert {name for _, name in reflector.objects} == {"stays", "changes", "early", "new"}
            assert reflector.connected
            await kube.delete(kinds.CONFIG_MAP, "stays", namespace)
            await becomes(lambda: ("DELETED", "stays") in heard, "the event")


async def test_one_made_again_between_two_listings_is_another(kube: Kube, namespace: str) -> None:
    heard: list[tuple[str, str]] = []
    first = await kube.create(kinds.CONFIG_MAP, config_map("a", namespace))
    async with Proxy(kube) as proxy:
        reflector = Reflector(
            proxy.kube,
            kinds.CONFIG_MAP,
            namespace=namespace,
            labels="t=client",
            on_change=lambda event, obj: heard.append((event, obj["metadata"]["uid"])),
        )
        async with running(reflector):
            await becomes(lambda: len(heard) == 1, "the event")
            await proxy.close()
            await becomes(lambda: not reflector.connected, "the loss")
            heard.clear()
            await kube.delete(kinds.CONFIG_MAP, "a", namespace)
            second = await kube.create(kinds.CONFIG_MAP, config_map("a", namespace))
            await proxy.open()
            await becomes(lambda: len(heard) == 2, "the event")
    assert heard == [("DELETED", first["metadata"]["uid"]), ("ADDED", second["metadata"]["uid"])]


async def test_a_restart_of_the_server_is_lived_through_and_old_versions_expire(
    control_plane: LocalCluster, kube: Kube, namespace: str
) -> None:
    reflector = Reflector(kube, kinds.CONFIG_MAP, namespace=namespace, labels="t=client")
    await kube.create(kinds.CONFIG_MAP, config_map("a", namespace))
    async with running(reflector):
        await becomes(lambda: (namespace, "a") in reflector.objects, "the copy")
        await asyncio.to_thread(control_plane.restart, "kube-apiserver")
        await kube.delete(kinds.CONFIG_MAP, "a", namespace)
        await kube.create(kinds.CONFIG_MAP, config_map("b", namespace))
        await becomes(lambda: set(reflector.objects) == {(namespace, "b")}, "the copy")
    async with asyncio.timeout(20):
        with pytest.raises(ApiError) as expired:
            await anext(kube.watch(kinds.CONFIG_MAP, namespace, since="1"))
    assert (expired.value.status, expired.value.reason) == (410, "Expired")
