"""Writes the files that the components read: certificates, tokens, kubeconfigs, configurations."""

import json
import secrets
from pathlib import Path
from typing import Final

import yaml

from tidegate.local import certs, kubeconfig
from tidegate.local.components import SERVICE_ADDRESS, Context, scheduler_config

_USERS: Final = {
    # kubeconfig: user, groups
    "admin": ("tidegate-admin", "system:masters"),
    "kube-controller-manager": ("system:kube-controller-manager", ""),
    "kube-scheduler": ("system:kube-scheduler", ""),
    "kubelet": ("tidegate-kubelet", ""),
}


def _tokens(path: Path) -> dict[str, str]:
    """Tokens of the static users, kept from start to start so that kubeconfigs stay good."""
    tokens = {}
    if path.exists():
        known = (line.split(",") for line in path.read_text().splitlines())
        tokens = {user: token for token, user, *_ in known}
    result = {name: tokens.get(user) or secrets.token_hex(16) for name, (user, _) in _USERS.items()}
    lines = []
    for name, (user, group) in _USERS.items():
        lines.append(",".join([result[name], user, user, *([group] if group else [])]))
    certs.write_secret(path, ("\n".join(lines) + "\n").encode())
    return result


def prepare(context: Context) -> None:
    """Write everything that `components(context)` refers to."""
    layout = context.layout
    for folder in (layout.logs, layout.config, layout.pki, layout.root / "kubeconfigs"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in context.settings.parts:
        layout.data(name).mkdir(mode=0o700, parents=True, exist_ok=True)
    authority = certs.Authority(layout.pki)
    certs.issue_all(authority, context.address, SERVICE_ADDRESS)
    server = context.url("api", "https")
    for name, token in _tokens(layout.pki / "tokens.csv").items():
        path = layout.kubeconfig if name == "admin" else layout.kubeconfig_of(name)
        kubeconfig.write(path, server=server, ca=authority.certificate, user=_USERS[name][0], token=token)
    for name in ("kube-scheduler", "tidegate-scheduler"):
        if name in context.settings.parts:
            text = yaml.safe_dump(scheduler_config(context, name), sort_keys=False)
            (layout.config / f"{name}.yaml").write_text(text)
    if "envoy" in context.settings.parts:
        _write_envoy(context, layout.config / "envoy.json")


def _write_envoy(context: Context, path: Path) -> None:
    from tidegate.render.envoy import bootstrap

    config = bootstrap(
        listen_host=context.address,
        listen_port=context.ports["gateway"],
        admin_host=context.address,
        admin_port=context.ports["envoy-admin"],
        picker_host=context.address,
        picker_port=context.ports["picker-ext-proc"],
        measure_port=context.ports["picker-measure"],
    )
    path.write_text(json.dumps(config, indent=2))
