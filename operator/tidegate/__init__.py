"""Tidegate: quality of service for GPU LLM pools on Kubernetes."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("tidegate")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0.0.0"
