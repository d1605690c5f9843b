"""How a task's rows are preprocessed: what a process needs to know, and what it makes of it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modelcall_assets.config.places import is_file
from modelcall_assets.config.preprocess import Combine, Preprocess
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.records.dotted import DottedError, create, load_object, source_digest
from modelcall_assets.transforms.finishing import Finishing
from modelcall_assets.transforms.preprocessor import GithubRawCode, Preprocessor, TripletFilter
from modelcall_assets.transforms.repo_xml import RepoXml
from modelcall_assets.transforms.tokens import TokenizerError, tokenizer
from modelcall_assets.transforms.universal import Universal

_WHERE_NOT_WHAT = {
    "enabled", "input_folder", "output_folder", "num_proc", "num_files", "languages",
    "file_pattern", "stat_folder",
}  # fmt: skip
"""Fields that do not shape the rows of a file."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The `preprocess` block of a task file. Can be pickled."""

    config: Preprocess
    root: Path
    file: str

    def preprocessor(self) -> Preprocessor:
        """A new one; SetupError when the user's cannot be had."""
        config = self.config
        match config.script_type:
            case "universal":
                return _universal(config, self._tokenizer)
            case "github_raw_code":
                by_content = config.detect_language == "content"
                return GithubRawCode(by_content, config.source_name or "github_raw_code")
            case "repo_xml":
                return RepoXml(config.languages)
            case "triplet_filter":
                return TripletFilter(config.languages)
            case path:
                method = "process_item(item) -> dict | None"
                return self._users("script_type", path, method, **config.options)

    def finishing(self) -> Finishing:
        """What its rows get in the end; SetupError when a scrubber cannot be had."""
        config = self.config
        scrub = "scrub(text) -> (text, counts)"
        return Finishing(
            max_tokens=config.max_tokens,
            encoding=self._tokenizer,
            scrubbers=[self._users("scrub", path, scrub) for path in config.scrub],
            languages=config.language_id.keep if config.language_id.enabled else None,
            exact=config.dedup.exact,
            near=config.dedup.near is not None,
        )

    def version(self) -> dict[str, Any]:
        """What shapes the rows, user code and vocabulary files included."""
        self.preprocessor()
        self.finishing()
        config = self.config
        own = [*config.scrub, *([config.script_type] if config.is_own else [])]
        shape = config.model_dump(exclude=_WHERE_NOT_WHAT, exclude_defaults=True)
        shape["code"] = {path: source_digest(path) for path in own}
        if config.tokenizer.endswith(".json"):
            content = Path(self._tokenizer).read_bytes()
            shape["vocabulary"] = hashlib.sha256(content).hexdigest()[:16]
        return shape

    def absent(self, names: Collection[str]) -> dict[str, str]:
        """Columns that the block names and that input with these does not have, by field."""
        sources: dict[str, str] = {}
        for target, spec in self.config.field_mapping.items():
            if isinstance(spec, str):
                sources[f"field_mapping.{target}"] = spec
            elif isinstance(spec, Combine):
                fields = enumerate(spec.fields)
                sources |= {f"field_mapping.{target}.fields[{at}]": name for at, name in fields}
        made = {*names, *self.config.field_mapping, "text"}
        for name, computed in self.config.transformations.computed_fields.items():
            if computed.source_field not in made:
                place = f"transformations.computed_fields.{name}.source_field"
                sources[place] = computed.source_field
        return {place: name for place, name in sources.items() if name not in names}

    def check(self) -> None:
        """SetupError when it cannot run here."""
        if problems := [*self._problems()]:
            raise SetupError(problems)

    def _problems(self) -> Iterator[Problem]:
        for name, package, extra in self._packages():
            if find_spec(package) is None:
                wrong = f"the package {package} is not installed"
                fix = f"pip install 'modelcall-assets[{extra}]'"
                yield Problem(self.file, f"preprocess.{name}", wrong, fix=fix, unready=True)
        yield from self._tokenizer_problems()
        try:
            self.preprocessor()
            self.finishing()
        except SetupError as error:
            yield from error.problems

    def _tokenizer_problems(self) -> Iterator[Problem]:
        name = self.config.tokenizer
        if not name.endswith(".json") or find_spec("tokenizers") is None:
            return
        if not is_file(self._tokenizer):
            yield Problem(self.file, "preprocess.tokenizer", "no such file", have=name)
            return
        try:
            tokenizer(self._tokenizer)
        except TokenizerError as error:
            yield Problem(self.file, "preprocess.tokenizer", str(error))

    def _packages(self) -> Iterator[tuple[str, str, str]]:
        """Field, package and extra of what the task wants beyond the ordinary."""
        config = self.config
        if config.tokenizer.endswith(".json"):
            yield "tokenizer", "tokenizers", "tokenizers"
        if config.language_id.enabled:
            yield "language_id", "py3langid", "text-language"
        if config.script_type == "github_raw_code" and config.detect_language == "content":
            yield "detect_language", "magika", "code-language"
        if config.dedup.near is not None:
            yield "dedup.near", "rensa", "near-dedup"

    @property
    def _tokenizer(self) -> str:
        name = self.config.tokenizer
        return str(self.root / name) if name.endswith(".json") else name

    def _users(self, name: str, path: str, method: str, **options: Any) -> Any:
        try:
            return create(load_object(path, self.root, method), path, **options)
        except DottedError as error:
            problem = Problem(self.file, f"preprocess.{name}", error.wrong, error.expected)
            raise SetupError([problem]) from error


def _universal(config: Preprocess, tokenizer: str) -> Universal:
    filters, cleaning = config.filters, config.transformations.text_cleaning
    computed = config.transformations.computed_fields
    return Universal(
        field_mapping={
            name: spec if isinstance(spec, str) else spec.model_dump()
            for name, spec in config.field_mapping.items()
        },
        min_text_length=filters.min_text_length,
        max_text_length=filters.max_text_length,
        required_fields=tuple(filters.required_fields),
        blacklist_patterns=tuple(filters.blacklist_patterns),
        blacklist_regex=tuple(filters.blacklist_regex),
        filter_cleaned=filters.apply_to == "cleaned",
        remove_extra_whitespace=cleaning.remove_extra_whitespace,
        remove_characters=tuple(cleaning.remove_characters),
        computed_fields={name: spec.model_dump() for name, spec in computed.items()},
        source_name=config.source_name or "unknown",
        tokenizer=tokenizer,
    )
