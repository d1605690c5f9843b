"""What an answer must be: the `output_config` block and the JSON Schema that follows from it."""

from __future__ import annotations

from typing import Any, cast

from pydantic import Field

from modelcall_assets.config.block import Block, Text


class OutputConfig(Block):
    """The JSON object that the model must answer with."""

    require_json: bool = False
    """Whether the answer is a JSON object; else it is kept as text."""
    json_keys: list[Text] = Field(default_factory=list[str])
    """Keys that become columns; default: the properties of `json_schema`."""
    json_key_must_exists: list[str] = Field(default_factory=list[str])
    """Keys without which an answer is a failure."""
    json_default_values: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Values for keys that may be missing; a number never stands in for a rating."""
    json_schema: dict[str, Any] = Field(default_factory=dict[str, Any])
    """JSON Schema of the object: types, ranges and enums of its `properties`, `required`."""

    @property
    def keys(self) -> list[str]:
        """Keys of the answer, in column order."""
        return self.json_keys or list(self._properties)

    @property
    def required(self) -> list[str]:
        """Keys that must be there, by either of the two ways to say so."""
        named = {*self.json_key_must_exists, *self.json_schema.get("required", [])}
        return [key for key in self.keys if key in named]

    @property
    def fields(self) -> dict[str, dict[str, Any]]:
        """The JSON Schema of each key; an empty one means any value."""
        return {key: self._field(key) for key in self.keys}

    @property
    def optional_defaults(self) -> dict[str, Any]:
        """Defaults that may fill a gap: of keys that may be missing, and never a number."""
        return {
            key: value
            for key, value in self.json_default_values.items()
            if key not in self.required and not _is_number(value)
        }

    def answer_schema(self) -> dict[str, Any]:
        """The schema of the whole object."""
        own = {"type": "object", "properties": self.fields, "required": self.required}
        return self.json_schema | own

    @property
    def _properties(self) -> dict[str, dict[str, Any]]:
        return self.json_schema.get("properties", {})

    def _field(self, key: str) -> dict[str, Any]:
        if key in self._properties:
            return self._properties[key]
        guessed = _schema_of(self.json_default_values.get(key))
        return {"type": "number"} if not guessed and key == "score" else guessed


def _schema_of(value: Any) -> dict[str, Any]:
    """The type that a default value shows its key to have."""
    if isinstance(value, bool):
        return {"type": "boolean"}
    if _is_number(value):
        return {"type": "number"}
    if isinstance(value, str):
        return {"type": "string"}
    if isinstance(value, list):
        items = cast("list[Any]", value)
        texts = all(isinstance(item, str) for item in items)
        return {"type": "array", "items": {"type": "string"}} if texts else {"type": "array"}
    return {"type": "object"} if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
