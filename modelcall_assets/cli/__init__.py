"""The `modelcall` command line: thin, the work is done by the graph and its steps."""
