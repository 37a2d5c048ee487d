"""The two things asked of prctl(2). Linux only."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    if sys.platform != "linux":
        raise OSError("tidegate local runs on Linux only: it relies on prctl(2)")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def become_subreaper() -> None:
    """Take in the orphans of all descendants, so that they can be reaped and killed."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Be killed when the parent ends; more exactly, when the *thread* that started us ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
