"""Checkpoints: exact on any mesh, nothing cast or guessed, damaged ones noticed and passed over, read in parts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import pathlib
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from aromni_jax.config import CheckpointConfig
from aromni_jax.train import checkpoint, pieces, saved
from aromni_jax.train import workdir as workdirs
from aromni_jax.train.checkpoint import Checkpointer
from aromni_jax.train.leaves import checksums, named_leaves, nested
from aromni_jax.train.saved_step import DamagedCheckpoint, RunFacts, SavedStep, describe_differences

ASYNC = CheckpointConfig(save_every_steps=1, keep_last=3, keep_every_steps=0, asynchronous=True)


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    axes = ("data", "fsdp")[-len(shape) :]
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, axes, devices=devices, axis_types=(AxisType.Auto,) * len(shape))


def state_on(mesh: jax.sharding.Mesh, seed: int = 0) -> dict:
    """A state with what real ones have: stacked layers, named tuples, bfloat16, scalars, keys, and empty parts."""
    rng = np.random.default_rng(seed)
    split, whole = NamedSharding(mesh, PartitionSpec(None, "fsdp")), NamedSharding(mesh, PartitionSpec())
    params = {
        "layers": {"q": jax.device_put(rng.normal(size=(3, 64, 40)).astype(np.float32), split)},
        "norm": jax.device_put(rng.normal(size=(7,)).astype(jnp.bfloat16), whole),
    }
    moments = optax.ScaleByAdamState(jax.device_put(jnp.int32(4), whole), jax.tree.map(jnp.square, params), params)
    key = jax.device_put(jax.random.key_data(jax.random.key(seed)), whole)
    return {"step": jax.device_put(jnp.int32(seed), whole), "params": params, "opt": moments, "ema": {}, "rng": key}


def abstract(state: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def facts(step: int = 0, **changes) -> RunFacts:
    made = RunFacts({"seed": 0}, "vocab", "data", {"next_step": step}, {"sums": {"x": [0.1, 1e300]}})
    return dataclasses.replace(made, **changes)


def accept(_: RunFacts) -> None:
    return None


def save_steps(workdir, steps, mesh, config=ASYNC) -> None:
    checkpointer = Checkpointer(workdir, config)
    for step in steps:
        checkpointer.save(step, state_on(mesh, step), facts(step))
    checkpointer.close()


def assert_equal(left, right) -> None:
    for name, leaf in named_leaves(left).items():
        other = named_leaves(right)[name]
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other), err_msg=name)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A workdir with steps 1 and 2, saved on (data 2, fsdp 4). Copy it before changing it."""
    workdir = tmp_path_factory.mktemp("two_steps")
    save_steps(workdir, [1, 2], mesh_of(2, 4))
    return workdir


@pytest.mark.parametrize("shape", [(2, 4), (8,), (1,)])
def test_restores_exactly_on_any_mesh(two_steps, shape):
    checkpointer = Checkpointer(two_steps, ASYNC)
    mesh = mesh_of(*shape)
    step, state, found = checkpointer.restore_latest(abstract(state_on(mesh)), accept)
    checkpointer.close()
    assert step == 2
    assert found == facts(2)
    assert_equal(state, state_on(mesh, 2))
    assert state["params"]["layers"]["q"].sharding.mesh == mesh
    assert isinstance(state["opt"], optax.ScaleByAdamState)


def test_fresh_workdir_has_nothing(tmp_path):
    checkpointer = Checkpointer(tmp_path, ASYNC)
    assert checkpointer.restore_latest(abstract(state_on(mesh_of(1))), accept) is None
    checkpointer.close()


@pytest.mark.parametrize("has_room", [True, False])
def test_save_survives_donation_of_the_state(tmp_path, has_room):
    """The next step overwrites the very buffers an asynchronous save is writing."""
    state = {"params": {"w": jnp.arange(1 << 20, dtype=jnp.float32)}}
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    checkpointer = Checkpointer(tmp_path, ASYNC)
    checkpointer.prepare(state, has_room)
    snapshot = checkpointer.snapshot(state)
    assert (snapshot.named["params/w"].sharding.memory_kind == "pinned_host") == (not has_room)
    state = overwrite(state)
    checkpointer.write(1, snapshot, facts())
    for _ in range(5):
        state = overwrite(state)
    checkpointer.close()
    params = saved.load_params(tmp_path)
    np.testing.assert_array_equal(params["w"], np.arange(1 << 20, dtype=np.float32))


def test_writes_in_pieces_and_rests_between_them_until_somebody_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "piece_bytes", {"cpu": 5 << 20}.get)
    monkeypatch.setattr(pieces, "_REST", 1e6)
    state = {name: jnp.full((1 << 20,), number, jnp.float32) for number, name in enumerate("abcd")}
    checkpointer = Checkpointer(tmp_path, ASYNC)
    checkpointer.save(1, state, facts(1))
    unfinished = tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp"
    deadline = time.monotonic() + 30
    while not list(unfinished.rglob("d/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    assert len(list(unfinished.rglob("d/*"))) == 1
    checkpointer.wait()
    assert len(list((tmp_path / "checkpoints" / "1").rglob("ocdbt.process_0/d/*"))) >= len(state)
    assert checkpointer.restore_latest(abstract(state), accept)[0] == 1
    checkpointer.close()


def test_beside_an_accelerator_pieces_follow_each_other_without_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(checkpoint, "piece_bytes", {"gpu": 5 << 20}.get)
    monkeypatch.setattr(pieces, "_REST", 1e6)
    ended: list[object] = []
    written = pieces.Pieces.on_write_end

    def on_write_end(self: pieces.Pieces, keypath: object) -> None:
        if self._begin is not None:
            ended.append(keypath)
        written(self, keypath)

    monkeypatch.setattr(pieces.Pieces, "on_write_end", on_write_end)
    state = {name: jnp.full((1 << 20,), number, jnp.float32) for number, name in enumerate("abcd")}
    with contextlib.closing(Checkpointer(tmp_path, ASYNC)) as checkpointer:
        checkpointer.save(1, state, facts(1))
        # Nobody hurries it.
        deadline = time.monotonic() + 30
        while 1 not in checkpointer.steps() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert checkpointer.restore_latest(abstract(state), accept)[0] == 1
    assert len(ended) == len(state)


def test_rests_within_pieces_and_never_in_the_thread_of_the_loop(tmp_path, monkeypatch):
    """With rests without end every small part of the work is one; only whoever trains goes on at once."""
    monkeypatch.setattr(pieces, "_WORK_SECONDS", -1.0)
    rested = []
    monkeypatch.setattr(pieces.Pieces, "rest", lambda self, *seconds: rested.append((threading.get_ident(), seconds)))
    with contextlib.closing(Checkpointer(tmp_path, ASYNC)) as saver:
        state = state_on(mesh_of(1, 1))
        saver.save(1, state, facts())
        # Nobody hurries it meanwhile.
        deadline = time.monotonic() + 30
        while 1 not in saver.steps() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.get_ident() not in {thread for thread, _ in rested}
        # One rest at least before each array is written in its task, one after each piece.
        assert sum(not seconds for _, seconds in rested) > len(named_leaves(state))
        assert any(seconds for _, seconds in rested)
        found = saver.restore_latest(abstract(state), lambda _: None)
    assert found is not None
    jax.tree.map(np.testing.assert_array_equal, found[1], state)


def test_rests_end_before_the_next_save_is_due(monkeypatch):
    clock, waited = [100.0], []
    monkeypatch.setattr(pieces.time, "monotonic", lambda: clock[0])
    resting = pieces.Pieces()
    monkeypatch.setattr(resting._hurry, "wait", waited.append)

    def rest_at(seconds: float) -> None:
        clock[0] = seconds
        thread = threading.Thread(target=resting.rest, args=(6.0,))
        thread.start()
        thread.join()

    resting.start(pathlib.Path(), is_awaited=False)
    rest_at(105.0)
    clock[0] = 110.0
    resting.start(pathlib.Path(), is_awaited=False)
    rest_at(111.0)
    rest_at(115.0)
    rest_at(118.0)
    resting.rest(6.0)
    assert waited == [6.0, 6.0, 2.5, 0.0]


def test_runs_of_one_process_save_at_the_same_time(tmp_path):
    """Orbax numbers saves by process, not by run (seen: waits for ever, folders made twice)."""
    runs = [tmp_path / name for name in "abc"]
    with contextlib.ExitStack() as stack:
        savers = [stack.enter_context(contextlib.closing(Checkpointer(run, ASYNC))) for run in runs]
        for step in range(1, 6):
            for saver in savers:
                saver.save(step, state_on(mesh_of(1), step), facts(step))
        for saver in savers:
            saver.wait()
            step, restored, _ = saver.restore_latest(abstract(state_on(mesh_of(1))), accept)
            assert step == 5
            assert_equal(restored, state_on(mesh_of(1), 5))


def test_keeps_the_newest_and_every_nth(tmp_path):
    config = CheckpointConfig(save_every_steps=1, keep_last=2, keep_every_steps=3, asynchronous=False)
    save_steps(tmp_path, range(1, 9), mesh_of(1), config)
    assert saved.available_steps(tmp_path) == [3, 6, 7, 8]


def test_refuses_what_does_not_fit_and_names_it(two_steps):
    checkpointer = Checkpointer(two_steps, ASYNC)
    wanted = abstract(state_on(mesh_of(1)))
    sharding = wanted["params"]["norm"].sharding
    wanted["params"]["layers"]["k"] = wanted["params"]["layers"].pop("q")
    wanted["params"]["norm"] = jax.ShapeDtypeStruct((7,), jnp.float32, sharding=sharding)
    wanted["rng"] = jax.ShapeDtypeStruct((4,), jnp.uint32, sharding=sharding)
    with pytest.raises(ValueError) as error:
        checkpointer.restore_latest(wanted, accept)
    checkpointer.close()
    message = str(error.value)
    assert "params/layers/q is saved but not expected" in message
    assert "params/layers/k is expected but not saved" in message
    assert "params/norm has dtype bfloat16, expected float32" in message
    assert "rng has shape (2,), expected (4,)" in message


def test_a_refused_run_is_not_a_damaged_one(two_steps):
    def refuse(found: RunFacts) -> None:
        raise ValueError(f"not mine: {found.vocab_fingerprint}")

    checkpointer = Checkpointer(two_steps, ASYNC)
    with pytest.raises(ValueError, match="not mine: vocab"):
        checkpointer.restore_latest(abstract(state_on(mesh_of(1))), refuse)
    checkpointer.close()
    assert saved.available_steps(two_steps) == [1, 2]


def _largest_file(folder):
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def _cut(folder) -> None:
    file = _largest_file(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip_a_bit(folder) -> None:
    file = _largest_file(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))


DAMAGES = {
    "array file cut short": _cut,
    "array file flipped": _flip_a_bit,
    "array file gone": lambda folder: _largest_file(folder).unlink(),
    "arrays gone": lambda folder: shutil.rmtree(folder / "state"),
    "manifest empty": lambda folder: (folder / "state" / "manifest.ocdbt").write_bytes(b""),
    "tree cut short": lambda folder: (folder / "state" / "_METADATA").write_text('{"tree'),
    "facts gone": lambda folder: (folder / "_CHECKPOINT_METADATA").unlink(),
    "facts cut short": lambda folder: (folder / "_CHECKPOINT_METADATA").write_text('{"item_h'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_says_so(two_steps, tmp_path, damage, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    DAMAGES[damage](workdir / "checkpoints" / "2")
    checkpointer = Checkpointer(workdir, ASYNC)
    mesh = mesh_of(8)
    with caplog.at_level(logging.ERROR):
        step, state, found = checkpointer.restore_latest(abstract(state_on(mesh)), accept)
    assert step == 1
    assert found == facts(1)
    assert_equal(state, state_on(mesh, 1))
    assert "checkpoint 2 is damaged" in caplog.text
    assert "using checkpoint 1 instead of damaged 2" in caplog.text
    checkpointer.save(2, state_on(mesh, 2), facts(2))
    checkpointer.close()
    assert saved.available_steps(workdir) == [1, 2]
    assert (workdir / "checkpoints" / "2.damaged").is_dir()


def test_nothing_readable_is_an_error(two_steps, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    for step in ("1", "2"):
        _cut(workdir / "checkpoints" / step)
    checkpointer = Checkpointer(workdir, ASYNC)
    with pytest.raises(ValueError, match="no checkpoint below .* can be read"):
        checkpointer.restore_latest(abstract(state_on(mesh_of(1))), accept)
    checkpointer.close()
    with pytest.raises(ValueError, match="no checkpoint below .* can be read"):
        saved.load_params(workdir)


def test_what_a_killed_save_left_behind_is_not_a_checkpoint(two_steps, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    folder = workdir / "checkpoints"
    shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp")
    assert saved.available_steps(workdir) == [1, 2]
    save_steps(workdir, [3], mesh_of(1))
    assert sorted(entry.name for entry in folder.iterdir()) == ["1", "2", "3"]


def test_checksums_see_every_change_and_no_mesh(two_steps):
    split, whole = state_on(mesh_of(2, 4), 5), state_on(mesh_of(1), 5)
    reference = checksums(named_leaves(whole))
    assert checksums(named_leaves(split)) == reference
    array = np.asarray(whole["params"]["layers"]["q"])
    # Old checkpoints hold these numbers: the formula must not change.
    layer, row, column = np.indices(array.shape, np.uint32)
    place = (layer * np.uint32(2654435761) + row) * np.uint32(2654435761) + column
    expected = np.sum(array.view(np.uint32) * (2 * place + 1), dtype=np.uint32)
    assert reference["params/layers/q"] == expected
    assert checksums({"q": jnp.asarray(array)})["q"] == reference["params/layers/q"]
    swapped = array.copy()
    swapped[0, 0, [0, 1]] = swapped[0, 0, [1, 0]]
    flipped = array.copy()
    flipped[2, 3, 1] *= -1
    for changed in (swapped, flipped, array.astype(np.float32) + np.float32(1e-7)):
        assert checksums({"q": jnp.asarray(changed)})["q"] != reference["params/layers/q"]


def test_weights_can_be_read_one_array_and_one_layer_at_a_time(two_steps):
    params = saved.open_for_export(two_steps)
    expected = state_on(mesh_of(1), 2)["params"]
    assert params.step == 2
    assert params.shapes["layers/q"].shape == (3, 64, 40)
    assert params.shapes["norm"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params.read("layers/q", layer=1), expected["layers"]["q"][1])
    np.testing.assert_array_equal(params.read("norm"), expected["norm"])
    with pytest.raises(ValueError, match="no parameter 'layers/v'"):
        params.read("layers/v")
    with pytest.raises(ValueError, match="holds no ema"):
        saved.open_for_export(two_steps, ema=True)
    with pytest.raises(ValueError, match="no checkpoint of step 7 .* there are 1, 2"):
        saved.open_for_export(two_steps, step=7)
    assert_equal(saved.load_params(two_steps, step=1), state_on(mesh_of(1), 1)["params"])
    assert saved.read_metadata(two_steps) == (2, facts(2))


def test_a_layer_is_a_chunk_of_its_own(tmp_path):
    """Otherwise reading one layer of a large model would read all of them."""
    save_steps(tmp_path, [1], mesh_of(1))
    import tensorstore

    path = tmp_path / "checkpoints" / "1" / "state"
    kvstore = {"driver": "ocdbt", "base": f"file://{path}/", "path": "params.layers.q/"}
    store = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
    assert store.chunk_layout.read_chunk.shape == (1, 64, 40)


def test_damage_is_named_by_its_cause(two_steps, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    _cut(workdir / "checkpoints" / "2")
    found = SavedStep.open(workdir / "checkpoints", 2)
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in named_leaves(state_on(mesh_of(1))).items()
    }
    with pytest.raises(DamagedCheckpoint) as error:
        found.restore(wanted)
    assert "handler" not in str(error.value)


def test_names_of_leaves_do_not_depend_on_containers():
    tree = {"a": optax.ScaleByAdamState(jnp.int32(1), {"w": jnp.zeros(2)}, [jnp.ones(3), None])}
    names = named_leaves(tree)
    assert list(names) == ["a/count", "a/mu/w", "a/nu/0"]
    assert list(named_leaves(nested(names))) == list(names)
    assert describe_differences(names, names) == ""


@pytest.mark.parametrize("where", ["below a file", "read-only system"])
def test_workdir_that_cannot_be_written(tmp_path, where):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "run" if where == "below a file" else "/proc/aromni/run"
    with pytest.raises(ValueError, match="cannot be written: .*--workdir"):
        workdirs.prepare(path)


def test_config_differences_that_matter_are_refused_together(tmp_path):
    old = {"seed": 0, "total_steps": 10, "mesh": {"fsdp": 8}, "optimizer": {"learning_rate": 1e-3}, "model": "debug"}
    new = {"seed": 1, "total_steps": 20, "mesh": {"fsdp": 4}, "optimizer": {"learning_rate": 1e-4}, "model": "debug"}
    with pytest.raises(ValueError) as error:
        workdirs.check_same_config(old, new, tmp_path)
    assert "seed: 0 in the workdir, 1 now" in str(error.value)
    assert "optimizer.learning_rate: 0.001 in the workdir, 0.0001 now" in str(error.value)
    assert "total_steps" not in str(error.value)
    allowed = workdirs.check_same_config(old, new | {"seed": 0, "optimizer": {"learning_rate": 1e-3}}, tmp_path)
    assert allowed == ["mesh.fsdp: 8 in the workdir, 4 now", "total_steps: 10 in the workdir, 20 now"]
    assert workdirs.check_same_config(old, json.loads(json.dumps(old)), tmp_path) == []


def test_a_model_is_the_same_however_it_is_named(tmp_path):
    """Configs name a size; changing how it is computed makes a group of fields of it, and may go on."""
    allowed = workdirs.check_same_config({"model": "debug"}, {"model": {"size": "debug", "remat": "full"}}, tmp_path)
    assert allowed == ['model.remat: "none" in the workdir, "full" now']
    assert workdirs.check_same_config({"model": "debug"}, {"model": {"size": "debug", "num_layers": 2}}, tmp_path) == []
    with pytest.raises(ValueError, match="model.num_layers: 2 in the workdir, 3 now"):
        workdirs.check_same_config({"model": "debug"}, {"model": {"size": "debug", "num_layers": 3}}, tmp_path)


def test_json_lines_are_cut_to_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert workdirs.truncate_json_lines(path, 2) == 1
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert workdirs.truncate_json_lines(path, 2) == 0
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        workdirs.read_json_lines(path)


def test_two_runs_never_share_a_workdir(tmp_path):
    with workdirs.locked(tmp_path):
        with pytest.raises(ValueError, match="another process is training"), workdirs.locked(tmp_path):
            pass
    with workdirs.locked(tmp_path):
        pass
