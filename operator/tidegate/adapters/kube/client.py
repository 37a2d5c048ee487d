"""A small asynchronous client: one method a verb, raw dicts in and out."""

import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlencode

import aiohttp
import orjson
from kubernetes.aio import config as kube_config
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration

Object = dict[str, Any]

_APPLY = "application/apply-patch+yaml"
_MERGE = "application/merge-patch+json"


class ApiError(Exception):
    """What the API server answered when it said no.

    `status` is the HTTP code, `reason` Kubernetes' own word (`NotFound`, `Conflict`, `Invalid` …);
    status 0 means that no answer came.
    """

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status, self.reason, self.message = status, reason, message

    @classmethod
    def from_body(cls, status: int, body: bytes) -> Self:
        """Read a metav1.Status, or whatever else came instead of one."""
        try:
            parsed = orjson.loads(body)
        except orjson.JSONDecodeError:
            parsed = {}
        if not isinstance(parsed, dict):
            parsed = {}
        message = parsed.get("message") or body[:300].decode(errors="replace")
        return cls(status, str(parsed.get("reason") or status), message)


@dataclass(frozen=True, slots=True)
class Kind:
    """A resource of the API: `Kind("apps/v1", "deployments", "Deployment")`."""

    api_version: str
    plural: str
    name: str
    namespaced: bool = True

    def path(
        self, namespace: str | None = None, name: str | None = None, subresource: str | None = None
    ) -> str:
        """URL path of the collection, an object, or one of its subresources."""
        root = "/api/" if "/" not in self.api_version else "/apis/"
        parts = [root + self.api_version]
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        parts.append(self.plural)
        parts += [p for p in (name, subresource) if p]
        return "/".join(parts)


async def configure(kubeconfig: str | None = None) -> Configuration:
    """Where the API server is and who we are: a kubeconfig's path, $KUBECONFIG, or from inside a pod."""
    configuration = Configuration()
    in_cluster = "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ
    if kubeconfig is None and in_cluster:
        kube_config.load_incluster_config(client_configuration=configuration)
    else:
        await kube_config.load_kube_config(config_file=kubeconfig, client_configuration=configuration)
    return configuration


class Kube:
    """A connection to one API server. Use `connect`, then `close`, or `async with`."""

    def __init__(self, api: ApiClient) -> None:
        self._api = api
        self._host: str = api.configuration.host.rstrip("/")

    @classmethod
    async def connect(cls, kubeconfig: str | None = None) -> Self:
        """Connect by a kubeconfig's path; without one, by $KUBECONFIG, or from inside a pod."""
        configuration = await configure(kubeconfig)
        return cls(ApiClient(configuration))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()

    @property
    def host(self) -> str:
        """Base URL of the API server."""
        return self._host

    async def get(
        self, kind: Kind, name: str, namespace: str | None = None, *, subresource: str | None = None
    ) -> Object:
        """Read one object. Raises ApiError(404) when there is none."""
        return await self.request("GET", kind.path(namespace, name, subresource))

    async def list(
        self, kind: Kind, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> tuple[list[Object], str]:
        """List objects; returns them with the resourceVersion to watch from."""
        query = {k: v for k, v in (("labelSelector", labels), ("fieldSelector", fields)) if v}
        body = await self.request("GET", kind.path(namespace), query=query)
        for item in body["items"]:  # items of a list carry neither; readers want both
            item.setdefault("apiVersion", kind.api_version)
            item.setdefault("kind", kind.name)
        return body["items"], body["metadata"]["resourceVersion"]

    async def create(
        self, kind: Kind, obj: Mapping[str, Any], *, name: str | None = None, subresource: str | None = None
    ) -> Object:
        """Create an object, or a subresource of `name` (`token`, `eviction`, `binding`)."""
        namespace = obj.get("metadata", {}).get("namespace")
        # A custom resource is refused without both; a subresource is an object of another kind.
        full = obj if subresource else {"apiVersion": kind.api_version, "kind": kind.name, **obj}
        return await self.request("POST", kind.path(namespace, name, subresource), body=full)

    async def replace(self, kind: Kind, obj: Mapping[str, Any]) -> Object:
        """Update an object as read: a stale resourceVersion is ApiError(409)."""
        meta = obj["metadata"]
        return await self.request("PUT", kind.path(meta.get("namespace"), meta["name"]), body=obj)

    async def apply(
        self,
        kind: Kind,
        obj: Mapping[str, Any],
        *,
        manager: str,
        force: bool = False,
        subresource: str | None = None,
    ) -> Object:
        """Server-side apply. Without `force`, another manager's fields are ApiError(409)."""
        meta = obj["metadata"]
        full = {"apiVersion": kind.api_version, "kind": kind.name, **obj}
        query = {"fieldManager": manager, "force": "true" if force else "false"}
        path = kind.path(meta.get("namespace"), meta["name"], subresource)
        return await self.request("PATCH", path, query=query, body=full, content_type=_APPLY)

    async def merge(
        self,
        kind: Kind,
        name: str,
        patch: Mapping[str, Any],
        namespace: str | None = None,
        *,
        subresource: str | None = None,
    ) -> Object:
        """JSON merge patch; a resourceVersion in the patch's metadata makes it conditional."""
        return await self.request(
            "PATCH", kind.path(namespace, name, subresource), body=patch, content_type=_MERGE
        )

    async def delete(
        self,
        kind: Kind,
        name: str,
        namespace: str | None = None,
        *,
        grace_s: int | None = None,
        uid: str | None = None,
    ) -> None:
        """Delete one object (in the background, as kubectl does); gone already is no error."""
        options: Object = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        try:
            await self.request("DELETE", kind.path(namespace, name), body=options)
        except ApiError as error:
            if error.status != 404:
                raise

    async def watch(
        self, kind: Kind, namespace: str | None = None, *, since: str, labels: str = "", fields: str = ""
    ) -> AsyncIterator[tuple[str, Object]]:
        """Yield (`ADDED`｜`MODIFIED`｜`DELETED`｜`BOOKMARK`, object) until the server ends the watch.

        An expired resourceVersion is ApiError(410). A connection with no bytes for 75 s is taken
        as dead: the server is asked for a bookmark at least every minute.
        """
        query = {
            "watch": "1",
            "resourceVersion": since,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": "300",
        }
        query |= {k: v for k, v in (("labelSelector", labels), ("fieldSelector", fields)) if v}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=75)
        async with await self._send("GET", kind.path(namespace), query, None, None, timeout) as response:
            while line := await response.content.readline():
                event = orjson.loads(line)
                if event["type"] == "ERROR":
                    status = event["object"]
                    raise ApiError(status.get("code", 0), status.get("reason", ""), status.get("message", ""))
                yield event["type"], event["object"]

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str | None = None,
        timeout_s: float = 30.0,
    ) -> Object:
        """Any other call. Raises ApiError; a lost connection is ApiError with status 0."""
        data = orjson.dumps(body) if body is not None else None
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=5)
        try:
            async with await self._send(method, path, query, data, content_type, timeout) as response:
                raw = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiError(
                0, "ConnectionFailed", f"{method} {path}: {str(error) or type(error).__name__}"
            ) from error
        result: Object = orjson.loads(raw) if raw else {}
        return result

    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        data: bytes | None,
        content_type: str | None,
        limits: aiohttp.ClientTimeout,
    ) -> aiohttp.ClientResponse:
        url = f"{self._host}{path}" + (f"?{urlencode(query)}" if query else "")
        headers = {"Accept": "application/json", "User-Agent": "tidegate"}
        if data is not None:
            headers["Content-Type"] = content_type or "application/json"
        await self._authenticate(headers)
        response = await self._session().request(method, url, data=data, headers=headers, timeout=limits)
        if response.status >= 400:
            async with response:
                raise ApiError.from_body(response.status, await response.read())
        return response

    async def _authenticate(self, headers: dict[str, str]) -> None:
        token = await self._api.configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
        if token:
            headers["Authorization"] = token

    def _session(self) -> aiohttp.ClientSession:
        rest = self._api.rest_client
        if rest.pool_manager is None:
            rest.pool_manager = rest._create_pool_manager()
        session: aiohttp.ClientSession = rest.pool_manager
        return session
