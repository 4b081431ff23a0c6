"""One page on a data set: how long its documents are, how full its rows, what weighs how much, some to see and hear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aromni_jax.evaluation.markup import escape, page, percent, section, table, tag, tile
from aromni_jax.evaluation.svg import histogram
from aromni_jax.structs import Modality

LENGTHS = "Tokens of whole documents, prompts and control tokens included."
BATCHES = (
    "How much of what the machine computes is a target. Rows by plan hold whole documents. Padding is to the longest "
    "of a micro-batch of 2, or of all 16 documents when 8 processes step together, which is how the method was first "
    "trained; in the order of the shards, and shuffled. Concatenating and splitting fills rows too, but cuts "
    "documents: what comes after a cut does not see its beginning."
)
SHARES = "Of target tokens, and of loss weight under the weighting “{}”."
SAMPLES = "Evenly spaced over the records of each task. Pictures and sound are what their tokens give back."


def render_data_page(
    numbers: Mapping[str, Any], ways: Sequence[tuple[str, float, float]], samples: Sequence[Mapping[str, Any]]
) -> str:
    """The page as one string, which loads nothing.

    Args:
      numbers: of a survey: data, documents, tokens, shards, bytes_per_token, lengths, histogram_by_task,
        histograms_by_modality, rows, weighting, shares, token_share, weight_share, copies, quarantine.
      ways: (name, fill, share of documents cut) of each way to batch; the first is ours.
      samples: documents as {task, key, tokens, parts: [{role, html}]}; the HTML is taken as it is.
    """
    return page(
        f"Data set {numbers['data']}",
        tag("h1", escape(numbers["data"])),
        tag(
            "p",
            f"{numbers['documents']:,} documents, {numbers['tokens']:,} tokens in {numbers['shards']:,} shard(s), "
            f"{numbers['bytes_per_token']:.2f} bytes a token",
            css="lead",
        ),
        _tiles(numbers, ways),
        section("Lengths", LENGTHS, _length_charts(numbers), _length_table(numbers["lengths"])),
        section(f"Rows of {numbers['rows']['sequence_length']:,}", BATCHES, _batches(numbers["rows"], ways)),
        section(
            "Shares",
            SHARES.format(numbers["weighting"]),
            _shares(numbers),
        ),
        section("Left out or cut", "While pre-tokenizing, by stage, with the first of each.", _quarantine(numbers)),
        section("Documents", SAMPLES, _documents(samples)),
    )


def _precise(value: float) -> str:
    return f"{100 * value:.2f}\u00a0%"


def _words(label: str) -> str:
    return label.replace("_", " ")


def _name(label: str) -> str:
    """A cell that is not broken over lines."""
    return tag("td", escape(_words(label)), css="name")


def _tiles(numbers: Mapping[str, Any], ways: Sequence[tuple[str, float, float]]) -> str:
    (_, fill, _), (_, padded, _), (_, _, cut) = ways[0], ways[2], ways[-1]
    all_lengths = numbers["lengths"]["all"]
    left_out = sum(numbers["quarantine"]["by_stage"].values())
    return tag(
        "div",
        tile(f"{numbers['documents']:,}", "documents", f"{numbers['tokens']:,} tokens"),
        tile(f"{all_lengths['median']:,.0f}", "tokens, median document", f"mean {all_lengths['mean']:,.1f}"),
        tile(_precise(fill), f"fill of rows of {numbers['rows']['sequence_length']:,}", "whole documents only"),
        tile(percent(padded), "fill with padding", "to the longest of 2 x 8, shuffled"),
        tile(percent(cut), "of documents cut", "if concatenated and split"),
        tile(f"{left_out:,}", "left out or cut", "while pre-tokenizing"),
        css="tiles",
    )


def _length_charts(numbers: Mapping[str, Any]) -> str:
    by_task, by_modality = numbers["histogram_by_task"], numbers["histograms_by_modality"]
    tasks = {_words(name): counts for name, counts in by_task["documents"].items()}
    charts = [tag("div", tag("h3", "Documents by task"), histogram(tasks, by_task["edges"], x_label="tokens"))]
    for modality in Modality:
        found = by_modality["modalities"].get(modality.label)
        if found:
            chart = histogram(
                {modality.label: found["documents"]}, found["edges"], x_label="tokens", first_colour=modality
            )
            title = f"{modality.label.capitalize()} tokens of documents that have any"
            charts.append(tag("div", tag("h3", title), chart))
    told = f"Modalities: of {by_modality['read']:,} documents read, evenly spaced."
    if by_modality["damaged"]:
        told += f" {by_modality['damaged']:,} of them are damaged."
    return tag("div", *charts, css="charts") + tag("p", escape(told), css="note")


def _length_table(lengths: Mapping[str, Mapping[str, float]]) -> str:
    columns = [name for name in lengths["all"] if name not in ("documents", "tokens", "mean")]
    rows = [
        [
            _name(name),
            f"{line['documents']:,}",
            f"{line['tokens']:,}",
            f"{line['mean']:,.1f}",
            *(f"{line[column]:,.0f}" for column in columns),
        ]
        for name, line in lengths.items()
    ]
    return table(["", "documents", "tokens", "mean", *columns], rows, range(1, 4 + len(columns)))


def _bar(share: float, css: str = "bar") -> str:
    return f'<div class="{css}" style="width:{100 * share:.1f}%"></div>'


def _batches(rows: Mapping[str, Any], ways: Sequence[tuple[str, float, float]]) -> str:
    lines = [[_name(name), tag("td", _bar(fill), css="bars"), _precise(fill), percent(cut)] for name, fill, cut in ways]
    plan, split = rows["plan"], rows["split"]
    told = (
        f"By plan: {plan['rows']:,} rows, {plan['documents_per_row']:.1f} documents each. Split: "
        f"{percent(split['targets_without_their_beginning'])} of the targets come after a cut."
    )
    if rows["too_long"]:
        told += f" {rows['too_long']:,} documents are longer than a row and not counted here."
    return table(["", "", "fill", "documents cut"], lines, (2, 3)) + tag("p", escape(told), css="note")


def _shares(numbers: Mapping[str, Any]) -> str:
    key = tag(
        "p",
        '<span class="key"></span>tokens<span class="key other"></span>loss weight',
        css="note",
    )

    def line(names: Sequence[str], tokens: float, weight: float, *targets: str) -> list[str]:
        bars = tag("td", _bar(tokens), _bar(weight, "bar other"), css="bars")
        return [*map(_name, names), bars, *targets, _precise(tokens), _precise(weight)]

    out = [key]
    for kind in ("modality", "task"):
        token_share, weight_share = numbers["token_share"][kind], numbers["weight_share"][kind]
        lines = [line([name], share, weight_share[name]) for name, share in token_share.items() if share]
        out.append(tag("h3", f"By {kind}") + table(["", "", "tokens", "loss weight"], lines, (2, 3)))
    pairs = [
        line([s["task"], s["modality"]], s["token_share"], s["weight_share"], f"{s['targets']:,}")
        for s in numbers["shares"]
    ]
    headers = ["task", "modality", "", "targets", "tokens", "loss weight"]
    return "".join([*out, tag("h3", "By both"), table(headers, pairs, (3, 4, 5))])


def _quarantine(numbers: Mapping[str, Any]) -> str:
    by_stage, examples = numbers["quarantine"]["by_stage"], numbers["quarantine"]["examples"]
    copies = tag("p", f"{numbers['copies']:,} documents that were kept teach the same as an earlier one.")
    if not by_stage:
        return tag("p", "Nothing.") + copies
    lines = []
    for stage, count in sorted(by_stage.items(), key=lambda item: -item[1]):
        told = [escape(example["error"]) for example in examples.get(stage, ())]
        lines.append([_name(stage), f"{count:,}", "<br>".join(told)])
    return table(["stage", "records", "the first"], lines, (1,)) + copies


def _documents(samples: Sequence[Mapping[str, Any]]) -> str:
    out = []
    for task in dict.fromkeys(sample["task"] for sample in samples):
        figures = []
        for sample in (sample for sample in samples if sample["task"] == task):
            parts = [
                tag("div", tag("small", escape(part["role"])), part["html"], css="part") for part in sample["parts"]
            ]
            told = f"{escape(sample['key'])} \u00b7 {sample['tokens']:,} tokens"
            figures.append(tag("figure", *parts, tag("figcaption", told)))
        out += [tag("h3", escape(_words(task).capitalize())), tag("div", *figures, css="documents")]
    return "".join(out)
