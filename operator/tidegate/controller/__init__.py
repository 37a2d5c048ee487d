"""The operator: kopf for events, an own gather, plan, apply loop."""
