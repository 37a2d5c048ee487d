"""The process kubelet: one process that plays the kubelet for all GPU nodes of a local cluster.

Pods bound to its nodes become real processes, each pod on its own loopback address. `model` reads
pods, `machine` decides (pure), `status` writes what was decided into the pod; `worker` and
`processes` do it.
"""
