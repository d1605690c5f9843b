"""Code and Chinese texts cut to a token budget: the tokenizer, what is made of it, the whole step.

python -m benchmarks.preprocess PROGRAM INPUT PROCESSES    # one program; what it took is printed
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import count, cycle
from multiprocessing import active_children
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from statistics import median
from typing import Any

import orjson
import pyarrow.parquet as pq

from benchmarks.measure import CLIENT_CORE, CORES, ROOT, start
from modelcall_assets.config.preprocess import Preprocess
from modelcall_assets.stages.preprocessed import preprocess
from modelcall_assets.stages.raw import read_raw
from modelcall_assets.stages.recipe import Recipe
from modelcall_assets.stages.source import Part, Source
from modelcall_assets.storage.files import publish
from modelcall_assets.storage.listing import stat_file
from modelcall_assets.transforms.texts import DEFAULT_ENCODING, tokenizer

MAX_TOKENS = 32768
SIZE_MB, OLD_MB, QUICK_MB = 1024, 256, 6
"""Of text, as UTF-8. The old way has all of a file in memory and gets less; a quick run gets enough
for a second process to have something to do."""
ROUNDS = 3
PROCESSES = min(len(CORES), 4)
OLD_PYTHON = Path(os.environ.get("OLD_PYTHON") or ROOT / ".acceptance" / "old" / "bin" / "python")
"""Has pandas and tiktoken, which are no dependencies of ours: docs/performance.md."""
BASE, ONE, SHARED, OLD = "tokenizer", "stage", "stage_shared", "old"
LOOK_S = 0.2

SOURCES = (
    *(sysconfig.get_paths()[name] for name in ("purelib", "stdlib")),
    "/usr/include",
    "/usr/lib",
    "/usr/share",
)
SUFFIXES = (
    ".c .cc .cpp .cs .css .el .go .h .hpp .java .js .kt .lua .php .pl .pm .py .R .rb .rs .scala "
    ".sh .sql .swift .ts"
)
DISTINCT_MB = 64
SHORTEST, LONGEST = 200, 1_000_000
JOINED_EVERY, JOINED_CHARS = 10, (200_000, 1_000_000)
CHINESE_BYTES = (2_000, 600_000)
CHINESE = (
    "我们 你们 他们 大家 自己 人们 孩子 学生 老师 朋友 医生 工人 农民 父亲 母亲 今天 明天 昨天 "
    "现在 以后 以前 早上 晚上 时候 时间 一年 两个 三次 许多 一些 所有 每个 这样 那里 这里 什么 "
    "怎么 为什么 因为 所以 但是 虽然 如果 然后 而且 或者 已经 正在 可以 应该 必须 能够 需要 "
    "希望 喜欢 觉得 认为 知道 发现 开始 结束 继续 使用 进行 提供 提高 增加 减少 改变 解决 研究 "
    "学习 工作 生活 发展 建设 管理 服务 生产 参加 支持 影响 要求 说明 表示 介绍 问题 方法 结果 "
    "原因 情况 条件 关系 作用 过程 系统 数据 模型 语言 文字 信息 技术 科学 经济 社会 文化 历史 "
    "教育 政府 公司 市场 企业 产品 价格 质量 环境 城市 农村 学校 国家 世界 中国 北京 上海 地方 "
    "地区 公里 河流 山区 天气 春天 重要 主要 不同 新的 很多 非常 特别 比较 更加 大 小 好 高 长 "
    "的 了 在 是 和 有 不 也 都 就 从 对 把"
)


def measure_all(root: Path, _stub: Any, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Round after round, each program in its turn and in a fresh process; medians. RuntimeError
    when a row is missing, or when several processes make other rows than one."""
    mb, rounds = (QUICK_MB, 1) if quick else (SIZE_MB, ROUNDS)
    found: dict[str, Any] = {"mb": mb, "rounds": rounds, "processes": PROCESSES}
    found["corpora"] = {kind: _measured(root, kind, mb, rounds, say) for kind in RECORDS}
    return found


def _measured(
    root: Path, kind: str, mb: float, rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    say(f"making {mb:,g} MB of {kind}")
    large = make(root / kind / "all.jsonl", kind, mb)
    inputs = dict.fromkeys(PROGRAMS, large)
    if OLD_PYTHON.exists():
        inputs[OLD] = make(root / kind / "less.jsonl", kind, min(mb, OLD_MB))
    seen: list[dict[str, dict[str, Any]]] = []
    for number in range(rounds):
        seen.append({})
        for name, given in inputs.items():
            say(f"{given['mb']:,.0f} MB of {kind}, round {number + 1}: {name}")
            seen[-1][name] = _run(name, **given)
        if seen[-1][ONE]["version"] != seen[-1][SHARED]["version"]:
            raise RuntimeError(f"{kind}: {PROCESSES} processes make other rows than one")
    programs = {name: _summary(name, seen) for name in inputs}
    return {"rows": large["rows"], "programs": {**programs, OLD: programs.get(OLD)}}


def _summary(name: str, rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    took = [each[name] for each in rounds]
    per_cpu_s = [each["mb"] / each["cpu_s"] for each in took]
    base = [each[BASE]["mb"] / each[BASE]["cpu_s"] for each in rounds]
    pairs = zip(per_cpu_s, base, strict=True)
    return {
        "name": took[0].get("name"),
        "mb": took[0]["mb"],
        "mb_per_cpu_s": median(per_cpu_s),
        "of_tokenizer": median(rate / unit for rate, unit in pairs),
        "mb_per_s": median(each["mb"] / each["wall_s"] for each in took),
        "of_one_process": median(each[ONE]["wall_s"] / each[name]["wall_s"] for each in rounds)
        if name in (ONE, SHARED)
        else None,
        "rss_mb": max(each["rss_mb"] for each in took),
        "child_mb": max(each["child_mb"] for each in took),
    }


def _run(name: str, path: Path, rows: int, mb: float) -> dict[str, Any]:
    """RuntimeError when a row is missing."""
    output, shares = path.with_suffix(".parquet"), PROCESSES if name == SHARED else 1
    if name == OLD:
        program = ROOT / "benchmarks" / "old_preprocess.py"
        command = [str(OLD_PYTHON), "-I", str(program), str(path), str(output), str(MAX_TOKENS)]
    else:
        command = [sys.executable, "-m", "benchmarks.preprocess", name, str(path), str(shares)]
    process = start(command, CLIENT_CORE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if name == SHARED:
        os.sched_setaffinity(process.pid, CORES)
    child_kb = 0
    while True:
        try:
            printed, errors = process.communicate(timeout=LOOK_S if name == SHARED else None)
            break
        except subprocess.TimeoutExpired:
            child_kb = max([child_kb, *_children_kb(process.pid)])
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {errors.decode()}")
    took = {**orjson.loads(printed), "mb": mb, "child_mb": child_kb / 1024}
    written = took["rows"]
    if name in (ONE, SHARED, OLD):
        written = pq.read_metadata(output).num_rows
        output.unlink()
    if not took["rows"] == written == rows:
        raise RuntimeError(f"{name}: {rows:,} rows, {took['rows']:,} made, {written:,} written")
    return took


def _children_kb(pid: int) -> Iterator[int]:
    """The peak of each process that this one started."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:  # it has ended
            continue
        fields = dict(line.split(":", 1) for line in text.splitlines())
        if int(fields["PPid"]) == pid and "VmHWM" in fields:
            yield int(fields["VmHWM"].split()[0])


# What there is to read


def make(path: Path, kind: str, mb: float) -> dict[str, Any]:
    """Lines of JSON with so much text in them; a smaller file is the start of a larger one."""
    path.parent.mkdir(exist_ok=True)
    size = rows = 0
    with path.open("wb", 1 << 20) as out:
        for record, text in RECORDS[kind]():
            out.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
            rows, size = rows + 1, size + len(text.encode())
            if size >= mb * 2**20:
                break
    return {"path": path, "rows": rows, "mb": size / 2**20}


def code() -> Iterator[tuple[dict[str, str], str]]:
    """Source files of this machine, again and again, and some joined to more than the budget."""
    dice, files = random.Random("code"), cycle(_source_files())
    for number in count():
        path, text = next(files)
        if number % JOINED_EVERY == JOINED_EVERY - 1:
            wanted, parts, length = dice.randint(*JOINED_CHARS), [text], len(text)
            while length < wanted:
                parts.append(next(files)[1])
                length += len(parts[-1])
            text = "\n".join(parts)[: JOINED_CHARS[1]]
        text = f"# {number}\n{text}"
        yield {"path": path, "content": text}, text


def _source_files() -> Iterator[tuple[str, str]]:
    """In an order that is as good as random, and that a file more or less does not change."""
    suffixes = tuple(SUFFIXES.split(" "))
    paths = {
        Path(folder, name)
        for root in SOURCES
        for folder, _, names in os.walk(root)
        for name in names
        if name.endswith(suffixes)
    }
    size = 0
    for path in sorted(paths, key=lambda path: hashlib.sha256(bytes(path)).digest()):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if SHORTEST <= len(text) <= LONGEST:
            yield str(path), text
            size += len(text)
        if size > DISTINCT_MB * 2**20:
            return


def chinese() -> Iterator[tuple[dict[str, str], str]]:
    """Sentences of common words, put together at random to texts of very different lengths."""
    dice = random.Random("chinese")
    sentences = [_sentence(dice) for _ in range(20_000)]
    mean_bytes = sum(len(sentence.encode()) for sentence in sentences) / len(sentences)
    shortest, longest = map(math.log, CHINESE_BYTES)
    while True:
        size = math.exp(dice.uniform(shortest, longest))
        text = "".join(dice.choices(sentences, k=max(1, round(size / mean_bytes))))
        yield {"text": text}, text


def _sentence(dice: random.Random) -> str:
    words = CHINESE.split(" ")
    clauses = (
        "".join(dice.choices(words, k=dice.randint(3, 12))) for _ in range(dice.randint(1, 4))
    )
    ends = dice.choices("。！？；", weights=(12, 1, 2, 1)) + dice.choices(("", "\n"), (9, 1))
    return dice.choice("，，，，、：").join(clauses) + "".join(ends)


RECORDS: dict[str, Callable[[], Iterator[tuple[dict[str, str], str]]]] = {
    "code": code,
    "Chinese": chinese,
}


# In the fresh process


def encode(path: Path, _processes: int) -> dict[str, Any]:
    """The unit: `bpe_openai` alone."""
    from bpe_openai._bindings import tokenizer_for_encoding

    return _each_text(path, tokenizer_for_encoding(DEFAULT_ENCODING).encode)


def truncate(path: Path, _processes: int) -> dict[str, Any]:
    ours = tokenizer()
    return _each_text(path, lambda text: ours.truncate(text, MAX_TOKENS))


def _each_text(path: Path, work: Callable[[str], object]) -> dict[str, Any]:
    """Without reading and parsing."""
    rows, wall_s, cpu_s = 0, 0.0, 0.0
    with path.open("rb", 1 << 20) as lines:
        for line in lines:
            record = orjson.loads(line)
            text = record.get("text") or record["content"]
            began, cpu = time.monotonic(), time.process_time()
            work(text)
            wall_s, cpu_s = wall_s + time.monotonic() - began, cpu_s + time.process_time() - cpu
            rows += 1
    return {"rows": rows, "wall_s": wall_s, "cpu_s": cpu_s}


def stage(path: Path, processes: int) -> dict[str, Any]:
    """What the asset `preprocessed` does with a file that `raw` has looked at."""
    seen = read_raw(stat_file(path))
    source = Source((Part(path.name, path, seen.digest),), seen.schema, seen.rows)
    script = "github_raw_code" if path.parent.name == "code" else "universal"
    config = Preprocess(enabled=True, script_type=script, max_tokens=MAX_TOKENS)
    began, cpu = time.monotonic(), _cpu_s()
    with publish(path.with_suffix(".parquet")) as out:
        recipe = Recipe(config, path.parent, "task.yaml")
        report = preprocess(source, recipe, out, processes=processes)
        source.verify()
    wall_s = time.monotonic() - began
    while active_children():  # only then is their time known
        time.sleep(0.01)
    if report.rows_in != report.rows or report.failed:
        raise RuntimeError(f"{report.rows_in} in, {report.rows} out, {report.failed} failed")
    took = {"wall_s": wall_s, "cpu_s": _cpu_s() - cpu, "version": report.data_version}
    return {"rows": report.rows, **took}


def _cpu_s() -> float:
    """Of this process and of those it started that have ended."""
    used = [getrusage(RUSAGE_SELF), getrusage(RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


PROGRAMS: Mapping[str, Callable[[Path, int], dict[str, Any]]] = {
    BASE: encode,
    "truncate": truncate,
    ONE: stage,
    SHARED: stage,
}


def main(name: str, path: str, processes: str) -> None:
    """Time is that of the work, without the imports; the peak has them in it."""
    took = PROGRAMS[name](Path(path), int(processes))
    status = Path("/proc/self/status").read_text()
    took["rss_mb"] = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    sys.stdout.write(orjson.dumps(took).decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
