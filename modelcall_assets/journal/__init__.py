"""The append-only raw replies of a partition: what was paid for is never paid again."""
