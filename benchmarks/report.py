"""Results as Markdown tables and one plot; `write` puts them between the marks of the page."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NAMES = {
    "engine": "this engine: JSONL → journal → Parquet",
    "asset": "the same as an asset: `modelcall run-task`",
    "minimal_aiohttp": "minimal aiohttp loop",
    "sdk_aiohttp": "AsyncOpenAI + DefaultAioHttpClient",
    "sdk": "AsyncOpenAI",
}
CONVERSIONS = {
    "bare": "only parse and write: orjson.loads, orjson.dumps",
    "chatml": "`chatml`, messages only",
    "chatml_raw_data": "`chatml` with `raw_data`",
    "chatml_system": "`chatml` with `raw_data` and a system prompt",
    "merged": "`merged`",
    "merged_source": "`merged` with a source column",
    "merged_dedup": "`merged` with `dedup`",
}
STORAGE = {
    "bare": "only parse and write: orjson.loads, orjson.dumps",
    "raw": "`raw`: digest, schema, ids, mistakes",
    "preprocessed": "`raw` and `preprocessed`: to Parquet",
    "cleaned": "the same, text cleaned, filtered and measured",
}
PREPROCESS = {
    "tokenizer": "the tokenizer: `bpe_openai`'s `encode`, every text",
    "truncate": "`truncate`, every text",
    "stage": "`preprocessed`, JSON lines to Parquet: 1 process",
    "stage_shared": "the same, {processes} processes",
    "old": "as the old system: {name}, {mb:,.0f} MB",
}
NOT_INSTALLED = "as the old system: pandas and tiktoken"
_MARKS = "<!-- begin {0} -->\n{1}<!-- end {0} -->"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def compare_table(results: list[Any]) -> str:
    return "\n".join(_one_scenario(scenario) for scenario in results)


def _one_scenario(scenario: dict[str, Any]) -> str:
    head = [
        f"{scenario['in_flight']} in flight × {scenario['latency_ms']} ms",
        "rows", "CPU s per 1k", "of the engine's", "wall s per 1k", "call phase, of ideal",
        "start s", "peak MB", "most in flight",
    ]  # fmt: skip
    rows = [
        [
            NAMES[name],
            f"{c['rows']:,}",
            f"{c['cpu_s_per_1k']:.3f}",
            f"{c['cpu_of_engine']:.2g}×",
            f"{c['wall_s_per_1k']:.2f}",
            f"{c['efficiency']:.0%}",
            f"{c['before_s']:.1f}",
            f"{c['rss_mb']:.0f}",
            f"{c['max_in_flight']:,}",
        ]
        for name, c in scenario["clients"].items()
    ]
    return table(head, rows)


def dagster_table(results: list[Any]) -> str:
    head = ["", "before the first request", "call phase, of ideal", "after the last answer"]
    names = {"engine": "engine alone", "asset": "in Dagster"}
    rows = [
        [
            f"{what}, {c['rows']:,} rows, {scenario['in_flight']} × {scenario['latency_ms']} ms",
            f"{c['before_s']:.2f} s, {c['before_cpu_s']:.2f} CPU-s",
            f"{c['efficiency']:.0%}",
            f"{c['after_s']:.2f} s, {c['after_cpu_s']:.2f} CPU-s",
        ]
        for scenario in results
        for name, what in names.items()
        for c in [scenario["clients"][name]]
    ]
    return table(head, rows)


def capacity_table(results: list[Any]) -> str:
    head = ["the stub, asked by bare sockets", "answers per s", "its CPU µs per answer"]
    rows = [
        [
            f"{r['in_flight']} connections, {r['latency_ms']} ms"
            + (", rating every text" if r["rates"] else ""),
            f"{r['per_s']:,.0f}",
            f"{r['cpu_us']:.0f}",
        ]
        for r in results
    ]
    return table(head, rows)


def memory_table(results: dict[str, Any]) -> str:
    """The last step says what a further row costs: before it, buffers of a fixed size fill up."""
    sizes = [int(n) for n in results]
    rows: list[list[str]] = []
    for what, key in (("process (RSS)", "rss_mb"), ("Python's objects", "traced_mb")):
        peaks = [seen[key] for seen in results.values()]
        further = (peaks[-1] - peaks[-2]) * 2**20 / (sizes[-1] - sizes[-2])
        rows.append([what, *(f"{peak:.0f} MB" for peak in peaks), f"{further:,.0f} bytes"])
    head = ["peak", *(f"{size:,} rows" for size in sizes)]
    return table([*head, f"per row from {sizes[-2]:,} to {sizes[-1]:,}"], rows)


def robustness_table(results: dict[str, Any]) -> str:
    busy, refused, killed = results["busy"], results["refused"], results["killed"]
    rows = [
        [
            "5 % 429 with `Retry-After`, 5 % 500",
            f"{busy['rows']}; {busy['requests']:,} requests, "
            f"{busy['statuses'].get('429', 0)} × 429, {busy['statuses'].get('500', 0)} × 500, "
            f"{busy['early_retries']} came back too early, {busy['repeated_ok']} paid again",
        ],
        [
            "1 % of the records always 400",
            f"{refused['rows']}; {refused['retried_bad_request']} asked "
            f"again; {refused['wall_s']:.2f} s, without them {refused['wall_s_without']:.2f} s",
        ],
        [
            f"kill -9, {killed['kills']} times",
            f"{killed['rows']}; {killed['more_per_kill']:.0f} requests more per kill, of "
            f"{killed['in_flight']} in flight",
        ],
        *(
            [f"two processes, 64 in flight (1,280/s) allowed; one {ending}", _shared(seen)]
            for ending, seen in results["shared"].items()
        ),
    ]
    return table(["", "what happened"], rows).replace("---:", "---")


def _shared(seen: dict[str, Any]) -> str:
    side_by_side = " and ".join(f"{rate:,.0f}" for rate in seen["per_s_side_by_side"])
    soon = "?" if seen["alone_after_s"] is None else f"{seen['alone_after_s']:.1f}"
    return (
        f"at most {seen['max_in_flight']} in flight, {seen['told_to_wait']} × 429; {side_by_side} "
        f"rows/s side by side, then {seen['per_s_alone']:,.0f} for the one left, {soon} s later"
    )


def conversion_table(results: dict[str, Any]) -> str:
    head = [
        f"{results['rows']:,} conversations",
        "records per CPU s",
        "of the bare loop's",
        *(f"peak MB, {mb:,g} MB of input" for mb in results["mb"]),
    ]
    rows = [
        [
            CONVERSIONS[name],
            f"{p['per_cpu_s']:,.0f}",
            f"{p['of_bare']:.2f}×",
            *(f"{peak:.0f}" for peak in p["rss_mb"]),
        ]
        for name, p in results["programs"].items()
    ]
    return table(head, rows)


def storage_table(results: dict[str, Any]) -> str:
    head = [
        f"{results['rows']:,} rows in 16 files",
        "rows per CPU s",
        "MB per CPU s",
        "of the bare loop's",
        *(f"peak MB, {mb:,g} MB of input" for mb in results["mb"]),
    ]
    rows = [
        [
            STORAGE[name],
            f"{p['rows_per_s']:,.0f}",
            f"{p['mb_per_s']:,.0f}",
            f"{p['of_bare']:.2f}×",
            *(f"{peak:.0f}" for peak in p["rss_mb"]),
        ]
        for name, p in results["programs"].items()
    ]
    return table(head, rows)


def preprocess_table(results: dict[str, Any]) -> str:
    """A table for each corpus."""
    return "\n".join(_one_corpus(results, kind) for kind in results["corpora"])


def _one_corpus(results: dict[str, Any], kind: str) -> str:
    corpus = results["corpora"][kind]
    head = [
        f"{results['mb']:,g} MB of {kind}, {corpus['rows']:,} records",
        "MB per CPU s",
        "of the tokenizer's",
        "MB per s",
        "of 1 process's",
        "peak MB",
        "of its largest child",
    ]
    rows = [
        [
            PREPROCESS[name].format(processes=results["processes"], **p),
            f"{p['mb_per_cpu_s']:.1f}",
            f"{p['of_tokenizer']:.2f}×",
            f"{p['mb_per_s']:.1f}",
            f"{p['of_one_process']:.2f}×" if p["of_one_process"] else "",
            f"{p['rss_mb']:.0f}",
            f"{p['child_mb']:.0f}" if p["child_mb"] else "",
        ]
        if p
        else [NOT_INSTALLED, "not installed", *[""] * 5]
        for name, p in corpus["programs"].items()
    ]
    return table(head, rows)


def listing_table(results: dict[str, Any]) -> str:
    rows = [
        [f"{int(size):,}", f"{took['wall_s']:.1f} s", f"{took['cpu_s']:.1f} s"]
        for size, took in results["listings"].items()
    ]
    return table(["objects listed", "wall", "CPU"], rows)


def files_table(results: dict[str, Any]) -> str:
    """A column for each checkout."""
    first = next(iter(results.values()))
    many, few, judged = (first[part] for part in ("many", "failures", "judged"))
    sizes = f"{many['files']:,} files × {many['rows']:,} rows"

    def row(part: str, what: str, told: Callable[[dict[str, Any]], str]) -> list[str]:
        return [what, *(told(found[part]) if part in found else "" for found in results.values())]

    rows = [
        row("many", f"{sizes}: first request", lambda f: f"{f['first_s']:.1f} s"),
        row("many", "its last reply", lambda f: f"{f['last_s']:.1f} s"),
        row("many", "all of it in Dagster", lambda f: f"{f['end_s']:.1f} s"),
        row("many", "CPU", lambda f: f"{f['cpu_s']:.1f} s"),
        row("many", "most in flight", lambda f: f"{f['max_in_flight']:,}"),
        row("many", "the same again: nothing to do", lambda f: f"{f['nothing_to_do_s']:.1f} s"),
        row("killed", "killed twice, and gone on with", _kills),
        row(
            "failures",
            f"`retry`, {few['files']:,} files with 2 failed rows",
            lambda f: f"{f['wall_s']:.1f} s, {f['most']:,} in flight",
        ),
        row(
            "judged",
            f"{judged['rows']:,} answers in {judged['files']:,} files, then judged",
            lambda f: f"{f['both_s'] / f['alone_s']:.2f}× the answers alone",
        ),
        row(
            "started",
            "a start, before the first request",
            lambda f: f"{f['again_s']:.2f} CPU-s",
        ),
        row("started", "in a new project", lambda f: f"{f['new_s']:.2f} CPU-s"),
        row("started", "of which `import dagster`", lambda f: f"{f['dagster_s']:.2f} CPU-s"),
    ]
    return table(["", *results], rows)


def large_table(results: dict[str, Any]) -> str:
    rows = [
        [name, f"{u['wall_s']:.1f} s", f"{u['cpu_s']:.1f} s", f"{u['rss_mb']:,.0f} MB"]
        for name, u in results["commands"].items()
    ]
    return table([f"{results['files']:,} files of one task", "wall", "CPU", "peak"], rows)


def _kills(found: dict[str, Any]) -> str:
    each = (
        ", ".join(f"{n:,} {s.lower()}" for s, n in stage.items()) for stage in found["statuses"]
    )
    return f"{found['more_per_kill']:.0f} requests more a kill; by stage {' and '.join(each)}"


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "compare": ("compare", compare_table),
    "dagster": ("compare", dagster_table),
    "capacity": ("capacity", capacity_table),
    "robustness": ("robustness", robustness_table),
    "conversion": ("conversion", conversion_table),
    "storage": ("storage", storage_table),
    "listing": ("storage", listing_table),
    "preprocess": ("preprocess", preprocess_table),
    "files": ("files", files_table),
    "large": ("large", large_table),
    "memory": ("memory", memory_table),
}
"""Block of the page: the part it comes from, and how it is drawn."""


def blocks(results: dict[str, Any]) -> dict[str, str]:
    found = {
        name: f"{draw(results[part]['results'])}\n{_source(results[part])}\n"
        for name, (part, draw) in TABLES.items()
        if part in results
    }
    if "capacity" in results and "compare" in results:
        asked = results["capacity"]["results"]
        capacity = min(r["per_s"] for r in asked if not r["rates"] and not r["latency_ms"])
        costs = {
            name: c["cpu_s_per_1k"]
            for scenario in results["compare"]["results"]
            for name, c in scenario["clients"].items()
        }
        cheapest = min(costs, key=lambda name: costs[name])
        most = 1000 / costs[cheapest]
        found["margin"] = (
            f"The stub answers {capacity / most:.1f} times what the quickest client "
            f"({NAMES[cheapest]}, {most:,.0f}/s) can ask from one core.\n"
        )
    return found


def _source(part: dict[str, Any]) -> str:
    return f"`{part['command']}`, {part['date']}: {part['machine']}.\n"


def write(page: Path, results: dict[str, Any]) -> None:
    """Prose around the blocks stays as it is."""
    text = page.read_text()
    for name, block in blocks(results).items():
        marked = _MARKS.format(name, block)
        pattern = re.escape(_MARKS.format(name, "\0")).replace("\0", ".*?")
        text, count = re.subn(pattern, lambda _, new=marked: new, text, flags=re.DOTALL)
        if count != 1:
            raise RuntimeError(f"{page}: no place for {name!r}")
    page.write_text(text)
    if "compare" in results:
        page.with_suffix(".svg").write_text(plot(results["compare"]["results"]))


LEFT, WIDTH, BAR = 300, 380, 22
STYLE = """text{font:13px system-ui,sans-serif;fill:#1f2328}.h{font-weight:600}.g{stroke:#d0d7de}
.o{fill:#8c959f}.e{fill:#0969da}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.g{stroke:#30363d}.o{fill:#6e7681}
.e{fill:#4493f8}}"""


def plot(results: list[Any]) -> str:
    """CPU seconds per 1,000 records on a logarithmic scale, bars from the best to the worst."""
    costs = [c["cpu_s_per_1k"] for s in results for c in s["clients"].values()]
    low = math.floor(math.log10(max(min(costs), 1e-3)))
    high = max(low + 1, math.ceil(math.log10(max(*costs, 1e-3))))

    def x(cost: float) -> float:
        share = (math.log10(max(cost, 10**low)) - low) / (high - low)
        return LEFT + max(share, 0.005) * WIDTH

    parts, y = [_text(LEFT, 20, "CPU seconds per 1,000 records (logarithmic)", "h")], 32
    for scenario in results:
        y += 24
        title = f"{scenario['in_flight']} in flight × {scenario['latency_ms']} ms"
        parts.append(_text(8, y, title, "h"))
        y += 8
        ranked = sorted(scenario["clients"].items(), key=lambda item: item[1]["cpu_s_per_1k"])
        for name, found in ranked:
            end, kind = x(found["cpu_s_per_1k"]), "e" if name in ("engine", "asset") else "o"
            bar = f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{end - LEFT:.1f}" '
            parts.append(bar + f'height="{BAR - 6}" rx="2"/>')
            parts.append(_text(8, y + 13, NAMES[name].replace("`", "")))
            parts.append(_text(end + 6, y + 13, f"{found['cpu_s_per_1k']:.3f}"))
            y += BAR
    grid = [
        f'<line class="g" x1="{x(10**power):.0f}" x2="{x(10**power):.0f}" y1="30" y2="{y}"/>'
        + _text(x(10**power), y + 16, f"{10.0**power:g}", anchor="middle")
        for power in range(low, high + 1)
    ]
    size = f'width="{LEFT + WIDTH + 70}" height="{y + 26}"'
    body = "\n".join([*grid, *parts])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>\n{body}\n</svg>\n'
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text{kind} x="{x:.0f}" y="{y}" text-anchor="{anchor}">{text}</text>'
