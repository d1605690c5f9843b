"""The LLM engine: requests in, outcomes out. Never sees a path."""
