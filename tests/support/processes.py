"""The process behind a pod of the local cluster."""

from pathlib import Path
from typing import Any


def process_of(pod: dict[str, Any]) -> int:
    """Pid of the process that listens on a pod's address and port 8000."""
    ip = pod["status"]["podIP"]
    address = "".join(f"{int(part):02X}" for part in reversed(ip.split("."))) + ":1F40"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inode = next(row[9] for row in rows if row[1] == address and row[3] == "0A")
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(fd.readlink()) == f"socket:[{inode}]":
                return int(fd.parts[2])
        except OSError:
            continue
    raise AssertionError(f"nobody listens on {ip}:8000")
