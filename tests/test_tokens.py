"""transforms/texts: counts and budgets of the encodings and of a Hugging Face tokenizer.json."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelcall_assets.transforms.texts import (
    DEFAULT_ENCODING,
    ENCODINGS,
    BpeTokenizer,
    Tokenizer,
    ToolError,
    count_tokens,
    tokenizer,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from bpe_openai._bindings import tokenizer_for_encoding

CODE = "def area(r):\n    # it's πr²\n\n    return 3.14159 * r ** 2  # w.r.t. 'r'\r\n\t"
CHINESE = "人工智能是研究开发用于模拟、延伸和扩展人的智能的一门新的技术科学，它“包括”很多方面。"
BASE64 = "TWFuIGlzIGRpc3Rpbmd1aXNoZWQsIG5vdCBvbmx5IGJ5IGhpcyByZWFzb24sIGJ1dCBieSB0aGlz+/=="
PIECES = [
    *CODE.splitlines(keepends=True),
    *CHINESE.split("、"),
    "the quick ",
    "龘靐",
    "🎉👨‍👩‍👧",
    "<|endoftext|>",
    "<s>",
    "   ",
    " ",
    "\n",
    "\n\n//",
    "!\r\n",
    "\u3000",
    "\u00a0",
    "e\u0301",
    "\u0301",
    "a" * 30,
    "1234567",
    "１２",
    "DON'T",
    "'",
    "한국어",
    "ひらがなカタカナー",
    "ไทยภาษา",
    "हिन्दी",
    BASE64,
]
RUNS = [
    "word ",
    "a",
    " ",
    " \n",
    "=",
    "7",
    "人工智能",
    "龘",
    "🎉",
    "👨‍👩‍👧",
    "ไทย",
    "कि",
    BASE64[:60],
]


def mixture(seed: int, size: int) -> str:
    """Made from a seed, because hypothesis is slow at long lists."""
    return "".join(Random(seed).choices(PIECES, k=size))


short_texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=40).map("".join)
long_texts = st.builds(mixture, st.integers(0, 2**32), st.integers(300, 1200))
runs = st.builds(
    lambda before, unit, size, after: before + unit * (size // len(unit)) + after,
    st.sampled_from(["", "x\n"]),
    st.sampled_from(RUNS),
    st.integers(4000, 8000),
    st.sampled_from(["", " end"]),
)
texts = short_texts | long_texts | runs
shares = st.floats(0, 0.5)


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level BPE that would, left alone, add, cut, pad, drop out and take `<s>` for one."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([CODE, CHINESE, CHINESE, BASE64, "the quick brown fox "], trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    made.enable_truncation(8)
    made.enable_padding(length=8)
    made.model.dropout = 0.5
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return str(path)


@pytest.fixture(scope="session", params=[*ENCODINGS, "tokenizer.json"])
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "tokenizer.json":
        return request.getfixturevalue("tokenizer_json")
    return request.param


@pytest.fixture(scope="session")
def any_tokenizer(name: str) -> Tokenizer:
    return tokenizer(name)


def whole_tokens(name: str, text: str, size: int) -> Iterator[str]:
    """The text of the first `size` tokens of the whole text, of one token less, and so on; not
    where that splits a character."""
    if name.endswith(".json"):
        offsets = _offsets(name, text)
        for last in range(size - 1, -1, -1):
            if offsets[last][1] <= offsets[last + 1][0]:
                yield text[: offsets[last][1]]
    else:
        bpe = tokenizer_for_encoding(name)
        tokens = bpe.encode(text)
        for number in range(size, 0, -1):
            with suppress(ValueError):
                yield bpe.decode(tokens[:number])
    yield ""


def _offsets(name: str, text: str) -> list[tuple[int, int]]:
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(name)
    plain.encode_special_tokens = True
    plain.no_truncation()
    plain.no_padding()
    plain.model.dropout = None
    return plain.encode(text, add_special_tokens=False).offsets


class TestLaws:
    @given(texts, st.integers(0, 60))
    def test_a_prefix_within_the_budget(
        self, any_tokenizer: Tokenizer, text: str, budget: int
    ) -> None:
        cut = any_tokenizer.truncate(text, budget)
        assert text.startswith(cut)
        assert any_tokenizer.count(cut) <= budget
        assert any_tokenizer.truncate(cut, budget) == cut
        if cut != text:
            assert any_tokenizer.count(text) > budget

    @settings(max_examples=40)
    @given(long_texts | runs, st.integers(-3, 3))
    def test_a_text_is_cut_exactly_where_the_budget_ends(
        self, any_tokenizer: Tokenizer, text: str, more: int
    ) -> None:
        budget = any_tokenizer.count(text) + more
        cut = any_tokenizer.truncate(text, budget)
        assert (cut == text) == (more >= 0)
        assert budget - 7 <= any_tokenizer.count(cut) <= budget
        assert any_tokenizer.truncate(cut, budget) == cut

    @settings(max_examples=60)
    @given(texts, shares)
    def test_the_longest_run_of_whole_tokens(
        self, name: str, any_tokenizer: Tokenizer, text: str, share: float
    ) -> None:
        budget = int(any_tokenizer.count(text) * share)
        longest = next(
            prefix
            for prefix in whole_tokens(name, text, budget)
            if any_tokenizer.count(prefix) <= budget
        )
        assert any_tokenizer.truncate(text, budget) == longest

    @given(texts, st.integers(0, 3000))
    def test_utf8_is_cut_like_its_text(
        self, any_tokenizer: Tokenizer, text: str, budget: int
    ) -> None:
        cut = any_tokenizer.truncate(text, budget)
        assert any_tokenizer.truncate_utf8(text.encode(), budget) == cut

    @settings(max_examples=40)
    @given(st.sampled_from(["", "b", "bc"]), st.sampled_from(RUNS), st.integers(1, 1500))
    @example(start="", unit=" ", budget=600)  # what is decoded first is within the budget
    def test_utf8_that_is_not_decoded_whole(
        self, any_tokenizer: Tokenizer, start: str, unit: str, budget: int
    ) -> None:
        text = start + unit * (100_000 // len(unit))
        cut = any_tokenizer.truncate(text, budget)
        assert any_tokenizer.truncate_utf8(text.encode(), budget) == cut

    def test_special_tokens_are_plain_text(self, any_tokenizer: Tokenizer) -> None:
        assert any_tokenizer.count("<|endoftext|>") > 1
        assert any_tokenizer.count("<s>") > 1
        assert any_tokenizer.truncate("<|endoftext|>" * 5, 3) != ""

    def test_no_budget_no_text(self, any_tokenizer: Tokenizer) -> None:
        for budget in (0, -1):
            assert any_tokenizer.truncate("a", budget) == ""
            assert any_tokenizer.truncate_utf8(b"a" * 50_000, budget) == ""
        assert any_tokenizer.truncate("", 5) == any_tokenizer.truncate_utf8(b"", 5) == ""
        assert any_tokenizer.count(any_tokenizer.truncate("🎉👨‍👩‍👧", 1)) <= 1


class TestEncodings:
    @pytest.mark.parametrize("encoding", ENCODINGS)
    @given(long_texts | runs, st.integers(1, 2000), st.integers(1, 5000))
    def test_the_size_of_chunks_changes_nothing(
        self, encoding: str, text: str, budget: int, chunk: int
    ) -> None:
        chunked = BpeTokenizer(encoding, chunk)
        assert chunked.truncate(text, budget) == tokenizer(encoding).truncate(text, budget)

    @pytest.mark.parametrize("unit", ["word ", "人工智能", "🎉", "a", " "])
    def test_cut_texts_of_megabytes(self, unit: str) -> None:
        text = unit * (2_000_000 // len(unit))
        assert count_tokens(text) > 10_000
        assert count_tokens(tokenizer().truncate(text, 5000)) in range(4997, 5001)

    def test_no_more_is_decoded_than_it_takes(self) -> None:
        data = b"word " * 100_000 + b"\xff"
        assert tokenizer().truncate_utf8(data, 10) == "word " * 9 + "word"
        with pytest.raises(UnicodeDecodeError):
            tokenizer().truncate_utf8(data, 200_000)

    def test_count_what_is_known(self) -> None:
        assert [count_tokens("人工智能", encoding) for encoding in ENCODINGS] == [2, 5]
        assert count_tokens("hello world") == 2

    def test_a_cut_that_changes_the_tokens_before_it(self) -> None:
        """`so| I'|D`, but `so| I|'`."""
        assert [count_tokens(text) for text in ("so I'D", "so I'", "so")] == [3, 3, 1]
        assert tokenizer().truncate("so I'D", 2) == "so"

    def test_are_made_once(self) -> None:
        assert tokenizer() is tokenizer()
        assert tokenizer(DEFAULT_ENCODING) is not tokenizer("cl100k_base")


class TestHuggingFace:
    def test_what_else_the_file_asks_for(self, tokenizer_json: str) -> None:
        """No token of a template or of padding, no length of its own, no chance."""
        read = tokenizer(tokenizer_json)
        assert read.count("") == 0
        assert len({read.count(CHINESE * 10) for _ in range(5)}) == 1
        assert read.count(CHINESE * 10) == 10 * read.count(CHINESE) > 8

    def test_offsets_without_the_space_before_a_word(self, tmp_path: Path) -> None:
        tokenizers = pytest.importorskip("tokenizers")
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        made.save(str(tmp_path / "words.json"))
        words = tokenizer(str(tmp_path / "words.json"))
        assert words.truncate("  a  bc d ", 2) == "  a  bc"
        assert words.truncate("  a  bc d ", 3) == "  a  bc d "
        assert words.truncate(" " * 100_000, 3) == " " * 100_000
        indented = " " * 50_000 + "a b"
        assert words.truncate(indented, 1) == " " * 50_000 + "a"
        assert words.truncate_utf8(indented.encode(), 1) == " " * 50_000 + "a"

    @pytest.mark.parametrize("content", [None, "", "{}", '{"model": 1}'])
    def test_a_file_that_is_none(self, tmp_path: Path, content: str | None) -> None:
        pytest.importorskip("tokenizers")
        path = tmp_path / "tokenizer.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ToolError, match=r"tokenizer\.json: cannot be read"):
            tokenizer(str(path))

    def test_without_the_package_say_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(ToolError, match=r"pip install 'modelcall-assets\[tokenizers\]'"):
            tokenizer("somewhere/tokenizer.json")


def test_an_unknown_tokenizer_says_which_there_are() -> None:
    for name in ("gpt2", "", "voyage3_base"):
        with pytest.raises(ToolError, match=r"expected o200k_base, cl100k_base or a path"):
            tokenizer(name)
