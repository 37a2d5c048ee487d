"""From the kinds and the cluster's objects to core's plain values."""
