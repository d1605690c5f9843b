"""What a secret is, how a file refers to one, and what others send without those of a run."""

import html
import json
import re
from base64 import b64decode, b64encode
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, cast
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

NO_KEY = ("EMPTY", "none", "not-needed")
"""Words for a key that a server does not ask for."""
REFERENCE = re.compile(r"\$\{([^}]*)\}")
"""`${NAME}` or `${NAME:-default}`."""
SHORTEST = 4
"""Secrets with fewer characters are left alone everywhere."""
_NAME = re.compile(
    r"(api|access|account|auth|private|shared|signing)[-_]?key|secret|passw|passphrase|credential"
    r"|auth(?!or(?!i[sz]))|cookie|connection_string"
    r"|(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)(?<!stop_)token$",
    re.I,
)
_ANY_NAME = re.compile(rf"{_NAME.pattern}|key$|(?<![a-z])key(?![a-z])|token(?!s|i[sz])", re.I)
_PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s]*[^/\s:@]@")
_KEY_IN_QUERY = re.compile(r"[?&][\w-]*(key|token|sig|secret|passw\w*)=[^&\s]", re.I)
_VALUE = re.compile(
    r"\bsk-\w[\w-]{5}|\b(rk|pk|ak|pat|key)-([a-z]+-)*\w{16}|\b(sk|rk|pk|ak|pat|key)[-_](?=[\w-]*\d)[\w-]{6}"
    r"|\b(hf|gsk|r8|npm|tgp_v1|gh[a-z]|github_pat)_[a-z0-9]{10}"
    r"|\b(glpat|nvapi|xai|pplx|xox[a-z])-\w{10}|\bA(KIA|SIA|KLT|KID|Iza)[\w-]{12}|\bLTAI\w{12}"
    r"|\beyJ[\w-]{8,}\.eyJ|\bbearer +[\w.~+/-]{8}|\bbasic +[a-z0-9+/]{8}"
    rf"|-----BEGIN [A-Z ]*PRIVATE KEY|{_KEY_IN_QUERY.pattern}"
    r"|://[^/\n]*[^/\n:@]@|://[^/\s:]*:\S*[^\s:]@",
    re.I,
)
_RANDOM = re.compile(
    r"(?=[a-z]*\d)(?=\d*[a-z])[a-z\d]{20}|[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}", re.I
)


def is_reference(text: str, defaults: Collection[str] = ("",)) -> bool:
    """Whether the text is `${NAME}`, or that with one of these defaults, and nothing else."""
    found = REFERENCE.fullmatch(text)
    name, has_default, default = found[1].partition(":-") if found else ("", "", "")
    return name.isascii() and name.isidentifier() and (not has_default or default in defaults)


def names_secret(name: str, *, of_anyone: bool = False) -> bool:
    """Whether a field so called holds a secret; `of_anyone`, as a header, by any word for a key."""
    return (_ANY_NAME if of_anyone else _NAME).search(name) is not None


def is_secret_header(name: str, written: str, value: str) -> bool:
    """Whether a header holds a secret: by its name, that of a variable that it is `written` with,
    or the shape of its value, which may be random characters."""
    names = (name, *(variable.partition(":-")[0] for variable in REFERENCE.findall(written)))
    by_name = any(names_secret(each, of_anyone=True) for each in names)
    return by_name or looks_secret(value) or _RANDOM.search(value) is not None


def looks_secret(text: str) -> bool:
    """Whether a literal text has the shape of a key, or a password in a URL."""
    return _VALUE.search(REFERENCE.sub("", text)) is not None


def has_password(url: str) -> bool:
    """Whether a literal URL holds a password or a key."""
    bare = REFERENCE.sub("", url)
    return _PASSWORD.search(bare) is not None or _KEY_IN_QUERY.search(bare) is not None


def without_users(text: str) -> str:
    """The text with the URLs in it as everyone may see them."""
    return re.sub(r"://[^/@\s]*@", "://", text)


def in_url(url: str) -> Iterator[str]:
    """The user's password, or what stands alone in its place, and the keys among the query."""
    parts = urlsplit(url)
    user = parts.netloc.rpartition("@")[0]
    name, has_password, password = user.partition(":")
    yield unquote(password if has_password else name)
    for field, value in parse_qsl(parts.query):
        if names_secret(field, of_anyone=True):
            yield value


def in_header(value: str) -> Iterator[str]:
    """The value, its words but the scheme, and the password that Basic encodes."""
    scheme, *rest = re.split(r"[\s,;=]+", value)
    has_scheme = bool(rest) and scheme.isalpha() and value.startswith(f"{scheme} ")
    yield from (value.partition(" ")[2] if has_scheme else value, *rest)
    if not has_scheme:
        yield scheme
    if scheme.lower() == "basic" and rest:
        try:
            user = b64decode(f"{rest[0]}==").decode()
        except ValueError:
            return
        yield from (user, user.partition(":")[2])


def leaves(value: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What options hold, however deep; a list's items have the names of the list."""
    if isinstance(value, Mapping):
        for name, inner in cast("Mapping[str, Any]", value).items():
            yield from leaves(inner, (*names, str(name)))
    elif isinstance(value, list | tuple):
        for inner in cast("list[Any]", value):
            yield from leaves(inner, names)
    else:
        yield names, value


def in_options(options: Mapping[str, Any]) -> Iterator[str]:
    """Those of a driver's options, by their names and shapes."""
    for names, value in leaves(options):
        if isinstance(value, str):
            if "://" in value:
                yield from in_url(value)
            elif names_secret(names[-1], of_anyone=True) or looks_secret(value):
                yield value


def is_unusual(secret: str) -> bool:
    """Whether an answer can hold it only as an echo: 12 characters or more, or 6 with letters and
    digits. A shorter one may be a word of the data."""
    mixed = re.search(r"\d", secret) and re.search(r"[^\W\d]", secret)
    return len(secret) >= 12 or (len(secret) >= 6 and mixed is not None)


class Remover:
    """Takes secrets out of what others sent: plain or in base64, each character perhaps escaped as
    in JSON, a URL or HTML. Costs next to nothing where there is none."""

    def __init__(self, secrets: Iterable[str]) -> None:
        found = {each for each in secrets if len(each) >= SHORTEST and each not in NO_KEY}
        self.has_any = bool(found)
        longest_first = sorted(found, key=lambda each: (-len(each), each))
        usual = [form for each in longest_first for form in _usual_escapes(each)]
        self._forms = [form for each in longest_first for form in (each, *_in_base64(each))]
        encoded = [form.encode("utf-8", "surrogatepass") for form in self._forms]
        self._sought = list(dict.fromkeys((*encoded, *map(str.encode, usual))))
        self._bare = [form.replace(b"\\", b"") for form in encoded]
        signs = _SIGNS if "".join(found).isascii() else (*_SIGNS, rb"\\u")
        self._signs = [re.compile(sign).search for sign in signs] if found else []

    def __call__(self, data: bytes) -> bytes:
        for form in self._sought:
            if form in data:
                data = data.replace(form, _REMOVED)
        if not any(sign(data) for sign in self._signs):
            return data
        bare = _ESCAPED.sub(_character, data).replace(b"\\", b"")
        if not any(form in bare for form in self._bare):
            return data
        if len(data) <= _LONGEST:
            return self._pattern.sub(_REMOVED, data)
        for form in self._bare:
            bare = bare.replace(form, _REMOVED)
        return bare

    def text(self, text: str) -> str:
        data = text.encode("utf-8", "surrogatepass")
        cleaned = self(data)
        return text if cleaned is data else cleaned.decode("utf-8", "replace")

    @cached_property
    def _pattern(self) -> re.Pattern[bytes]:
        return re.compile("|".join(map(_any_way, self._forms)).encode("utf-8", "surrogatepass"))


_REMOVED = b"***"
_LONGEST = 1 << 20
"""The pattern takes about a second for so many bytes; what is longer becomes plain text."""
_SIGNS = (rb"\\(?:\\{0,15}(?:u00|x)[2-7c-fC-F]|/)", rb"%[2-7c-fC-F]", rb"&(?:amp;){0,3}#", rb"\0")
"""Of a text in which something stands escaped that need not be."""
_ESCAPED = re.compile(
    rb"(?:\\{1,16}u[0-9a-fA-F]{4})+|\\{1,16}x[0-9a-fA-F]{2}|\0+"
    rb"|%(?:25){0,3}[0-9a-fA-F]{2}"
    rb"|&(?:amp;){0,3}(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|lt|gt|quot|apos|amp);"
)
_HTML = {"&": "amp", "<": "lt", ">": "gt", '"': "quot", "'": "apos"}


def _character(escaped: re.Match[bytes]) -> bytes:
    """The character that was escaped, in any of the ways that `_any_way` knows."""
    text = escaped[0]
    if text[:1] == b"%":
        return bytes.fromhex(text[-2:].decode())
    if text[:1] == b"&":
        name = text[:-1].rpartition(b";")[2].removeprefix(b"&")
        return html.unescape(f"&{name.decode()};").encode("utf-8", "surrogatepass")
    if units := re.findall(rb"u(....)", text):
        wide = bytes.fromhex(b"".join(units).decode())
        return wide.decode("utf-16-be", "replace").encode("utf-8", "replace")
    return bytes.fromhex(text[-2:].decode()) if b"x" in text else b""


def _usual_escapes(secret: str) -> Iterator[str]:
    """The secret with only those characters escaped that must be."""
    yield from (inner := json.dumps(secret)[1:-1], json.dumps(inner)[1:-1])
    yield from (quote(secret), quote(secret, safe=""), quote_plus(secret))
    yield from (html.escape(secret), html.escape(html.escape(secret)))


def _in_base64(secret: str) -> dict[str, None]:
    """The part of its base64 that does not depend on what stands around it, in both alphabets."""
    data = secret.encode("utf-8", "surrogatepass")
    forms = dict[str, None]()
    for before in range(3):
        first, last = -(-before * 8 // 6), (before + len(data)) * 8 // 6
        form = b64encode(b"\0" * before + data).decode()[first:last]
        forms |= {form: None, form.translate({ord("+"): "-", ord("/"): "_"}): None}
    return forms


def _any_way(text: str) -> str:
    """A pattern of the text with any of its characters escaped, and with zeros between them."""
    return r"\0{0,3}".join(f"(?:{'|'.join(_ways(each))})" for each in text)


def _ways(character: str) -> Iterator[str]:
    """A character in JSON and Python, a URL (once or more) and HTML."""
    yield rf"\\{{0,16}}{re.escape(character)}"
    units = character.encode("utf-16-be", "surrogatepass").hex()
    yield "".join(rf"\\{{1,16}}u(?i:{units[at : at + 4]})" for at in range(0, len(units), 4))
    data = character.encode("utf-8", "surrogatepass")
    yield r"\\{0,16}" + "".join(f"%(?:25){{0,3}}(?i:{byte:02x})" for byte in data)
    yield "".join(rf"\\{{1,16}}x(?i:{byte:02x})" for byte in data)
    number = f"0{{0,5}}{ord(character)}|[xX]0{{0,5}}(?i:{ord(character):x})"
    name = f"|{_HTML[character]}" if character in _HTML else ""
    yield rf"\\{{0,16}}&(?:amp;){{0,3}}(?:#(?:{number}){name});"
    if character == " ":
        yield r"\+"
