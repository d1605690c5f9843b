"""Score and distil data sets with LLM calls, as a Dagster asset graph."""
