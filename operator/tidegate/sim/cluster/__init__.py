"""A cluster in virtual time: pods that production's planner and placement move, under a fleet."""
