"""Pure builders of the child objects: one module a kind of child."""
