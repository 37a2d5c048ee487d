"""Measures a running engine and fits its step-time model; a client, like `load`."""
