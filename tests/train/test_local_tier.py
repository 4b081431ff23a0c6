"""The second tier: newer local files are used, and anything odd about them gives way to the shared checkpoint."""

from __future__ import annotations

import dataclasses
import logging
import shutil

import jax
import pytest
from test_checkpoint import ASYNC, abstract, accept, assert_equal, facts, mesh_of, state_on

from aromni_jax.config import CheckpointConfig
from aromni_jax.train.checkpoint import Checkpointer


def config_of(local) -> CheckpointConfig:
    return dataclasses.replace(ASYNC, local_directory=str(local), local_every_steps=1)


def files_of(local):
    return sorted(path.name for path in local.rglob("*") if path.is_file())


@pytest.fixture
def run(tmp_path):
    """A workdir with the shared step 1 and local steps 1 to 4, on (data 2, fsdp 4): bfloat16, scalars and replicas."""
    workdir, local = tmp_path / "run", tmp_path / "local"
    workdir.mkdir()
    checkpointer = Checkpointer(workdir, config_of(local))
    mesh = mesh_of(2, 4)
    for step in (1, 2, 3, 4):
        snapshot = checkpointer.snapshot(state_on(mesh, step))
        checkpointer.write(step, snapshot, facts(step), is_shared=step == 1, is_local=True)
    checkpointer.close()
    return workdir, local


def restored(workdir, local, mesh, check=accept):
    checkpointer = Checkpointer(workdir, config_of(local))
    found = checkpointer.restore_latest(abstract(state_on(mesh)), check)
    checkpointer.close()
    return found


def test_the_newest_two_are_kept_and_the_newest_is_restored_exactly(run):
    workdir, local = run
    assert files_of(local) == ["3.safetensors", "4.safetensors"]
    mesh = mesh_of(2, 4)
    step, state, found = restored(workdir, local, mesh)
    assert (step, found) == (4, facts(4))
    assert_equal(state, state_on(mesh, 4))
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(state_on(mesh, 4))):
        assert leaf.sharding == expected.sharding


def test_another_mesh_takes_the_shared_one_and_forgets_what_came_after(run):
    workdir, local = run
    mesh = mesh_of(8)
    step, state, _ = restored(workdir, local, mesh)
    assert step == 1
    assert_equal(state, state_on(mesh, 1))
    assert files_of(local) == []


def test_a_newer_shared_one_is_taken(run):
    workdir, local = run
    checkpointer = Checkpointer(workdir, config_of(local))
    checkpointer.save(4, state_on(mesh_of(2, 4), 9), facts(9))
    checkpointer.close()
    step, _, found = restored(workdir, local, mesh_of(2, 4))
    assert (step, found) == (4, facts(9))


def _cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[-2000] ^= 4
    path.write_bytes(bytes(content))


def _without_description(path) -> None:
    import safetensors.numpy

    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path)


def _delete(path) -> None:
    path.unlink()


@pytest.mark.parametrize(("damage", "step"), [(_cut, 3), (_flip, 1), (_without_description, 3), (_delete, 3)])
def test_damage_gives_way_and_is_logged(run, caplog, damage, step):
    """What can be seen before reading leaves the step before; what only checksums see, the shared one."""
    workdir, local = run
    (newest,) = local.rglob("4.safetensors")
    damage(newest)
    mesh = mesh_of(2, 4)
    with caplog.at_level(logging.ERROR):
        found_step, state, _ = restored(workdir, local, mesh)
    assert found_step == step
    assert_equal(state, state_on(mesh, step))
    assert not newest.exists()
    assert ("local checkpoint 4 is damaged" in caplog.text) == (damage is not _delete)


def test_a_new_run_in_a_folder_of_the_same_name_is_not_the_old_one(run):
    workdir, local = run
    shutil.rmtree(workdir)
    workdir.mkdir()
    assert restored(workdir, local, mesh_of(2, 4)) is None


def test_a_refused_run_is_an_error(run):
    def refuse(found) -> None:
        raise ValueError(f"not mine: {found.data_position}")

    with pytest.raises(ValueError, match="not mine: {'next_step': 4}"):
        restored(*run, mesh_of(2, 4), refuse)


def test_a_disk_that_fails_costs_the_tier_and_not_the_run(run, caplog):
    workdir, local = run
    checkpointer = Checkpointer(workdir, config_of(local))
    shutil.rmtree(local)
    with caplog.at_level(logging.ERROR):
        snapshot = checkpointer.snapshot(state_on(mesh_of(2, 4), 5))
        checkpointer.write(5, snapshot, facts(5), is_local=True)
        checkpointer.close()
    assert "local checkpoint of step 5 not written" in caplog.text
    assert checkpointer.steps() == [1, 5]


def test_half_a_setting_is_refused():
    with pytest.raises(ValueError, match="checkpoint.local_every_steps.*set both"):
        CheckpointConfig(1, 1, 0, True, local_directory="/tmp/x")
    with pytest.raises(ValueError, match="checkpoint.local_every_steps"):
        CheckpointConfig(1, 1, 0, True, local_every_steps=3)
