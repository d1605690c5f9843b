"""A prompt file: what the model is asked, and what its answer must be."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Any

from pydantic import AfterValidator

from modelcall_assets.config.answer import OutputConfig
from modelcall_assets.config.answer_rules import output_problems
from modelcall_assets.config.block import Block, Text
from modelcall_assets.config.problems import errors_in, validate
from modelcall_assets.config.template import placeholders_of
from modelcall_assets.errors import Problem


def _template(text: str) -> str:
    placeholders_of(text)
    return text


class PromptTemplate(Block):
    """The messages of a request."""

    system_text: str | None = None
    """System message, sent as it is; braces mean nothing in it."""
    prompt_text: Annotated[Text, AfterValidator(_template)]
    """User message; `{name}` stands for a column, `{name.key}` and `{name.0}` for what an object or
    list in it holds, `{{` and `}}` for braces. Objects, lists, true and false are written as JSON;
    a row in which one is null or absent is not sent."""


class PromptFile(Block):
    """The shape of a prompt file."""

    prompt_template: PromptTemplate
    """The messages of a request."""
    output_config: OutputConfig = OutputConfig()
    """The JSON object that the model must answer with."""


@dataclass(frozen=True)
class PromptConfig:
    """A prompt under the name of its file."""

    name: str
    prompt_template: PromptTemplate
    output_config: OutputConfig

    @property
    def version(self) -> str:
        """`<name>@<digest>`: changes when the content does, not when its layout does."""
        content = [self.prompt_template.model_dump(), self.output_config.model_dump()]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
        return f"{self.name}@{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def placeholders(self) -> frozenset[str]:
        """Names that the text needs values for."""
        return placeholders_of(self.prompt_template.prompt_text)

    @property
    def fields(self) -> dict[str, dict[str, Any]]:
        """JSON key → its JSON Schema; an empty schema means any value."""
        return self.output_config.fields

    @property
    def optional_defaults(self) -> dict[str, Any]:
        """Values that may fill a gap in an answer."""
        return self.output_config.optional_defaults

    def answer_schema(self) -> dict[str, Any]:
        """JSON Schema of the answer object."""
        return self.output_config.answer_schema()


def parse_prompt(data: dict[str, Any], file: str) -> tuple[PromptConfig | None, list[Problem]]:
    """The prompt, and every problem of its file; no prompt if one of them is an error."""
    parsed, problems = validate(PromptFile, data, file)
    if parsed is None:
        return None, problems
    problems += output_problems(parsed.output_config, file)
    name = PurePath(file).stem
    prompt = PromptConfig(name, parsed.prompt_template, parsed.output_config)
    return None if errors_in(problems) else prompt, problems
