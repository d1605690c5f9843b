"""How a task's rows are preprocessed, and what a process makes of a piece by it."""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from modelcall_assets.config.places import is_file
from modelcall_assets.config.preprocess import Combine, Preprocess
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.records.outcome import INT64, BadLine, Dropped, Reason, Row, moved_names
from modelcall_assets.stages import pieces
from modelcall_assets.stages.pieces import (
    ERROR_COLUMN,
    NamedPiece,
    NewRow,
    PieceRows,
    Told,
    readable,
)
from modelcall_assets.storage.formats import clip
from modelcall_assets.storage.rows import record_id
from modelcall_assets.transforms.preprocessor import (
    Copied,
    Declared,
    GithubRawCode,
    Kind,
    Preprocessor,
    Scrubber,
    TripletFilter,
    Universal,
    as_text,
)
from modelcall_assets.transforms.repo_xml import RepoXml
from modelcall_assets.transforms.texts import EXTRAS, ToolError, signature, text_language, tokenizer
from modelcall_assets.transforms.user_code import RAISED, create, source_digest, users_traceback

_WHERE_NOT_WHAT = {
    "enabled", "input_folder", "output_folder", "num_proc", "num_files", "languages",
    "file_pattern", "stat_folder",
}  # fmt: skip
"""Fields that do not shape the rows of a file."""
LANGUAGE_COLUMN = "text_language"
_EXPECTED = (TypeError, ValueError, KeyError)
"""What a preprocessor of ours raises for an item that it cannot work on."""
_FITS = {"string": {str}, "int": {int}, "float": {float, int}, "bool": {bool}}
"""What may be in a column that the user has declared."""


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
                blocks = {"field_mapping", "filters", "transformations"}
                shape = config.model_dump(include=blocks)
                is_cleaned = shape["filters"].pop("apply_to") == "cleaned"
                return Universal(
                    field_mapping=shape["field_mapping"],
                    **shape["filters"],
                    filter_cleaned=is_cleaned,
                    **shape["transformations"]["text_cleaning"],
                    computed_fields=shape["transformations"]["computed_fields"],
                    source_name=config.source_name or "unknown",
                    tokenizer=self.vocabulary,
                )
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

    def scrubbers(self) -> list[Scrubber]:
        """SetupError when one cannot be had."""
        method = "scrub(text) -> (text, counts)"
        return [self._users("scrub", path, method) for path in self.config.scrub]

    def version(self) -> dict[str, Any]:
        """What shapes the rows, user code and vocabulary files included."""
        self.preprocessor()
        self.scrubbers()
        config = self.config
        own = [*config.scrub, *([config.script_type] if config.is_own else [])]
        shape = config.model_dump(exclude=_WHERE_NOT_WHAT, exclude_defaults=True)
        shape["code"] = {path: source_digest(path) for path in own}
        if config.tokenizer.endswith(".json"):
            content = Path(self.vocabulary).read_bytes()
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
        new = {*self.config.field_mapping, "text"}
        for name, computed in self.config.transformations.computed_fields.items():
            if computed.source_field not in new:
                field = f"transformations.computed_fields.{name}.source_field"
                sources[field] = computed.source_field
        return {field: name for field, name in sources.items() if name not in names}

    def check(self) -> None:
        """SetupError when it cannot run here."""
        problems = [*self._lacking()]
        name = self.config.tokenizer
        if name.endswith(".json") and find_spec("tokenizers") is not None:
            try:
                if is_file(self.vocabulary):
                    tokenizer(self.vocabulary)
                else:
                    wrong = "no such file"
                    problems.append(Problem(self.file, "preprocess.tokenizer", wrong, have=name))
            except ToolError as error:
                problems.append(Problem(self.file, "preprocess.tokenizer", str(error)))
        try:
            self.preprocessor()
            self.scrubbers()
        except SetupError as error:
            problems += error.problems
        if problems:
            raise SetupError(problems)

    def _lacking(self) -> Iterator[Problem]:
        """Packages that the task wants beyond the ordinary."""
        config = self.config
        is_code = config.script_type == "github_raw_code"
        for field, package, is_wanted in (
            ("tokenizer", "tokenizers", config.tokenizer.endswith(".json")),
            ("language_id", "py3langid", config.language_id.enabled),
            ("detect_language", "magika", is_code and config.detect_language == "content"),
            ("dedup.near", "rensa", config.dedup.near is not None),
        ):
            if is_wanted and find_spec(package) is None:
                wrong = f"the package {package} is not installed"
                fix = f"pip install 'modelcall-assets[{EXTRAS[package]}]'"
                yield Problem(self.file, f"preprocess.{field}", wrong, fix=fix, unready=True)

    @property
    def vocabulary(self) -> str:
        name = self.config.tokenizer
        return str(self.root / name) if name.endswith(".json") else name

    def _users(self, field: str, path: str, method: str, **options: Any) -> Any:
        its = "preprocess.options" if field == "script_type" else ""
        return create(path, self.root, method, self.file, f"preprocess.{field}", its, **options)


class Worker:
    """Parses a piece of a file, preprocesses its items and finishes its rows.

    `schema` is that of the rows, None where only the rows tell; `added` are the columns that all
    have. `moved`: columns that are called like ours → their names in the rows.
    """

    def __init__(self, recipe: Recipe, input_schema: pa.Schema) -> None:
        self._config, self._input = recipe.config, input_schema
        self._preprocessor, self._scrubbers = recipe.preprocessor(), recipe.scrubbers()
        self._vocabulary = recipe.vocabulary
        self._runs_users = recipe.config.is_own or bool(recipe.config.scrub)
        self._raised = RAISED if self._runs_users else _EXPECTED
        self._reads_bytes = getattr(self._preprocessor, "reads_bytes", False)
        self._truncated = f"content_truncate_{recipe.config.max_tokens // 1024}k"
        language = [LANGUAGE_COLUMN] if recipe.config.language_id.enabled else []
        names = ("id", *language, self._truncated, ERROR_COLUMN)
        self._added: Mapping[str, Kind] = dict.fromkeys(names, "string")
        self.added = pieces.schema_of(input_schema, self._added)
        self._ours = self._added.keys() - {"id"}
        self.moved: dict[str, str] = {}
        self._origins = self._columns()
        self.schema = (
            None if self._origins is None else pieces.schema_of(input_schema, self._origins)
        )

    def __call__(self, piece: NamedPiece) -> PieceRows:
        name, batch = piece
        result = PieceRows(batch.rows)
        kept: dict[int, NewRow] = {}
        for index, item in enumerate(batch.items):
            new = self.row(item, record_id(item, batch.start + index, name))
            if isinstance(new, Dropped):
                result.dropped[new.rule] += 1
            else:
                kept[index] = new
                result.add(new)
        if self._origins is None:
            result.lines = [new.line() for new in kept.values()]
        else:
            rows = {index: new.row for index, new in kept.items()}
            source, share = self._input, not result.failures
            result.columns = pieces.arrays(batch, source, rows, self._origins, share=share)
        return result

    def row(self, item: Row | BadLine, identity: str) -> NewRow | Dropped:
        """What becomes of an item; with an error in it when no row can be made."""
        if isinstance(item, BadLine):
            return self._failed({}, identity, Reason.BAD_LINE, item.detail, item.raw)
        try:
            text = item.get("text")
            if isinstance(text, bytes) and not self._reads_bytes:
                text = text.decode()
            given = {**item, "text": text} if "text" in item else {**item}
            row = self._preprocessor.process_item(given)
            if row is None:
                return Dropped("process_item")
            if isinstance(row, Dropped):
                return row
            self._check(row)
            return self._finished(row, item, identity)
        except self._raised as error:
            is_plain = not self._runs_users or isinstance(error, _NotARow)
            detail = f"{type(error).__name__}: {error}" if is_plain else users_traceback(error)
            raw = clip(orjson.dumps(readable(item), default=str).decode())
            return self._failed(item, identity, Reason.PREPROCESS_ERROR, detail, raw)

    def _finished(self, given: Row, item: Row, identity: str) -> NewRow | Dropped:
        """What was `given` for the item, with what every row gets. `identity` becomes its `id`
        unless it has one."""
        config, row = self._config, {**given, ERROR_COLUMN: None}
        text: Any = given.get("text")
        removed: dict[str, int] = {}
        for scrubber in self._scrubbers if text else ():
            before = _as_str(text)
            text, counts = scrubber.scrub(before)
            for kind, count in counts.items():
                removed[kind] = removed.get(kind, 0) + count
            if counts or text != before:
                row["text"] = text
        row["id"] = as_text(row.get("id")) or identity
        if config.language_id.enabled:
            language = text_language(_as_str(text)) if text else None
            if config.language_id.keep and language not in config.language_id.keep:
                return Dropped(f"language_id: {language or 'none'}")
            row[LANGUAGE_COLUMN] = language
        row[self._truncated] = told = None
        if text:
            tokens = tokenizer(self._vocabulary)
            cut: Any = tokens.truncate_utf8 if isinstance(text, bytes) else tokens.truncate
            row[self._truncated] = cut(text, config.max_tokens)
        if text and (config.dedup.exact or config.dedup.near is not None):
            content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
            near = None if config.dedup.near is None else signature(_as_str(text))
            told = hashlib.blake2b(content, digest_size=16).digest(), near
        return self._kept(row, given, item, removed, told)

    def _kept(
        self, row: Row, given: Row, item: Row, removed: Mapping[str, int], told: Told
    ) -> NewRow:
        """With the values, under new names, that `given` or the item has under names of ours."""
        if self._origins is None:
            clashing = {name: given[name] for name in self._ours if name in given}
            return NewRow.of(row, clashing, removed, told)
        for old, new in self.moved.items():
            had = given if old in self._ours else item
            if old in had:
                row[new] = had[old]
        return NewRow.of(row, {}, removed, told)

    def _failed(self, item: Row, identity: str, reason: Reason, detail: str, raw: str) -> NewRow:
        """A row with all that the input has of it."""
        text: dict[str, Copied | Kind] = {"text": "string"} if "text" in item else {}
        origins = (text if self._origins is None else self._origins).items()
        row = {name: _as_given(item, name, origin) for name, origin in origins}
        if self._origins is None:
            row = {**item, **row}
        error = orjson.dumps({"reason": reason, "detail": detail, "raw": raw}).decode()
        ours = {**dict.fromkeys(self._ours & row.keys()), "id": identity, ERROR_COLUMN: error}
        return self._kept({**row, **ours}, item, item, {}, None)

    def _check(self, row: Any) -> None:
        """_NotARow when it is none, or not of the types that were declared."""
        if not isinstance(row, dict) or not all(isinstance(name, str) for name in row):
            raise _NotARow(f"process_item returned {type(row).__name__}; expected a dict, or None")
        for name, origin in (self._origins or {}).items() if self._runs_users else ():
            value = row.get(name)
            if value is None or isinstance(origin, Copied):
                continue
            if type(value) not in _FITS[origin]:
                raise _NotARow(f"{name}: declared as {origin}, but it is {type(value).__name__}")
            if origin == "int" and value not in INT64:
                raise _NotARow(f"{name}: {value} does not fit into 64 bits; declare it as string")

    def _columns(self) -> dict[str, Copied | Kind] | None:
        if not isinstance(self._preprocessor, Declared):
            return None
        names = self._input.names
        declared: Mapping[str, Copied | Kind] = self._preprocessor.columns(names)
        theirs: Sequence[str] = getattr(self._preprocessor, "own_columns", ())
        self.moved = {
            old: new
            for old, new in moved_names([*declared, *names], [*self._ours, *theirs]).items()
            if (old in declared if old in self._ours else old in names)
        }
        moved: dict[str, Copied | Kind] = {
            new: declared[old] if old in self._ours else Copied(old)
            for old, new in self.moved.items()
        }
        return {**declared, **moved, **self._added}


def _as_given(item: Row, name: str, origin: Copied | Kind) -> Any:
    """What a row that failed has for a column: the input's own value, as far as it fits."""
    if isinstance(origin, Copied):
        return item.get(origin.source)
    value = item.get(name)
    if value is None or type(value) in _FITS[origin]:
        return value if origin != "int" or value is None or value in INT64 else None
    if origin != "string" or isinstance(value, bytes):
        return None
    return orjson.dumps(value, default=str).decode()


def _as_str(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else text


class _NotARow(TypeError):
    """What the user's process_item returned."""
