"""The asset graph: the only folder that knows Dagster."""
