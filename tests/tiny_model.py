"""A tiny model of random weights behind llama.cpp's own server: real replies, noise for text.

    python tests/tiny_model.py FILE KEY     # prints its address, serves until its input ends

The GGUF file is written here, with a token for every byte: the packages that do it bring numpy
with them, and where that is installed `import pyarrow` takes four times as long.
"""

from __future__ import annotations

import os
import random
import sys
from array import array
from collections.abc import Iterator
from math import prod
from pathlib import Path
from struct import pack
from typing import Any

LAYERS, WIDTH, HIDDEN, HEADS = 2, 32, 64, 4
CONTEXT = 1024
"""Tokens of one request, its answer included."""
SPECIAL = ("<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
ALIGNMENT = 32
UINT32, INT32, FLOAT32, STRING, ARRAY = 4, 5, 6, 8, 9
"""Types of a GGUF file."""


def write_model(path: Path) -> None:
    """A llama that begins untrained, the same one every time."""
    dice = random.Random(1)
    tensors = list(_tensors())
    places, at = [], 0
    for name, shape in tensors:
        size = 4 * prod(shape)
        head = _string(name) + pack("<I", len(shape)) + b"".join(pack("<Q", n) for n in shape)
        places.append(head + pack("<IQ", 0, at))
        at += size + -size % ALIGNMENT
    fields = [_string(name) + _value(value) for name, value in _fields().items()]
    counts = pack("<IQQ", 3, len(tensors), len(fields))
    head = b"".join([b"GGUF", counts, *fields, *places])
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % ALIGNMENT))
        for _, shape in tensors:
            is_norm = len(shape) == 1
            numbers = (1.0 if is_norm else dice.gauss(0, 0.05) for _ in range(prod(shape)))
            data = array("f", numbers).tobytes()
            file.write(data + bytes(-len(data) % ALIGNMENT))


def _tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    words = 256 + len(SPECIAL)
    yield "token_embd.weight", (WIDTH, words)
    yield "output_norm.weight", (WIDTH,)
    yield "output.weight", (WIDTH, words)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield f"blk.{layer}.{name}.weight", (WIDTH, WIDTH)
        for name in ("ffn_gate", "ffn_up"):
            yield f"blk.{layer}.{name}.weight", (WIDTH, HIDDEN)
        yield f"blk.{layer}.ffn_down.weight", (HIDDEN, WIDTH)
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", (WIDTH,)


def _fields() -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "llama.context_length": CONTEXT,
        "llama.embedding_length": WIDTH,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": HIDDEN,
        "llama.attention.head_count": HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*_letters(), *SPECIAL],
        "tokenizer.ggml.token_type": [1] * 256 + [3] * len(SPECIAL),  # normal, control
        "tokenizer.ggml.merges": ["t h"],  # it must have some; "th" is no token, so it has no use
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.chat_template": TEMPLATE,
    }


def _letters() -> Iterator[str]:
    """How GPT-2 writes each byte: a printable one as itself, the others from U+0100 on."""
    odd = iter(range(256, 512))
    for byte in range(256):
        is_printed = 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174
        yield chr(byte if is_printed else next(odd))


def _value(value: Any) -> bytes:
    if isinstance(value, list):
        kind = STRING if isinstance(value[0], str) else INT32
        items = (_string(item) if kind == STRING else pack("<i", item) for item in value)
        return pack("<IIQ", ARRAY, kind, len(value)) + b"".join(items)
    if isinstance(value, str):
        return pack("<I", STRING) + _string(value)
    return pack("<If", FLOAT32, value) if isinstance(value, float) else pack("<II", UINT32, value)


def _string(text: str) -> bytes:
    raw = text.encode()
    return pack("<Q", len(raw)) + raw


def serve(path: Path, key: str) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.api_keys = [key]
    params.n_ctx, params.n_parallel = 4 * CONTEXT, 4
    params.cpuparams.n_threads = 1
    params.warmup = False
    server = xllamacpp.Server(params)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)  # whatever is still being asked


if __name__ == "__main__":
    file, own_key = sys.argv[1:]
    write_model(Path(file))
    serve(Path(file), own_key)
