"""The controller's plan: how many replicas each lane gets, and which lane serves whom."""
