"""The arms that production's queue is compared with: what others do, and what nobody can beat."""
