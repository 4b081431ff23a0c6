"""`aromni evaluate --suite=weights`: what weights of fewer bits cost, on held-out conversations.

The same tokens go through the model in float32, in bfloat16 and with int8 matrices. Of each: the next-token loss of
every modality, and how often the most likely next token is the one that float32 finds most likely after the same
tokens. (Free answers drift apart at the first difference, and would say little about the second.)
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launch.model_flags import WEIGHTS, parse_mesh

if TYPE_CHECKING:
    import numpy as np

    from aromni_jax.inference.decode import OmniModel
    from aromni_jax.structs import Example

CASES_PER_GROUP = 40
"""Conversations of each task and group of the corpus, as many as the quickstart's losses are taken over."""


def compare_weights(args: argparse.Namespace, corpus: pathlib.Path, output: pathlib.Path) -> int:
    """Measures all of `WEIGHTS`, writes results.json and report.html, and prints the table.

    Raises:
      ValueError: `--weights` is given, or as `load_model`.
    """
    from aromni_jax.evaluation.tasks import choose
    from aromni_jax.structs import Task
    from launch.evaluate import REPORT_FILE, RESULTS_FILE, can_do, encoded, outlines_of, with_media
    from launch.loading import load_model

    if args.weights:
        raise ValueError(f"--suite=weights compares {', '.join(WEIGHTS)}; leave --weights={args.weights} out")
    examples: list[Example] = []
    measured: dict[str, Any] = {}
    reference: list[np.ndarray] = []
    step = 0
    for weights in WEIGHTS:
        print(f"{weights} ...", file=sys.stderr, flush=True)
        loaded = load_model(args.model, template=args.template, mesh=parse_mesh(args.mesh), weights=weights)
        step = loaded.step
        if not examples:
            outlines = [case for case in outlines_of(corpus, "heldout") if can_do(case.task, loaded)]
            chosen = choose(outlines, dict.fromkeys(Task, CASES_PER_GROUP))
            examples = encoded(list(with_media({case.key: case for case in chosen}, loaded).values()), loaded)
        result, best = measure(loaded.model, examples, reference)
        reference = reference or best
        measured[weights] = result
    summary = f"{args.model}, step {step}: {len(examples)} held-out conversations of {corpus}."
    results = {"title": "AR-Omni: types of weights", "summary": summary, "step": step, "weights": measured}
    (output / RESULTS_FILE).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (output / REPORT_FILE).write_text(_page(results), encoding="utf-8")
    print(summary)
    for row in (_HEADERS, *_rows(measured)):
        print(f"{row[0]:<10} {row[1]:>10} {row[2]:<8}" + "".join(f" {cell:>14}" for cell in row[3:]))
    print(output / REPORT_FILE)
    return 0


def measure(
    model: OmniModel, examples: Sequence[Example], reference: Sequence[np.ndarray] = ()
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """(bytes of the weights, losses of each modality), and the most likely next tokens [B, L] of each batch.

    `reference` is what another model made of the same examples; `same_greedy_token` is the share of targets, of the
    modality, where both agree (1 without a reference).
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from aromni_jax import partitioning
    from aromni_jax.inference.head import WHOLE, narrow_logits
    from aromni_jax.losses import INVALID_LOGIT
    from aromni_jax.models.unstacked import forward, output_head
    from aromni_jax.structs import Modality
    from data_pipelines.pipeline import evaluation_batches

    vocab = model.vocab
    longest = max(len(example.tokens_L) for example in examples)
    length = max(512, -(-longest // 128) * 128)

    def read(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        """Negative log-likelihood of the targets, and the most likely tokens, [B, L] each; by the head that decodes."""
        hidden_BLD, _ = forward(model.config, params, batch.inputs_BL, batch.positions_BL, batch.segment_ids_BL)
        table_VD, scale_V = output_head(params)

        def of_row(row: Any) -> tuple[jax.Array, jax.Array]:
            hidden_LD, targets_L = row
            logits_LV = narrow_logits(
                hidden_LD, table_VD, jnp.int32(WHOLE), spans=((0, vocab.size),), controls=(), scale_V=scale_V
            )
            logits_LV = jnp.where(vocab.valid_mask_V, logits_LV, INVALID_LOGIT)
            found_L = jnp.take_along_axis(logits_LV, targets_L[:, None], axis=1)[:, 0]
            return jax.nn.logsumexp(logits_LV, axis=1) - found_L, logits_LV.argmax(1)

        losses_BL, best_BL = jax.lax.map(of_row, (hidden_BLD, jnp.asarray(batch.targets_BL)))
        return losses_BL, best_BL

    compiled = jax.jit(read if model.mesh is None else partitioning.on_mesh(read, model.mesh))
    best: list[np.ndarray] = []
    sums = np.zeros((len(Modality), 3))
    for number, batch in enumerate(evaluation_batches(examples, vocab, sequence_length=length, batch_size=8)):
        losses_BL, best_BL = (np.asarray(x) for x in compiled(model.params, batch))
        best.append(best_BL)
        is_same_BL = best_BL == reference[number] if reference else np.ones(best_BL.shape, bool)
        for modality in Modality:
            counts_BL = (batch.loss_weights_BL > 0) & (batch.modality_BL == modality)
            sums[modality] += [losses_BL[counts_BL].sum(dtype=np.float64), is_same_BL[counts_BL].sum(), counts_BL.sum()]
    lines = [
        {"name": modality.label, "loss": loss / count, "same_greedy_token": same / count, "tokens": int(count)}
        for modality, (loss, same, count) in zip(Modality, sums.tolist(), strict=True)
        if count
    ]
    return {"bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)), "losses": lines}, best


_HEADERS = ("weights", "MB", "modality", "loss, nats", "to float32", "same greedy", "tokens")


def _rows(measured: dict[str, Any]) -> list[list[str]]:
    first = {line["name"]: line["loss"] for line in measured[WEIGHTS[0]]["losses"]}
    return [
        [
            weights,
            f"{result['bytes'] / 1e6:,.2f}",
            line["name"],
            f"{line['loss']:.4f}",
            f"{line['loss'] - first[line['name']]:+.4f}",
            f"{line['same_greedy_token']:.2%}",
            f"{line['tokens']:,}",
        ]
        for weights, result in measured.items()
        for line in result["losses"]
    ]


def _page(results: dict[str, Any]) -> str:
    from aromni_jax.evaluation.markup import escape, page, section, table, tag

    rows = [[escape(cell) for cell in row] for row in _rows(results["weights"])]
    note = (
        "Nats per token, every token counted once, prompts included. The same greedy token: how often the most likely "
        "next token is that of float32 after the same tokens. float32 and bfloat16 are also what is computed in; with "
        "int8 matrices the model computes in its own type."
    )
    return page(
        results["title"],
        tag("h1", escape(results["title"])),
        tag("p", escape(results["summary"]), css="lead"),
        section("Held-out loss", note, table(_HEADERS, rows, (1, 3, 4, 5, 6))),
    )
