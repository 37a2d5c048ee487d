"""The endpoint picker behind Envoy: the class of every request, enforced."""
