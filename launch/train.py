"""`aromni train`: pretraining and SFT, one process or many. The only place that knows model, data, mesh and workdir."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from launch import distributed
from launch.compile_cache import keep_compiled_programs
from launch.flags import add_config_argument, load_config
from launch.host_memory import keep_freed_memory_on_cpu

if TYPE_CHECKING:
    import jax

    from aromni_jax.config import TrainConfig
    from aromni_jax.models.config import ModelConfig
    from aromni_jax.train.loop import Batches, Evaluate
    from aromni_jax.train.observe import Hook
    from aromni_jax.train.state import TrainState
    from aromni_jax.vocab import JointVocab

log = logging.getLogger("aromni.train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `aromni train`."""
    add_config_argument(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run; the same command goes on")
    parser.add_argument("--profile_steps", metavar="FIRST:LAST", help="record these steps with the JAX profiler")
    parser.add_argument(
        "--executable", metavar="FILE", help="the compiled step that `aromni plan --executable=FILE` made, for this run"
    )
    parser.add_argument(
        "--exit_status_if_stopped",
        type=int,
        default=0,
        metavar="N",
        help="exit status of a run that SIGTERM or SIGINT stopped before its end (default: 0; launchers restart 75)",
    )
    distributed.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Trains until `total_steps`, or until SIGTERM or SIGINT, which save; exit status 0, or the one asked for then."""
    started = time.monotonic()
    config_dict = load_config(args)
    start_logging()
    keep_freed_memory_on_cpu()
    distributed.connect(args)
    with distributed.leaving_at_once():
        distributed.quiet_all_but_one()

        from aromni_jax.config import TrainConfig, from_mapping
        from aromni_jax.train.observe import ProfilerWindow
        from aromni_jax.train.workdir import prepare

        config = from_mapping(TrainConfig, config_dict)
        keep_compiled_programs(prepare(args.workdir))
        hooks: list[Hook] = []
        if args.profile_steps:
            first, _, last = args.profile_steps.partition(":")
            if not (first.isdigit() and last.isdigit()):
                raise ValueError(f"--profile_steps={args.profile_steps}: give FIRST:LAST, for example 10:15")
            hooks.append(ProfilerWindow(pathlib.Path(args.workdir), int(first), int(last)))
        result = run_training(config, args.workdir, hooks, started=started, executable=args.executable)
    return args.exit_status_if_stopped if result.is_interrupted else 0


def start_logging() -> None:
    """Our messages with their time on standard error; of the libraries below only what went wrong."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in ("absl", "jax", "orbax"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Says when there is an accelerator that jax has no support for, and the processors will compute instead.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Where a run stands when `run_training` returns: the state is on the devices and, at `step`, in a checkpoint."""

    workdir: pathlib.Path
    step: int
    is_interrupted: bool
    state: TrainState
    model: ModelConfig
    vocab: JointVocab
    mesh: jax.sharding.Mesh


def run_training(
    config: TrainConfig,
    workdir: str | os.PathLike[str],
    hooks: Sequence[Hook] = (),
    *,
    evaluate: Evaluate | None = None,
    with_progress: bool = True,
    started: float | None = None,
    executable: str | os.PathLike[str] | None = None,
) -> TrainResult:
    """Trains `config` in `workdir` from the newest checkpoint there, or from the beginning.

    `evaluate`, by default the losses on `data.evaluation`, runs every `config.eval_every_steps`; its numbers go to
    `evaluations.jsonl` and the hooks. The first step is timed from `started` (`time.monotonic()`), by default from now.
    With `executable`, the step is loaded from that file instead of compiled.

    Raises:
      ValueError: the workdir cannot be written or belongs to another config, vocabulary or data set, every checkpoint
        is damaged, the config does not fit the devices or the data, or `executable` is of another step.
    """
    import jax

    from aromni_jax import partitioning
    from aromni_jax.config import to_json
    from aromni_jax.models.config import num_parameters, resolve_model, train_flops
    from aromni_jax.train import observe
    from aromni_jax.train import workdir as workdirs
    from aromni_jax.train.checkpoint import Checkpointer
    from aromni_jax.train.executable import open_executable, program_facts
    from aromni_jax.train.leaves import any_process
    from aromni_jax.train.loop import TrainLoop
    from aromni_jax.train.metrics import MetricsWindow, peak_flops
    from aromni_jax.train.saved_step import RunFacts
    from aromni_jax.train.state import abstract_state, init_state
    from aromni_jax.train.step import make_learning_rate, make_train_step
    from aromni_jax.train.watchdog import Watchdog
    from launch.heldout import HeldOutLosses
    from launch.training_data import open_data

    started = time.monotonic() if started is None else started
    path = workdirs.prepare(workdir)
    resolved = json.loads(to_json(config))
    mesh = partitioning.make_mesh(config.mesh)
    data = open_data(config, partitioning.local_rows(mesh, config.global_batch_size))
    vocab, batches, frozen = data.vocab, data.batches, data.frozen
    model = resolve_model(config.model, vocab.size, data.perceptual_dim)
    wanted = abstract_state(model, config, mesh, frozen)
    learning_rate = make_learning_rate(config, mesh)
    load = open_executable(executable, program_facts(model, config, mesh, vocab, frozen), mesh) if executable else None

    if evaluate is None and config.eval_every_steps:
        if not config.data.evaluation:
            raise ValueError(
                f"config key 'eval_every_steps' is {config.eval_every_steps} but 'data.evaluation' names no data set; "
                "give {name: directory} of held-out pre-tokenized data, or set eval_every_steps=0"
            )
        evaluate = HeldOutLosses(config, model, vocab, mesh, frozen)

    is_main = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        if is_main:
            stack.enter_context(workdirs.locked(path))
        watchdog = stack.enter_context(
            Watchdog(path, config.watchdog_seconds, jax.process_index(), jax.process_count())
        )
        checkpointer = stack.enter_context(contextlib.closing(Checkpointer(path, config.checkpoint)))
        stack.enter_context(distributed.leaving_at_once())
        check = _identity_check(path, resolved, vocab, batches)
        restoring = time.monotonic()
        restored = checkpointer.restore_latest(wanted, check)
        start_facts: dict[str, float] = {}
        if restored:
            first_step, state, facts = restored
            num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            start_facts = {"restore_seconds": time.monotonic() - restoring, "restored_bytes": num_bytes}
            window = MetricsWindow.from_json(facts.metrics_window)
            log.info("going on after step %d of %d in %s", first_step, config.total_steps, path)
        else:
            first_step, window = 0, MetricsWindow()
            state = init_state(model, config, mesh, frozen)
            if config.init_from:
                _check_norms(config, model)
                state = _with_params_from(config.init_from, state, wanted, vocab)
        if is_main:
            # A start that ended before its first checkpoint has left nothing but this.
            this_start = time.time() - (time.monotonic() - started)
            window.goodput.first_start = min(window.goodput.first_start, workdirs.first_start(path, this_start))
            workdirs.write_text(path / workdirs.CONFIG_FILE, to_json(config))
            data.save_tokenizers(path / workdirs.TOKENIZERS)
        if first_step >= config.total_steps:
            log.info("nothing to do: %s is already at step %d of %d", path, first_step, config.total_steps)
            return TrainResult(path, first_step, False, state, model, vocab, mesh)

        kind = jax.devices()[0].device_kind
        log.info(
            "%s parameters on %d %s device(s), mesh %s", f"{num_parameters(model):,}", mesh.size, kind, dict(mesh.shape)
        )
        own: list[Hook] = []
        if is_main:
            own = [observe.MetricsFiles(path, first_step), observe.TensorBoard(path, first_step)]
            own += [observe.Progress()] if with_progress else []
        peak = peak_flops(kind)
        loop = TrainLoop(
            config=config,
            step=make_train_step(model, config, mesh, vocab, frozen),
            learning_rate=learning_rate,
            load=load,
            batches=batches,
            place=lambda batch: partitioning.put_batch(batch, mesh),
            checkpointer=checkpointer,
            facts=lambda position, sums: RunFacts(
                config=resolved,
                vocab_fingerprint=vocab.fingerprint,
                data_fingerprint=batches.fingerprint,
                data_position=position,
                metrics_window=sums,
            ),
            window=window,
            hooks=[*own, *hooks],
            evaluate=evaluate,
            flops=lambda tokens, pairs: train_flops(model, tokens, pairs),
            peak_flops=peak * mesh.size if peak else None,
            watchdog=watchdog,
            started=started,
            start_facts=start_facts,
            is_evaluated=not any_process(is_main and _lacks_evaluation(path, first_step, config.eval_every_steps)),
        )
        result = loop.run(state, first_step)
    if result.is_interrupted:
        log.info("stopped after step %d of %d; the same command goes on there", result.step, config.total_steps)
    else:
        log.info("done: step %d in %s", result.step, path)
    return TrainResult(path, result.step, result.is_interrupted, result.state, model, vocab, mesh)


def _lacks_evaluation(path: pathlib.Path, step: int, every: int) -> bool:
    """Whether a run goes on from a step that was to be evaluated, and was not, because it was asked to stop."""
    from aromni_jax.train import workdir as workdirs

    if not step or not every or step % every:
        return False
    return all(line["step"] != step for line in workdirs.read_json_lines(path / workdirs.EVALUATIONS_FILE))


def _identity_check(
    path: pathlib.Path, resolved: dict[str, Any], vocab: JointVocab, batches: Batches
) -> Callable[[Any], None]:
    """The check a checkpoint must pass before its arrays are read: same config, same vocabulary, data that goes on.

    It leaves `batches` where the checkpoint stood.
    """
    from aromni_jax.train.workdir import check_same_config

    def check(facts: Any) -> None:
        for line in check_same_config(_with_defaults(facts.config), resolved, path):
            log.info("changed since the last start: %s", line)
        vocab.check_fingerprint(facts.vocab_fingerprint, f"workdir {path}")
        batches.restore(facts.data_position)

    return check


def _with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """A config of an older version with the keys it could not have, each as it was before anyone could choose."""
    from aromni_jax.config import TrainConfig, from_mapping, to_json

    with contextlib.suppress(ValueError):
        saved = json.loads(to_json(from_mapping(TrainConfig, saved)))
    return saved


def _check_norms(config: TrainConfig, model: ModelConfig) -> None:
    """That `norm_blend_steps` has something to blend, and a word where weights meet norms in other places."""
    from aromni_jax.models.config import resolve_model
    from aromni_jax.train.saved import read_metadata

    _, facts = read_metadata(config.init_from)
    source = resolve_model(facts.config["model"], model.vocab_size, model.perceptual_dim).norm_position
    if config.norm_blend_steps and source != "pre":
        raise ValueError(
            f"norm_blend_steps = {config.norm_blend_steps} begins with a pre-norm model, but init_from="
            f"{config.init_from} has norm_position = {source!r}; set norm_blend_steps to 0"
        )
    if source != model.norm_position and not config.norm_blend_steps:
        remedy = "norm_blend_steps keeps it at first" if source == "pre" else "set model.norm_position to keep it"
        log.warning(
            "init_from has norm_position %r, this run %r: what those weights computed is lost (%s)",
            source,
            model.norm_position,
            remedy,
        )


def _with_params_from(source: str, state: TrainState, wanted: TrainState, vocab: JointVocab) -> TrainState:
    """`state` with the weights of another run's newest checkpoint; optimizer, step and data start anew.

    Values are cast only here, and said so; master weights and moving average begin with the values as they are stored.
    A perceptual head the source lacks stays as initialised.
    """
    import jax
    import jax.numpy as jnp

    from aromni_jax.train.leaves import named_leaves
    from aromni_jax.train.saved import SavedParams, load_whole

    target = named_leaves(wanted.params)

    def as_saved(params: SavedParams) -> dict[str, jax.ShapeDtypeStruct]:
        vocab.check_fingerprint(params.facts.vocab_fingerprint, f"init_from={source}")
        return {
            name: jax.ShapeDtypeStruct(leaf.shape, params.shapes.get(name, leaf).dtype, sharding=leaf.sharding)
            for name, leaf in target.items()
            if name in params.shapes or not name.startswith("perceptual_head/")
        }

    params, loaded = load_whole(source, as_saved)
    arrays = named_leaves(loaded)
    fresh = [name for name in target if name not in arrays]
    unused = [name for name in params.shapes if name not in target]
    log.info("weights from step %d of %s", params.step, source)
    cast = [name for name, array in arrays.items() if array.dtype != target[name].dtype]
    if cast:
        stored = arrays[cast[0]].dtype
        log.info("cast to %s: %d arrays that are stored as %s", target[cast[0]].dtype, len(cast), stored)
    if fresh:
        log.info("newly initialised, because %s has none: %s", source, ", ".join(fresh))
    if unused:
        log.info("left out, because this model has none: %s", ", ".join(unused))

    def filled(tree: Any, places: Any) -> Any:
        leaves = named_leaves(tree)
        for name, place in named_leaves(places).items():
            if name in arrays:
                # A copy, because donation forbids two leaves in one buffer.
                leaves[name] = jax.device_put(jnp.array(arrays[name], place.dtype, copy=True), place.sharding)
        return jax.tree.unflatten(jax.tree.structure(tree), list(leaves.values()))

    parts = ("params", "master", "ema")
    return dataclasses.replace(state, **{part: filled(getattr(state, part), getattr(wanted, part)) for part in parts})


if __name__ == "__main__":
    from launch.cli import run_module

    run_module(__file__)
