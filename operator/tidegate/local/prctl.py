"""What is asked of prctl(2) here; the parent-death signal is set in shim.py. Linux only."""

import ctypes
import os
import sys

_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """Take in the orphans of all descendants, so that they can be reaped and killed."""
    if sys.platform != "linux":
        raise OSError("tidegate local runs on Linux only: it relies on prctl(2)")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
