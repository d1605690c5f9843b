"""Mistakes in `output_config` that lie between its fields."""

from __future__ import annotations

from collections.abc import Iterator

from modelcall_assets.config.answer import OutputConfig
from modelcall_assets.config.block import did_you_mean
from modelcall_assets.config.json_schema import schema_problems
from modelcall_assets.errors import Problem


def output_problems(output: OutputConfig, file: str) -> Iterator[Problem]:
    """Mistakes between the fields of the block."""
    if malformed := schema_problems(output.json_schema, "output_config.json_schema", file):
        yield from malformed
        return
    yield from _json_problems(output, file)
    yield from _key_problems(output, file)
    for key in output.keys:
        if not output.fields[key] and key not in output.json_schema.get("properties", {}):
            yield Problem(
                file,
                f"output_config.json_keys[{output.keys.index(key)}]",
                f"{key} has no type",
                fix=f"declare it in output_config.json_schema.properties.{key}",
                severity="warning",
            )


def _json_problems(output: OutputConfig, file: str) -> Iterator[Problem]:
    place = "output_config.require_json"
    if output.keys and not output.require_json:
        yield Problem(file, place, "false, but keys are declared", fix="write require_json: true")
    if output.require_json and not output.keys:
        fix = "list the keys in output_config.json_keys or json_schema.properties"
        yield Problem(file, place, "true, but no key is declared", fix=fix)


def _key_problems(output: OutputConfig, file: str) -> Iterator[Problem]:
    for index, key in enumerate(output.json_keys):
        place = f"output_config.json_keys[{index}]"
        if key in output.json_keys[:index]:
            yield Problem(file, place, f"{key} is there twice", fix="remove one")
    for key in output.keys:
        if key.startswith("api_"):
            wrong = f"{key}: names that start with api_ are columns of this program"
            yield Problem(file, "output_config.json_keys", wrong, fix="choose another name")
    for place, keys in (
        ("json_key_must_exists", output.json_key_must_exists),
        ("json_default_values", output.json_default_values),
        ("json_schema.properties", output.json_schema.get("properties", {})),
        ("json_schema.required", output.json_schema.get("required", [])),
    ):
        for index, key in enumerate(keys):
            if key not in output.keys:
                item = f"[{index}]" if isinstance(keys, list) else f".{key}"
                fix = did_you_mean(key, output.keys) or "add it to output_config.json_keys"
                yield Problem(file, f"output_config.{place}{item}", f"{key} is not a key", fix=fix)
