"""Kubeconfigs: one user, one cluster, everything inline."""

import base64
from pathlib import Path

import yaml

from tidegate.local.certs import write_secret

CLUSTER_NAME = "tidegate-local"


def render(server: str, ca: bytes, user: str, token: str, namespace: str = "default") -> str:
    """A kubeconfig for `user`, who shows `token` to `server` (a URL); `ca` is PEM."""
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": CLUSTER_NAME,
            "clusters": [
                {
                    "name": CLUSTER_NAME,
                    "cluster": {
                        "server": server,
                        "certificate-authority-data": base64.b64encode(ca).decode(),
                    },
                }
            ],
            "users": [{"name": user, "user": {"token": token}}],
            "contexts": [
                {
                    "name": CLUSTER_NAME,
                    "context": {"cluster": CLUSTER_NAME, "user": user, "namespace": namespace},
                }
            ],
        },
        sort_keys=False,
    )


def write(path: Path, *, server: str, ca: Path, user: str, token: str, namespace: str = "default") -> None:
    """Write a kubeconfig that only its owner can read."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_secret(path, render(server, ca.read_bytes(), user, token, namespace).encode())
