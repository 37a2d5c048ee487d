"""Runs a program that dies with its parent: `python -I -S shim.py PARENT-PID PROGRAM ARG…`.

A shim rather than a `preexec_fn`, which is not safe beside threads. It is run by its path, with
nothing imported but the standard library, and replaces itself by the program.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    """Set the parent-death signal, look whether the parent still lives, and become the program."""
    parent, program = int(argv[0]), argv[1:]
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit("shim: prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the signal was set: nobody would ever end us
        sys.exit("shim: the parent is gone")
    try:
        os.execv(program[0], program)  # noqa: S606
    except OSError as error:
        print(f"cannot run {program[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main(sys.argv[1:])
