"""What the old system left of a preprocessed file, for programs that read it: a stat JSON."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson

from modelcall_assets.records.data_files import decode_key
from modelcall_assets.stages.publication import Draft
from modelcall_assets.stages.report import Report
from modelcall_assets.stages.source import Source
from modelcall_assets.storage.listing import stat_file
from modelcall_assets.storage.places import Place

if TYPE_CHECKING:
    from modelcall_assets.stages.preprocessed import Preprocessed


def write_old_stat(
    place: Place,
    stage: Preprocessed,
    key: str,
    source: Source,
    report: Report,
    began: float,
    draft: Draft,
) -> None:
    """`<stat_folder>/preprocess/<relative path>.json`, or `…/<partition>_combined.json` where that
    has several files, beside the output. Names are spelt as they were."""
    name = decode_key(key)
    ended = time.time()
    stat: dict[str, Any] = {
        "prompt_conf": {},
        "model_conf": {},
        "rating_times": 0,
        "voting_status": False,
        "raw_file_path": str(stage.layout.input_folder / name),
        "formatted_file_path": str(draft.out.place),
        "taged_file_paths": [],
        "voting_file_path": "",
        "n_sample": report.rows,
        "processing_complete": True,
        "start_time": _as_iso(began),
        "end_time": _as_iso(ended),
        "processing_time_seconds": round(ended - began, 3),
        "max_tokens": stage.options.max_tokens,
        "output_file_exists": True,
        "output_file_size_bytes": draft.out.tell(),
        "input_file_size_bytes": sum(stat_file(part.place).size for part in source.parts),
    }
    if is_group(source):
        stat |= {"language": name, "num_xml_files": len(source.parts)}
    draft.beside(place).write(orjson.dumps(stat, option=orjson.OPT_INDENT_2))


def is_group(source: Source) -> bool:
    return len(source.parts) > 1 or any(part.is_document for part in source.parts)


def _as_iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat()
