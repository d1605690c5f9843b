"""Pure functions on rows and text; know neither files nor models."""
