"""Rating without a model."""
