"""What an image name means on a process node: the local program that stands for it."""

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from tidegate.local.kubelet.model import Container


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """A Python function `module:function`, called as `function(argv) -> exit code` in a fork."""

    target: str
    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Command:
    """A program and its arguments."""

    argv: tuple[str, ...]


Program = EntryPoint | Command


@dataclass(frozen=True, slots=True)
class Image:
    """How an image is run.

    `target` names a Python entry point; else `command` is a command line, to which the
    container's own is appended; with neither, the container's command and args run as they are
    (`default` when it gives none). `entrypoints` are beginnings of a container's command that
    stand for the image's own and are left out.
    """

    about: str
    target: str = ""
    command: tuple[str, ...] = ()
    default: tuple[str, ...] = ()
    entrypoints: tuple[tuple[str, ...], ...] = ()


_SHELL: Final = Image("runs command and args as they are", default=("/bin/sh",))

BUILTIN: Final[Mapping[str, Image]] = {
    "vllm/vllm-openai": Image(
        "the emulated vLLM",
        target="tidegate.local.engines.vllm:main",
        entrypoints=(
            ("vllm", "serve"),
            ("python3", "-m", "vllm.entrypoints.openai.api_server"),
            ("python", "-m", "vllm.entrypoints.openai.api_server"),
        ),
    ),
    "nvcr.io/nvidia/tritonserver": Image(
        "the emulated Triton",
        target="tidegate.local.engines.triton:main",
        entrypoints=(("tritonserver",), ("/opt/tritonserver/bin/tritonserver",)),
    ),
    "tidegate/shell": _SHELL,
    "busybox": _SHELL,
    "registry.k8s.io/pause": Image("does nothing", default=("sleep", "infinity")),
}


class UnknownImageError(Exception):
    """The image stands for nothing here; the message lists those that do."""


class BadCommandError(Exception):
    """The image is known, but the container's command cannot be run in its place."""


def repository(image: str) -> str:
    """Name of an image without registry default, tag and digest: `docker.io/a/b:1@sha256:…` → `a/b`."""
    name = image.split("@", 1)[0]
    head, _, last = name.rpartition("/")
    last = last.split(":", 1)[0]
    name = f"{head}/{last}" if head else last
    for prefix in ("docker.io/library/", "docker.io/", "index.docker.io/"):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def with_overrides(overrides: Iterable[str], table: Mapping[str, Image] = BUILTIN) -> dict[str, Image]:
    """Add `NAME=COMMAND LINE` rows to a table. Raises ValueError naming what is wrong."""
    images = dict(table)
    for text in overrides:
        name, equals, line = text.partition("=")
        argv = tuple(shlex.split(line))
        if not (equals and name.strip() and argv):
            raise ValueError(f"--image {text!r}: write NAME=COMMAND, e.g. vllm/vllm-openai='python -m vllm'")
        known = images.get(repository(name))
        entrypoints = known.entrypoints if known else ()
        images[repository(name)] = Image(f"`{line}`", command=argv, entrypoints=entrypoints)
    return images


def resolve(container: Container, pod_ip: str, images: Mapping[str, Image]) -> Program:
    """Say what to run for a container whose command and args are expanded already.

    Raises UnknownImageError or BadCommandError with a message for the pod's status.
    """
    image = images.get(repository(container.image))
    if image is None:
        known = ", ".join(f"{name} ({row.about})" for name, row in sorted(images.items()))
        raise UnknownImageError(
            f'image "{container.image}" is not known on process nodes, which pull nothing; known: {known}'
        )
    line = (*container.command, *container.args)
    for beginning in image.entrypoints:
        if container.command and line[: len(beginning)] == beginning:
            line = line[len(beginning) :]
            break
    else:
        if container.command and image.entrypoints:
            allowed = " or ".join(f"`{' '.join(e)}`" for e in image.entrypoints)
            raise BadCommandError(
                f"image {repository(container.image)} stands for {image.about} here and cannot run "
                f"`{' '.join(container.command)}`: leave `command` out, or begin it with {allowed}"
            )
        if image.entrypoints and line[:1] == ("tritonserver",):
            line = line[1:]  # NVIDIA's image is often given its program's name as the first argument
    if image.target:
        return EntryPoint(image.target, line)
    if image.command:
        return Command(tuple(part.replace("{podIP}", pod_ip) for part in image.command) + line)
    if not container.command:
        line = image.default + line
    return Command(line)
