"""The kube-scheduler extender: reservations held on the GPUs."""
