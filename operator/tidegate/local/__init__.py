"""A cluster on one machine: control plane, GPU nodes, engines as processes."""
