"""Pure decisions: no I/O, no clock, no logger, no randomness."""
