"""One file per asset: what it does, without Dagster."""
