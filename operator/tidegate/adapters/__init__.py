"""The only code that talks to the outside: Kubernetes, metrics, engines."""
