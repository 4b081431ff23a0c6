"""Numbers of a finished data set, for people: lengths, fill of rows beside other ways to batch, shares, quarantine."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from aromni_jax.config import LossConfig
from aromni_jax.structs import Modality, Task
from data_pipelines.document_stream import SEGMENT_DOCUMENTS
from data_pipelines.mixing import describe_shares
from data_pipelines.pack_plan import make_plan
from data_pipelines.pretokenize import QUARANTINE_FILE, unclaimed_text
from data_pipelines.records import TokenDataset, read_vocab
from data_pipelines.weighting import weight_table

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
MICRO_BATCH, NUM_PROCESSES = 2, 8
"""The published training padded micro-batches of 2 on 8 processes, all to the longest of the 16."""
_NUM_BINS = 40
_READ_FOR_MODALITIES = 8192
_EXAMPLES_PER_STAGE = 3


def survey(data_dir: pathlib.Path, *, sequence_length: int, loss: LossConfig, seed: int = 0) -> dict[str, Any]:
    """JSON-ready numbers of the data set `data_dir` as rows of `sequence_length` under the weighting of `loss`.

    Raises:
      ValueError: not a finished data set, one without records, or a damaged one.
    """
    dataset = TokenDataset(data_dir, read_vocab(data_dir))
    if not len(dataset):
        raise ValueError(f"the data set {data_dir} has no records; see {data_dir / QUARANTINE_FILE} for why")
    num_bytes = sum(marker.bytes for marker in dataset.markers)
    num_tokens = int(dataset.lengths_N.sum(dtype=np.int64))
    table_TMR = weight_table(loss, dataset.counts_TMR)
    return {
        "data": str(data_dir),
        "documents": len(dataset),
        "tokens": num_tokens,
        "shards": len(dataset.markers),
        "bytes": num_bytes,
        "bytes_per_token": num_bytes / num_tokens,
        "lengths": _lengths(dataset),
        "histogram_by_task": _histogram_by_task(dataset),
        "histograms_by_modality": _histograms_by_modality(dataset),
        "rows": compare_packing(dataset.lengths_N - 1, sequence_length, seed=seed),
        "weighting": loss.weighting,
        "shares": _shares(dataset.counts_TMR, table_TMR),
        **describe_shares(dataset.counts_TMR, table_TMR),
        "copies": dataset.dataset["statistics"]["duplicates"],
        "quarantine": _quarantine(dataset),
        "unclaimed": dataset.dataset.get("unclaimed", {}),
    }


def compare_packing(lengths_N: np.ndarray, row_length: int, *, seed: int) -> dict[str, Any]:
    """Documents of `lengths_N` targets in rows of `row_length`: by plan, and as others batch them.

    `right_padding` pads each document to the longest of its batch: of one micro-batch, or of all that go through a step
    together on several processes; `split` sets one document after the other and cuts where a row is full. Documents
    that fit no row are counted in `too_long` and left out of everything else.
    """
    fitting_N = lengths_N[lengths_N <= row_length]
    shuffled_N = fitting_N[np.random.default_rng([seed, len(fitting_N)]).permutation(len(fitting_N))]
    segments = [shuffled_N[i : i + SEGMENT_DOCUMENTS] for i in range(0, len(shuffled_N), SEGMENT_DOCUMENTS)]
    num_rows = sum(make_plan(segment, row_length, seed=seed).num_rows for segment in segments)
    num_targets = int(fitting_N.sum(dtype=np.int64))
    cut, headless = cut_by_splitting(shuffled_N, row_length)
    return {
        "sequence_length": row_length,
        "documents": len(fitting_N),
        "too_long": len(lengths_N) - len(fitting_N),
        "plan": {
            "rows": num_rows,
            "fill": num_targets / max(num_rows * row_length, 1),
            "documents_per_row": len(fitting_N) / max(num_rows, 1),
        },
        "right_padding": [
            {"order": order, "batch": batch, "fill": fill_of_padding(ordered_N, batch)}
            for order, ordered_N in (("shuffled", shuffled_N), ("as stored", fitting_N))
            for batch in (MICRO_BATCH, MICRO_BATCH * NUM_PROCESSES)
        ],
        "split": {
            "rows": -(-num_targets // row_length),
            "cut_documents": cut / max(len(fitting_N), 1),
            "targets_without_their_beginning": headless / max(num_targets, 1),
        },
    }


def fill_of_padding(lengths_N: np.ndarray, batch: int) -> float:
    """Share of positions that hold a target when each `batch` documents in order are padded to their longest."""
    if not len(lengths_N):
        return 0.0
    starts = np.arange(0, len(lengths_N), batch)
    longest = np.maximum.reduceat(lengths_N, starts).astype(np.int64)
    sizes = np.diff(np.append(starts, len(lengths_N)))
    return float(lengths_N.sum(dtype=np.int64) / max((longest * sizes).sum(), 1))


def cut_by_splitting(lengths_N: np.ndarray, row_length: int) -> tuple[int, int]:
    """(documents cut, targets that come after a cut) when documents in order fill row after row to the last place."""
    ends = np.cumsum(lengths_N, dtype=np.int64)
    first_borders = ((ends - lengths_N) // row_length + 1) * row_length
    after = np.maximum(ends - first_borders, 0)
    return int((after > 0).sum()), int(after.sum())


def _lengths(dataset: TokenDataset) -> dict[str, dict[str, float]]:
    """Documents, tokens, mean and quantiles of tokens a document: of all, and of every task."""
    groups = {"all": dataset.lengths_N} | {task.label: dataset.lengths_N[rows] for task, rows in _tasks(dataset)}
    return {
        name: {
            "documents": len(lengths),
            "tokens": int(lengths.sum(dtype=np.int64)),
            "mean": float(lengths.mean()),
            **{key: float(np.quantile(lengths, q, method="inverted_cdf")) for key, q in QUANTILES.items()},
        }
        for name, lengths in groups.items()
    }


def _tasks(dataset: TokenDataset) -> Iterator[tuple[Task, np.ndarray]]:
    """Tasks that occur, each with the indices of its records."""
    for task in Task:
        rows = np.flatnonzero(dataset.tasks_N == task)
        if len(rows):
            yield task, rows


def _edges(longest: int) -> np.ndarray:
    """Borders of at most 40 bins of equal and round width that hold 0..longest."""
    width = -(-(longest + 1) // _NUM_BINS)
    power = 10 ** max(len(str(width)) - 2, 0)
    width = -(-width // power) * power
    return np.arange(0, longest + 1 + width, width)


def _histogram_by_task(dataset: TokenDataset) -> dict[str, Any]:
    edges = _edges(int(dataset.lengths_N.max()))
    counts = {task.label: np.histogram(dataset.lengths_N[rows], edges)[0].tolist() for task, rows in _tasks(dataset)}
    return {"edges": edges.tolist(), "documents": counts}


def _histograms_by_modality(dataset: TokenDataset) -> dict[str, Any]:
    """How many tokens of a modality a document has that has any; of some thousand documents, evenly spaced."""
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), _READ_FOR_MODALITIES)).astype(np.int64))
    found: dict[Modality, list[int]] = {modality: [] for modality in Modality}
    damaged = 0
    for index in chosen.tolist():
        try:
            spans_S6 = dataset[index].spans_S6
        except ValueError:
            damaged += 1
            continue
        tokens_M = np.bincount(spans_S6[:, 2], weights=spans_S6[:, 1], minlength=len(Modality)).astype(int)
        for modality in Modality:
            if tokens_M[modality]:
                found[modality].append(int(tokens_M[modality]))
    histograms = {}
    for modality, lengths in found.items():
        if lengths:
            edges = _edges(max(lengths))
            counts = np.histogram(lengths, edges)[0].tolist()
            histograms[modality.label] = {"edges": edges.tolist(), "documents": counts, "mean": float(np.mean(lengths))}
    return {"read": len(chosen), "damaged": damaged, "modalities": histograms}


def _shares(counts_TMR: np.ndarray, table_TMR: np.ndarray) -> list[dict[str, Any]]:
    """Every pair of task and modality that occurs: targets, their share, and the share of loss weight."""
    counts_TM = counts_TMR.sum(axis=2)
    weights_TM = (counts_TMR * table_TMR).sum(axis=2)
    return [
        {
            "task": task.label,
            "modality": modality.label,
            "targets": int(counts_TM[task, modality]),
            "token_share": float(counts_TM[task, modality] / max(counts_TM.sum(), 1)),
            "weight_share": float(weights_TM[task, modality] / max(weights_TM.sum(), 1e-9)),
        }
        for task in Task
        for modality in Modality
        if counts_TM[task, modality]
    ]


def _quarantine(dataset: TokenDataset) -> dict[str, Any]:
    """What was left out or cut while pre-tokenizing: how many by stage, and the first of each stage."""
    by_stage = dict(dataset.dataset["statistics"]["quarantined"])
    path = dataset.directory / QUARANTINE_FILE
    examples: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        entry = json.loads(line)
        first = examples.setdefault(entry["stage"], [])
        if len(first) < _EXAMPLES_PER_STAGE:
            # Errors of sources name the place themselves.
            is_placed = entry["error"].startswith(entry["where"])
            error = entry["error"] if is_placed else f"{entry['where']}: {entry['error']}"
            first.append({"where": entry["where"], "key": entry["key"], "error": error})
    return {"by_stage": by_stage, "examples": examples}


def ways_to_batch(rows: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(name, fill, share of documents cut) of every way in the result of `compare_packing`, rows by plan first."""
    padded = [
        (f"padded to the longest of {way['batch']}, {way['order']}", way["fill"], 0.0) for way in rows["right_padding"]
    ]
    split = rows["split"]
    positions = max(split["rows"] * rows["sequence_length"], 1)
    fill = rows["plan"]["fill"] * rows["plan"]["rows"] * rows["sequence_length"] / positions
    return [
        ("rows by plan", rows["plan"]["fill"], 0.0),
        *padded,
        ("concatenated and split", fill, split["cut_documents"]),
    ]


def survey_text(numbers: dict[str, Any]) -> str:
    """What the command prints: the numbers of `survey` as tables."""
    lines = [
        f"{numbers['data']}: {numbers['documents']:,} documents, {numbers['tokens']:,} tokens in {numbers['shards']:,} "
        f"shard(s), {numbers['bytes_per_token']:.2f} bytes a token",
        "",
        f"{'tokens a document':<18} {'documents':>10} {'mean':>8} " + " ".join(f"{name:>7}" for name in QUANTILES),
    ]
    for name, row in numbers["lengths"].items():
        quantiles = " ".join(f"{row[key]:>7.0f}" for key in QUANTILES)
        lines.append(f"{name:<18} {row['documents']:>10,} {row['mean']:>8.1f} {quantiles}")
    rows = numbers["rows"]
    lines += ["", f"{'batches at ' + str(rows['sequence_length']):<52} {'fill':>7} {'documents cut':>14}"]
    lines += [f"{name:<52} {100 * fill:>6.2f}% {100 * cut:>13.1f}%" for name, fill, cut in ways_to_batch(rows)]
    if rows["too_long"]:
        lines.append(f"{rows['too_long']:,} documents are longer than a row and not counted here")
    lines += ["", f"{'task':<18} {'modality':<9} {'targets':>13} {'of tokens':>10} {'of loss weight':>15}"]
    for share in numbers["shares"]:
        lines.append(
            f"{share['task']:<18} {share['modality']:<9} {share['targets']:>13,} {100 * share['token_share']:>9.2f}% "
            f"{100 * share['weight_share']:>14.2f}%"
        )
    quarantine = numbers["quarantine"]
    lines += ["", f"documents that teach the same as an earlier one: {numbers['copies']:,}"]
    lines += ["left out or cut: " + (_counted(quarantine["by_stage"]) or "nothing")]
    for stage, examples in quarantine["examples"].items():
        lines += [f"  {stage}: {example['error']}" for example in examples]
    if numbers["unclaimed"]:
        lines.append(unclaimed_text(numbers["unclaimed"]))
    return "\n".join(lines) + "\n"


def _counted(by_stage: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {stage}" for stage, count in by_stage.items())
