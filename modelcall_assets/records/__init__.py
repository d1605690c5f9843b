"""The nouns that every floor shares; knows only the standard library and pydantic."""
