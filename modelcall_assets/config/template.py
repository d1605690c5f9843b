"""The placeholders of a prompt text."""

from __future__ import annotations

from string import Formatter

from modelcall_assets.config.block import mistake


def placeholders_of(text: str) -> frozenset[str]:
    """The names in `{name}`; doubled braces are literal. Anything else is a mistake."""
    try:
        fields = [parts[1:] for parts in Formatter().parse(text) if parts[1] is not None]
    except ValueError as error:
        raise mistake(f"braces do not match: {error}", fix="write {{ and }} for braces") from None
    wrong = [_source(*field) for field in fields if not _is_plain(*field)]
    if wrong:
        raise mistake(
            f"not a placeholder: {', '.join(wrong)}",
            expected="{column_name} or {column.key}",
            fix="name a column, or write {{ and }} for braces",
        )
    return frozenset(name for name, _, _ in fields if name)


def _is_plain(name: str | None, spec: str | None, conversion: str | None) -> bool:
    """A column, or a path into one of objects and lists: `meta.lang`, `turns.0.text`."""
    first, *inner = (name or "").replace("-", "_").split(".")
    plain = first.isidentifier() and all(part.isidentifier() or part.isdigit() for part in inner)
    reaches = any(part.startswith("__") for part in inner)
    return not spec and not conversion and plain and not reaches


def _source(name: str | None, spec: str | None, conversion: str | None) -> str:
    """The placeholder as it was written, cut to one short line."""
    text = f"{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}"
    text = " ".join(text.split())
    return f"{{{text if len(text) <= 40 else text[:37] + '...'}}}"
