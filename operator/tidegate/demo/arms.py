"""One arm: the load in a process of its own, and a frame a second while it runs."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tidegate.demo.facts import Frame, gather
from tidegate.load.scenario import Scenario

_NICE = -10
"""The load generator goes first where the system allows it: a late sender measures itself."""


class DemoError(RuntimeError):
    """The demo cannot go on; the message says what was seen and where to look."""


@dataclass(slots=True)
class Arm:
    """What one arm gave. `figures` is per class, as the client counted."""

    name: str
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    lag_ms: dict[str, float] = field(default_factory=dict)
    frames: list[Frame] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    actions: dict[str, int] = field(default_factory=dict)
    decisions: list[dict[str, Any]] = field(default_factory=list)


async def run_arm(
    name: str,
    load: Scenario,
    urls: dict[str, str],
    out: Path,
    show: Callable[[Frame], None],
) -> Arm:
    """Run the load against `urls["gateway"]`, calling `show` with each frame.

    Raises DemoError when the load generator fails, with what it said.
    """
    plan, rows = _files(out, name)
    plan.write_text(load.model_dump_json(indent=1))
    arm = Arm(name)
    async with httpx.AsyncClient(timeout=1.0) as client:
        before = await gather(client, urls["controller"], urls["picker"], 0.0, {})
        wall = time.time()
        sender = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tidegate", "load", str(plan)),
            *("--gateway", urls["gateway"], "--out", str(rows), "--drain", "60"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        _prefer(sender.pid)
        try:
            printed = await _watch(sender, arm, client, urls, show)
        except asyncio.CancelledError:
            sender.terminate()
            raise
    result = json.loads(printed)
    arm.figures, arm.lag_ms = result["classes"], result["lag_ms"]
    arm.requests = [json.loads(row) for row in rows.read_text().splitlines()]
    last = arm.frames[-1]
    arm.actions = {k: int(v - before.actions.get(k, 0)) for k, v in last.actions.items()}
    arm.decisions = [d for d in last.decisions if d.get("time", 0) >= wall]
    return arm


async def _watch(
    sender: asyncio.subprocess.Process,
    arm: Arm,
    client: httpx.AsyncClient,
    urls: dict[str, str],
    show: Callable[[Frame], None],
) -> bytes:
    """Add a frame a second until the load generator ends; returns what it printed."""
    latest: dict[str, Any] = {}
    errors: list[str] = []
    reader = asyncio.create_task(_follow(sender, latest, errors))
    done = asyncio.create_task(_read_all(sender))
    while not done.done():
        t, classes = latest.get("t", 0.0), latest.get("classes", {})
        frame = await gather(client, urls["controller"], urls["picker"], t, classes)
        arm.frames.append(frame)
        show(frame)
        await asyncio.wait([done], timeout=1.0)
    await reader
    if sender.returncode:
        raise DemoError(f"the load generator ended with {sender.returncode}: " + " ".join(errors[-5:]))
    return await done


def _files(out: Path, name: str) -> tuple[Path, Path]:
    out.mkdir(parents=True, exist_ok=True)
    plan = out / f"{name}-scenario.json"
    plan.touch(mode=0o600)  # it holds bearer tokens
    return plan, out / f"{name}-requests.jsonl"


def _prefer(pid: int) -> None:
    try:
        os.setpriority(os.PRIO_PROCESS, pid, _NICE)
    except PermissionError:
        return  # its own figure of lag tells whether that mattered


async def _follow(process: asyncio.subprocess.Process, latest: dict[str, Any], errors: list[str]) -> None:
    assert process.stderr is not None  # noqa: S101 - we asked for a pipe
    async for raw in process.stderr:
        try:
            latest.update(json.loads(raw))
        except ValueError:
            errors.append(raw.decode(errors="replace").rstrip())


async def _read_all(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None  # noqa: S101 - we asked for a pipe
    printed = await process.stdout.read()
    await process.wait()
    return printed
