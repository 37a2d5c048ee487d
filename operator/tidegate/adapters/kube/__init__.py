"""Kubernetes, spoken in raw dicts.

Configuration and transport are the `kubernetes` client's (kubeconfig, in-cluster, exec plugins,
TLS); only its typed models are left out, since they cost ten times as much on hot paths.
"""

from tidegate.adapters.kube.client import ApiError, Kind, Kube
from tidegate.adapters.kube.reflector import Reflector

__all__ = ["ApiError", "Kind", "Kube", "Reflector"]
