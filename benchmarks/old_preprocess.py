"""The old system's way through a file: pandas row by row, tiktoken where a text is long.

PYTHON -I benchmarks/old_preprocess.py INPUT OUTPUT MAX_TOKENS     # what it took is printed

It stands by itself: its Python has pandas, pyarrow, tiktoken and bpe-openai, and nothing of ours.
It is spared the old system's batches and progress files.
"""

from __future__ import annotations

import base64
import gzip
import json
import sys
import time
import uuid
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
import tiktoken

LONG_CHARS = 20_000
"""Shorter texts were left as they are, however many tokens they have."""
WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How o200k_base splits a text."""


def o200k_base() -> tiktoken.Encoding:
    """Its vocabulary comes from the package bpe_openai: tiktoken's own must be downloaded."""
    packed = resources.files("bpe_openai") / "data" / "o200k_base.tiktoken.gz"
    lines = [line.split() for line in gzip.decompress(packed.read_bytes()).splitlines()]
    return tiktoken.Encoding(
        "o200k_base",
        pat_str=WORDS,
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in lines},
        special_tokens={"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    )


def preprocess(source: Path, output: Path, max_tokens: int, encoding: tiktoken.Encoding) -> int:
    with source.open(encoding="utf-8") as lines:
        frame = pd.DataFrame([json.loads(line) for line in lines])
    made: list[dict[str, Any]] = []
    for _, row in frame.iterrows():
        item = row.to_dict()
        item.setdefault("text", item.get("content"))
        item.setdefault("id", str(uuid.uuid4()))
        item.setdefault("source", "github_raw_code")
        item["content_truncate_32k"] = truncated(item["text"], max_tokens, encoding)
        made.append(item)
    pd.DataFrame(made).to_parquet(output, index=False)
    return len(made)


def truncated(text: str, max_tokens: int, encoding: tiktoken.Encoding) -> str:
    if len(text) <= LONG_CHARS:
        return text
    tokens = encoding.encode(text, disallowed_special=())
    return text if len(tokens) <= max_tokens else encoding.decode(tokens[:max_tokens])


def main(source: str, output: str, max_tokens: str) -> None:
    encoding = o200k_base()
    began, cpu = time.monotonic(), time.process_time()
    rows = preprocess(Path(source), Path(output), int(max_tokens), encoding)
    took = {"rows": rows, "wall_s": time.monotonic() - began, "cpu_s": time.process_time() - cpu}
    status = Path("/proc/self/status").read_text()
    took["rss_mb"] = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    took["name"] = f"pandas {pd.__version__} and tiktoken {tiktoken.__version__}"
    sys.stdout.write(json.dumps(took))


if __name__ == "__main__":
    main(*sys.argv[1:])
