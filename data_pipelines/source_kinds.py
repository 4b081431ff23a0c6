"""How a source is chosen: `kind:path`, or the bare path of a manifest."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
from collections.abc import Mapping

from data_pipelines import containers, layouts, released, tables, tfds_source
from data_pipelines.sources import ManifestSource, Source


@dataclasses.dataclass(frozen=True)
class SourceKind:
    """One kind of source: its class, what stands behind the colon, and what it reads, for people."""

    source: type[Source]
    argument: str
    reads: str


KINDS = {
    "manifest": SourceKind(ManifestSource, "FILE", "JSONL, one conversation a line; the same as the bare path"),
    "ljspeech": SourceKind(layouts.LJSpeechSource, "DIR", "`metadata.csv` and `wavs/`"),
    "librispeech": SourceKind(layouts.LibriSpeechSource, "DIR", "`*.trans.txt` beside `.flac`"),
    "vctk": SourceKind(layouts.VCTKSource, "DIR", "`txt/` and `wav48*/`"),
    "common_voice": SourceKind(layouts.CommonVoiceSource, "DIR or TSV", "`validated.tsv` and `clips/`"),
    "coco": SourceKind(layouts.CocoSource, "JSON", "`annotations/captions_*.json` and its pictures"),
    "image_folder": SourceKind(
        layouts.ImageFolderSource, "DIR", "pictures with `.txt` or `.json` captions beside them"
    ),
    "text": SourceKind(containers.TextLinesSource, "PATH", "`.txt`, `.txt.gz`, `.txt.zst`: one document a line"),
    "text_files": SourceKind(containers.TextFilesSource, "PATH", "the same, one document a file"),
    "webdataset": SourceKind(
        containers.WebDatasetSource, "PATH", "tars; a picture or utterance and its text share a stem"
    ),
    "table": SourceKind(tables.TableSource, "PATH", "Parquet or Arrow; `--config.columns=` says which column is what"),
    "tfds": SourceKind(
        tfds_source.TfdsSource, "DIR", "a prepared builder of TensorFlow Datasets; features are named as columns are"
    ),
    "released_jsonl": SourceKind(
        released.TokenizedJsonlSource, "PATH", "the authors' stage 1: ids as `discrete_code`, `response`, `task`"
    ),
    "released_parquet": SourceKind(
        released.InstructParquetSource, "PATH", "the authors' instruction tuning: ids as `input_ids`, `labels`"
    ),
}
_PREFIX = re.compile(r"([A-Za-z][\w-]+):(?!//)(.*)", re.DOTALL)


def named_kind(source: str) -> tuple[str, str]:
    """Kind and path of `kind:path`, known or not; no kind where `source` is a path that exists, or a URL."""
    match = None if os.path.exists(source) else _PREFIX.fullmatch(source)
    return (match[1], match[2]) if match else ("", source)


def open_source(
    source: str,
    *,
    split: str = "",
    heldout_fraction: float = 0.0,
    tasks: str = "",
    columns: Mapping[str, str] = types.MappingProxyType({}),
) -> Source:
    """Opens `kind:path`, or a manifest by its bare path; `tasks` are names with commas between ("": all it can make).

    Raises:
      ValueError: an unknown kind (with the nearest and all there are), and what the source itself raises.
    """
    kind, path = named_kind(source)
    kind = kind or "manifest"
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown kind of source {kind!r} in {source!r}; {hint}kinds: {', '.join(KINDS)}")
    chosen = [name.strip() for name in tasks.split(",") if name.strip()]
    return KINDS[kind].source(path, split=split, heldout_fraction=heldout_fraction, tasks=chosen, columns=columns)


def kinds_table() -> str:
    """The Markdown table of every kind: how to write it, what it reads, which tasks it gives."""
    rows = ["| `--config.source=` | what it reads | tasks |", "|---|---|---|"]
    for name, kind in KINDS.items():
        tasks = ", ".join(f"`{task.label}`" for task in kind.source.TASKS) or "as its records say"
        rows.append(f"| `{name}:{kind.argument}` | {kind.reads} | {tasks} |")
    return "\n".join(rows)
