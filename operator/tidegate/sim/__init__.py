"""The engine model, driven in virtual time by the simulator and in real time by the emulated engine."""
