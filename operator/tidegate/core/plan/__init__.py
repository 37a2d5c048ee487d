"""The controller's plan: how many replicas each lane gets, and which lane serves whom."""

from tidegate.core.plan.plan import plan

__all__ = ["plan"]
