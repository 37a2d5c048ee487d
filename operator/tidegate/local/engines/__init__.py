"""Emulated engines: the pure engine model behind vLLM's and Triton's HTTP faces, in real time."""
