"""The `preprocess` block of a scoring task."""

from collections.abc import Iterator
from importlib import import_module
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, Discriminator, Field, Tag

from modelcall_assets.config import Block, Count, Limit, Text, Texts, mistake
from modelcall_assets.config.places import Folder
from modelcall_assets.errors import Problem, did_you_mean

SCRIPTS = ("universal", "github_raw_code", "repo_xml", "triplet_filter")
ENCODINGS = ("o200k_base", "cl100k_base")
"""Vocabularies that come with the program."""
_COMPUTE = import_module("pyarrow.compute")
_ONLY_FOR = {
    **dict.fromkeys(("field_mapping", "filters", "transformations"), ("universal",)),
    "source_name": ("universal", "github_raw_code"),
    "detect_language": ("github_raw_code",),
    "languages": ("repo_xml", "triplet_filter"),
}


class Combine(Block):
    """Several columns joined into one text; empty ones are left out."""

    type: Literal["combine"]
    fields: Annotated[list[str], Field(min_length=1)]
    """Source columns, in order."""
    separator: str = " "
    """Text between two values."""


class Constant(Block):
    """The same value in every row."""

    type: Literal["constant"]
    value: Any
    """The value."""


def _kind(source: Any) -> Any:
    if isinstance(source, dict):
        return cast("dict[str, Any]", source).get("type", "")
    return getattr(source, "type", "column")


_SOURCES = "a column name, {type: combine, fields: […]} or {type: constant, value: …}"
FieldSource = Annotated[
    Annotated[str, Tag("column")]
    | Annotated[Combine, Tag("combine")]
    | Annotated[Constant, Tag("constant")],
    Discriminator(
        _kind,
        custom_error_type="mistake",
        custom_error_message="{wrong}",
        custom_error_context={"wrong": "unknown source", "expected": _SOURCES, "fix": ""},
    ),
]
_NOT_IN_RE2 = {
    "(?=": "name what follows as a part of the pattern",
    "(?!": "list what may follow, as in [^a-z]",
    "(?<": "name what stands before as a part of the pattern",
    "(?P=": "write the group a second time",
    "(?>": "write (?:…), no pattern is slow",
    "(?x": "write it without spaces and comments",
    "(?a": "leave it out: \\w, \\d and \\s are ASCII's anyway",
    "(?#": "leave the comment out",
    **{f"\\{digit}": "write the group a second time" for digit in range(1, 10)},
    "\\Z": r"write \z",
    "\\u": r"write \x{4e2d} for 中",
    "++": "write +, no pattern is slow",
    "*+": "write *, no pattern is slow",
}
"""What Python's regular expressions have besides → what to write."""


def _regex(pattern: str) -> str:
    try:
        _COMPUTE.match_substring_regex("", pattern)
    except ValueError as error:
        fix = next((what for sign, what in _NOT_IN_RE2.items() if sign in pattern), "")
        raise mistake(f"no regular expression of RE2: {error}", fix=fix) from error
    return pattern


def _together(patterns: list[str]) -> list[str]:
    _regex("|".join(f"(?:{pattern})" for pattern in patterns))
    return patterns


class Filters(Block):
    """Rows that do not meet all of these are dropped."""

    min_text_length: Annotated[int, Field(ge=0)] = 0
    """Shortest `text` to keep, in characters."""
    max_text_length: Limit = None
    """Longest `text` to keep, in characters."""
    required_fields: list[str] = Field(default_factory=list[str])
    """Columns that must be present and not empty."""
    blacklist_patterns: list[str] = Field(default_factory=list[str])
    """Drops a row whose `text` holds one of these, upper or lower case; not regular expressions."""
    blacklist_regex: Annotated[
        list[Annotated[str, AfterValidator(_regex)]], AfterValidator(_together)
    ] = Field(default_factory=list[str])
    """Drops a row in whose `text` one of these regular expressions, of RE2, is found."""
    apply_to: Literal["original", "cleaned"] = "original"
    """Which text lengths and patterns look at: as it came, or after `transformations`."""


class TextCleaning(Block):
    """What is done to `text`."""

    remove_extra_whitespace: bool = False
    """Every run of white space becomes one space; the ends are trimmed."""
    remove_characters: list[str] = Field(default_factory=list[str])
    """Characters to delete."""


class ComputedField(Block):
    """A column counted from another one."""

    type: Literal["text_length", "token_count"]
    """Characters or tokens."""
    source_field: str = "text"
    """The column that is counted."""


class Transformations(Block):
    """What is done to a row that passed the filters."""

    text_cleaning: TextCleaning = TextCleaning()
    computed_fields: dict[str, ComputedField] = Field(default_factory=dict[str, ComputedField])
    """New columns, counted after cleaning."""


class Dedup(Block):
    """Leaves out texts that a file of the task has already; who is processed first keeps them."""

    exact: bool = False
    """Texts that are equal."""
    near: Annotated[float, Field(ge=0.5, lt=1)] | None = None
    """Texts whose estimated similarity (Jaccard, of runs of five words) is at least this much."""


class LanguageId(Block):
    """Tells the natural language of `text`; needs the extra `text-language`."""

    enabled: bool = False
    """Adds the column `text_language`, ISO 639-1."""
    keep: list[Text] = Field(default_factory=list[str])
    """Languages to keep, such as `en` and `zh`; empty keeps all."""


def _known_script(name: str) -> str:
    if name in SCRIPTS or ":" in name:
        return name
    expected = f"{', '.join(SCRIPTS)}, or module:name of your own"
    raise mistake("unknown script type", expected=expected, fix=did_you_mean(name, SCRIPTS))


def _known_tokenizer(name: str) -> str:
    if name in ENCODINGS or name.endswith(".json"):
        return name
    expected = f"{', '.join(ENCODINGS)}, or a Hugging Face tokenizer.json"
    raise mistake("unknown tokenizer", expected=expected, fix=did_you_mean(name, ENCODINGS))


class Preprocess(Block):
    """Cleaning, filtering and truncation before scoring."""

    enabled: bool = False
    """Score the preprocessed rows instead of the input's."""
    script_type: Annotated[str, AfterValidator(_known_script)] = "universal"
    """`universal`, `github_raw_code`, `repo_xml`, `triplet_filter`, or `module:name` of your own:
    see preprocessing.md."""
    options: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Arguments of a preprocessor of your own."""
    input_folder: Folder | None = None
    """Raw input; default `data.input_folder`."""
    output_folder: Folder | None = None
    """Default: the raw input's folder + `_preprocessed`."""
    max_tokens: Count = 32768
    """Longer texts are truncated to this many tokens."""
    tokenizer: Annotated[Text, AfterValidator(_known_tokenizer)] = ENCODINGS[0]
    """Whose tokens: `o200k_base`, `cl100k_base`, or the path of a Hugging Face `tokenizer.json`
    (needs the extra `tokenizers`)."""
    num_proc: Count = 1
    """Processes that share the rows of one file; never more than there are cores."""
    num_files: Limit = None
    """Takes only the first files; of partitions that have several an equal share, one at least."""
    languages: list[Text] | None = None
    """`repo_xml`, `triplet_filter`: which language folders or parts to take; default all."""
    detect_language: Literal["name", "content"] = "name"
    """`github_raw_code`: what tells the programming language; `content` looks into files whose name
    does not say it (needs the extra `code-language`)."""
    source_name: Text | None = None
    """Value of the column `source`; default `unknown`, of `github_raw_code` its own name."""
    file_pattern: Text = "*"
    """Takes only inputs whose relative path matches this glob."""
    field_mapping: dict[str, FieldSource] = Field(default_factory=dict[str, FieldSource])
    """Target column → source column, `{type: combine, …}` or `{type: constant, …}`."""
    filters: Filters = Filters()
    transformations: Transformations = Transformations()
    scrub: Texts = Field(default_factory=list[str])
    """`module:name` of objects or classes with `scrub(text) -> (text, counts)`, such as for
    personal data and secrets."""
    language_id: LanguageId = LanguageId()
    dedup: Dedup = Dedup()
    stat_folder: Folder | None = None
    """Writes a stat JSON per file, as the old system did, below `preprocess/` of this folder."""

    @property
    def is_own(self) -> bool:
        return self.script_type not in SCRIPTS


def unused_fields(preprocess: Preprocess, file: str) -> Iterator[Problem]:
    script = preprocess.script_type
    for name in preprocess.model_dump(exclude_defaults=True):
        scripts = _ONLY_FOR.get(name)
        unused = scripts is not None and script not in scripts
        if unused or (name == "options" and not preprocess.is_own):
            wrong = f"has no effect with script_type {script}"
            only = f"only {' and '.join(scripts or ())} read it" if scripts else ""
            fix = only or "only a preprocessor of your own has options"
            yield Problem(file, f"preprocess.{name}", wrong, fix=fix, severity="warning")
