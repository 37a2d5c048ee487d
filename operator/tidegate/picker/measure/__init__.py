"""What clients got: measured by Envoy on the way back, joined here with class, tenant and model."""
