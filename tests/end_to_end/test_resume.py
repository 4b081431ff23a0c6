"""A run that is killed, stopped, damaged or moved to another mesh ends as if nothing had happened."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest
from runs import checkpoint_names, finish, lines, reproducible, run, start, when

from aromni_jax import partitioning
from aromni_jax.config import MeshConfig, TrainConfig, from_mapping
from aromni_jax.train import saved
from aromni_jax.train.checkpoint import Checkpointer
from aromni_jax.train.leaves import named_leaves
from aromni_jax.train.observe import Hook
from aromni_jax.train.state import abstract_state
from configs.pretrain import get_config
from launch.train import run_training
from launch.training_data import open_data

# Windows of three steps and checkpoints of five: most saves fall inside a window.
STEPS, SAVE, LOG = 30, 5, 3
OVERRIDES = (
    f"--config.total_steps={STEPS}",
    f"--config.checkpoint.save_every_steps={SAVE}",
    f"--config.log_every_steps={LOG}",
    "--config.checkpoint.keep_last=20",
    "--config.optimizer.ema_decay=0.9",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache) -> pathlib.Path:
    """An uninterrupted run. Copy it before changing it."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    run(workdir, cache, *OVERRIDES)
    return workdir


def assert_same_run(left: pathlib.Path, right: pathlib.Path) -> None:
    """Metrics bit-identical, and every array of the last checkpoint too: the checksums cover them all."""
    assert reproducible(left) == reproducible(right)
    last, expected = saved.open_saved(left), saved.open_saved(right)
    assert last.step == expected.step
    assert last.checksums == expected.checksums
    for name, leaf in named_leaves(saved.load_params(left)).items():
        np.testing.assert_array_equal(leaf, named_leaves(saved.load_params(right))[name])


@pytest.mark.slow
def test_kill_at_any_moment_then_the_same_command(whole, tmp_path, cache):
    """kill -9 before the first save, inside a save, after a save; then SIGTERM; then to the end."""
    workdir = tmp_path / "run"

    def is_saving() -> bool:
        return any("tmp" in name for name in checkpoint_names(workdir) - left_behind)

    before_first_save = lambda: len(lines_so_far(workdir)) >= 1  # noqa: E731
    after_a_save = lambda: "15" in checkpoint_names(workdir)  # noqa: E731
    num_inside = 0
    for moment in (before_first_save, is_saving, after_a_save, is_saving):
        left_behind = checkpoint_names(workdir)
        process = start(workdir, cache, *OVERRIDES)
        if when(process, moment):
            process.kill()
        finish(process, None)
        num_inside += any("tmp" in name for name in checkpoint_names(workdir))
    assert num_inside >= 1, "no kill fell inside a save"

    process = start(workdir, cache, *OVERRIDES)
    newest = lines_so_far(workdir)
    when(process, lambda: len(lines_so_far(workdir)) > len(newest))
    process.send_signal(signal.SIGTERM)
    finish(process)
    assert saved.available_steps(workdir)

    run(workdir, cache, *OVERRIDES)
    assert_same_run(workdir, whole)
    message = run(workdir, cache, *OVERRIDES)
    assert f"already at step {STEPS} of {STEPS}" in message
    assert_same_run(workdir, whole)


def lines_so_far(workdir: pathlib.Path) -> list[str]:
    path = workdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
def test_an_interrupt_saves_exits_0_and_the_run_goes_on(whole, tmp_path, cache):
    workdir = tmp_path / "run"
    process = start(workdir, cache, *OVERRIDES)
    assert when(process, lambda: len(lines_so_far(workdir)) >= 2)
    process.send_signal(signal.SIGINT)
    message = finish(process)
    stopped = saved.available_steps(workdir)[-1]
    assert f"stopped after step {stopped} of {STEPS}" in message
    run(workdir, cache, *OVERRIDES)
    assert_same_run(workdir, whole)


@pytest.mark.slow
def test_a_checkpoint_cut_short_gives_way_to_the_one_before(whole, tmp_path, cache):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    largest = max((workdir / "checkpoints" / str(STEPS)).rglob("*"), key=lambda f: f.is_file() and f.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    message = run(workdir, cache, *OVERRIDES)
    assert f"checkpoint {STEPS} is damaged" in message
    assert f"using checkpoint {STEPS - SAVE} instead of damaged {STEPS}" in message
    assert_same_run(workdir, whole)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.optimizer.learning_rte=1", "did you mean 'optimizer.learning_rate'"),
        ("--config.total_steps=many", "total_steps"),
        ("--config.optimizer.learning_rate=0.5", "optimizer.learning_rate: 0.003 in the workdir, 0.5 now"),
        ("--config.mesh.fsdp=3", "mesh"),
    ],
)
def test_a_wrong_config_is_one_clear_line(whole, cache, override, message):
    error = run(whole, cache, *OVERRIDES, override, expected=1)
    last = error.strip().splitlines()[-1]
    assert last.startswith("aromni train: error: ")
    assert message in last
    assert "Traceback" not in error


def test_a_workdir_that_cannot_be_written_is_one_clear_line(tmp_path, cache):
    (tmp_path / "file").write_text("")
    error = run(tmp_path / "file" / "run", cache, expected=1)
    assert "cannot be written" in error and "--workdir" in error
    assert "Traceback" not in error


def debug_config(**changes) -> TrainConfig:
    config = get_config("debug")
    config.update(
        {"total_steps": 6, "log_every_steps": 2, "sequence_length": 64, "mesh": {"data": 2, "fsdp": 4}} | changes
    )
    config.checkpoint.update(save_every_steps=3, keep_last=5)
    return from_mapping(TrainConfig, config)


class StopAfter(Hook):
    """Asks the run to stop as a cluster would."""

    def __init__(self, step: int):
        self._step = step

    def on_step(self, step, line):
        if step == self._step:
            os.kill(os.getpid(), signal.SIGTERM)


MESHES = {"2x4": (2, 4, 8), "8": (1, 8, 8), "1": (1, 1, 1)}


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory, compile_once):
    """A finished run on (data 2, fsdp 4) and one stopped in the middle, with the state it had then."""
    folder = tmp_path_factory.mktemp("mesh")
    finished = run_training(debug_config(), folder / "whole", with_progress=False)
    stopped = run_training(debug_config(), folder / "cut", [StopAfter(3)], with_progress=False)
    assert stopped.is_interrupted
    return finished, stopped


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_another_mesh_restores_the_same_arrays_and_draws_the_same_batches(on_eight, name):
    _, stopped = on_eight
    data, fsdp, num_devices = MESHES[name]
    config = dataclasses.replace(debug_config(), mesh=MeshConfig(data, fsdp, 1, 1))
    mesh = partitioning.make_mesh(config.mesh, jax.devices()[:num_devices])
    source = open_data(config, partitioning.local_rows(mesh, config.global_batch_size))
    checkpointer = Checkpointer(stopped.workdir, config.checkpoint)
    wanted = abstract_state(stopped.model, config, mesh, source.frozen)
    step, state, facts = checkpointer.restore_latest(wanted, lambda _: None)
    checkpointer.close()
    assert step == stopped.step
    for path, leaf in named_leaves(stopped.state).items():
        restored = named_leaves(state)[path]
        assert restored.sharding.mesh.size == num_devices
        np.testing.assert_array_equal(leaf, restored, err_msg=path)

    source.batches.restore(facts.data_position)
    reference = open_data(debug_config(), np.arange(config.global_batch_size)).batches
    for _ in range(step):
        next(reference)
    expected, found = next(reference), next(source.batches)
    for field in dataclasses.fields(expected):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [4, 8])
def test_a_run_goes_on_on_another_mesh(on_eight, tmp_path, fsdp):
    """On its own mesh bit by bit, on another one to float tolerance: sums are then added in another order."""
    finished, stopped = on_eight
    workdir = tmp_path / "run"
    shutil.copytree(stopped.workdir, workdir)
    mesh = {"data": 8 // fsdp, "fsdp": fsdp}
    result = run_training(debug_config(mesh=mesh), workdir, with_progress=False)
    assert result.step == 6
    if fsdp == 4:
        assert reproducible(workdir) == reproducible(finished.workdir)
    for line, expected in zip(lines(workdir), lines(finished.workdir), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["tokens_seen"] == expected["tokens_seen"]


def test_another_vocabulary_or_other_data_is_refused(on_eight, tmp_path, monkeypatch):
    _, stopped = on_eight
    workdir = tmp_path / "run"
    shutil.copytree(stopped.workdir, workdir)

    import launch.training_data as training_data
    from aromni_jax.vocab import JointVocab

    other = JointVocab.build(text_size=200, image_codes=64, tokens_per_image=16, speech_codes=(32,))
    with monkeypatch.context() as patch:
        patch.setattr(training_data, "_synthetic_vocab", lambda length: other)
        with pytest.raises(ValueError, match=f"was made with vocabulary .* this run uses {other.fingerprint}"):
            run_training(debug_config(), workdir, with_progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("data_pipelines.pipeline.BatchIterator.state", lambda self: {})
        patch.setattr("data_pipelines.synthetic.load_templates", lambda name: real("paper"))
        from aromni_jax.tokenizers.prompts import load_templates as real

        with pytest.raises(ValueError, match="was trained on rows of plan"):
            run_training(debug_config(), workdir, with_progress=False)


@pytest.mark.slow
def test_a_new_run_can_start_from_the_weights_of_another(on_eight, tmp_path):
    finished, _ = on_eight
    optimizer = {"learning_rate": 0.0, "warmup_steps": 0}
    changes = {"init_from": str(finished.workdir), "total_steps": 1, "optimizer": optimizer}
    result = run_training(debug_config(**changes), tmp_path / "run", with_progress=False)
    for path, leaf in named_leaves(finished.state.params).items():
        np.testing.assert_array_equal(leaf, named_leaves(result.state.params)[path], err_msg=path)
    assert result.step == 1


@pytest.mark.slow
def test_a_new_run_starts_from_the_newest_whole_weights(on_eight, tmp_path, caplog):
    """The other run's last checkpoint is damaged: the one before it is taken, and named."""
    source = tmp_path / "source"
    shutil.copytree(on_eight[0].workdir, source)
    before, newest = saved.available_steps(source)[-2:]
    for file in (source / "checkpoints" / str(newest) / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 4096:
            file.write_bytes(file.read_bytes()[:-2048])
    changes = {"init_from": str(source), "total_steps": 1, "optimizer": {"learning_rate": 0.0, "warmup_steps": 0}}
    result = run_training(debug_config(**changes), tmp_path / "run", with_progress=False)
    expected = named_leaves(saved.load_params(source, before))
    for path, leaf in named_leaves(result.state.params).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    assert f"using checkpoint {before} instead of damaged {newest}" in caplog.text


@pytest.mark.slow
def test_rounded_weights_that_start_from_exact_ones_keep_them_as_their_master(on_eight, tmp_path):
    finished, _ = on_eight
    optimizer = {"learning_rate": 0.0, "warmup_steps": 0, "ema_decay": 0.5, "offload": True}
    changes = {"init_from": str(finished.workdir), "total_steps": 1, "optimizer": optimizer}
    model = {"size": "debug", "param_dtype": "bfloat16"}
    config = dataclasses.replace(debug_config(**changes), model=model)
    state = run_training(config, tmp_path / "run", with_progress=False).state
    for path, leaf in named_leaves(finished.state.params).items():
        np.testing.assert_array_equal(leaf, named_leaves(state.master)[path], err_msg=path)
        np.testing.assert_array_equal(leaf, named_leaves(state.ema)[path], err_msg=path)
        np.testing.assert_array_equal(leaf.astype("bfloat16"), named_leaves(state.params)[path], err_msg=path)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.ema)} == {"pinned_host"}
