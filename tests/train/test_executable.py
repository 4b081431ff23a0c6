"""A train step from a file: the same numbers as compiled, and refused where it does not belong."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import VOCAB, frozen, model_config, random_batch, train_config

from aromni_jax import partitioning
from aromni_jax.config import LossConfig, MeshConfig
from aromni_jax.train import executable, toolchain
from aromni_jax.train.state import init_state
from aromni_jax.train.step import abstract_inputs, make_learning_rate, make_train_step
from aromni_jax.vocab import JointVocab

MESH = MeshConfig(1, -1, 1, 1)
RATES = (1e-2, 3e-3, 0.5)


class Saved:
    """A step compiled for `num_devices`, and its file."""

    def __init__(self, folder, num_devices):
        self.train, self.model = train_config(mesh=MESH), model_config()
        # Not in the order of their ids, as the devices of a pod.
        self.mesh = partitioning.make_mesh(MESH, jax.devices()[:num_devices][::-1])
        step = make_train_step(self.model, self.train, self.mesh, VOCAB, frozen())
        with executable.compiled_anew():
            self.compiled = step.lower(*abstract_inputs(self.model, self.train, self.mesh, frozen())).compile()
        self.file = folder / "step.bin"
        self.num_bytes = executable.save(self.file, self.compiled, self.facts())

    def facts(self, mesh=None, vocab=VOCAB, frozen_arrays=None, model=None, **changes):
        train = dataclasses.replace(self.train, **changes)
        arrays = frozen() if frozen_arrays is None else frozen_arrays
        return executable.program_facts(model or self.model, train, mesh or self.mesh, vocab, arrays)

    def run(self, step):
        state, history = init_state(self.model, self.train, self.mesh, frozen()), []
        for seed, rate in enumerate(RATES):
            batch = partitioning.put_batch(random_batch(seed), self.mesh)
            state, metrics = step(state, batch, jnp.float32(rate))
            history.append(jax.device_get(metrics))
        return jax.device_get(state), history


@pytest.fixture(scope="module", params=[1, 8])
def saved(request, tmp_path_factory):
    return Saved(tmp_path_factory.mktemp("executable"), request.param)


@pytest.fixture(scope="module")
def saved_for_one(tmp_path_factory):
    return Saved(tmp_path_factory.mktemp("executable"), 1)


def test_the_loaded_step_is_the_compiled_one_to_the_last_bit(saved):
    assert saved.file.stat().st_size == saved.num_bytes and len(list(saved.file.parent.iterdir())) == 1
    loaded = executable.open_executable(saved.file, saved.facts(), saved.mesh)()
    expected, have = saved.run(saved.compiled), saved.run(loaded)
    jax.tree.map(np.testing.assert_array_equal, expected, have)
    assert [metrics["learning_rate"] for metrics in have[1]] == [np.float32(rate) for rate in RATES]


def test_one_file_serves_every_schedule_and_weighting(saved_for_one):
    one = saved_for_one
    optimizer = dataclasses.replace(
        one.train.optimizer,
        learning_rate=1.0,
        schedule="wsd",
        warmup_steps=7,
        decay_steps=5,
        final_learning_rate_fraction=0.5,
    )
    weights = {"caption": {"text": 3.0}}
    loss = dataclasses.replace(one.train.loss, weighting="sft", task_modality_weights=weights, transcript_weight=0.5)
    named = dataclasses.replace(VOCAB, tokenizer_fingerprints=(("image", "another"),))
    assert one.facts() == one.facts(optimizer=optimizer, loss=loss, total_steps=7, seed=5, vocab=named)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"global_batch_size": 16}, "global_batch_size: 8 in the file, 16 here"),
        ({"sequence_length": 64}, "sequence_length: 32 in the file, 64 here"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 1 in the file, 2 here"),
        ({"loss": LossConfig("uniform", 1.0, "predict", 1e-4, 16)}, "loss.chunk_tokens: 32 in the file, 16 here"),
        (
            {"model": model_config(num_layers=3, mlp_dim=96)},
            "model.mlp_dim: 128 in the file, 96 here; model.num_layers",
        ),
        ({"vocab": JointVocab.build(text_size=99)}, "vocabulary: "),
        ({"frozen_arrays": {}}, r'frozen: {"image_codebook": \["float32", \[32, 16\]\]} in the file, {} here'),
    ],
)
def test_another_step_is_refused_with_every_difference(saved_for_one, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        executable.open_executable(saved_for_one.file, saved_for_one.facts(**changes), saved_for_one.mesh)
    assert "make it again with `aromni plan --executable=FILE`, or leave --executable out" in str(error.value)


@pytest.mark.parametrize(
    "name, value", [("ema_decay", 0.5), ("b2", 0.9), ("name", "lion"), ("moment_dtype", "bfloat16")]
)
def test_another_optimizer_is_refused(saved_for_one, name, value):
    optimizer = dataclasses.replace(saved_for_one.train.optimizer, **{name: value})
    with pytest.raises(ValueError, match=f"optimizer.{name}: "):
        executable.open_executable(saved_for_one.file, saved_for_one.facts(optimizer=optimizer), saved_for_one.mesh)


def test_other_versions_sources_and_meshes_are_refused(saved_for_one, monkeypatch):
    one = saved_for_one
    two = partitioning.make_mesh(MESH, jax.devices()[:2])
    with pytest.raises(ValueError, match=r"device_ids: \[0\] in the file, \[0, 1\] here; mesh.fsdp: 1 .*, 2 here"):
        executable.open_executable(one.file, one.facts(mesh=two), two)
    monkeypatch.setattr(toolchain, "versions", lambda: {"jax": "0.0.1", "jaxlib": "0.0.2", "libtpu": "absent"})
    monkeypatch.setattr(toolchain, "source_hash", lambda: "other source")
    message = 'jax: .* in the file, "0.0.1" here; jaxlib: .* "0.0.2" here; source: .* "other source" here'
    with pytest.raises(ValueError, match=message):
        executable.open_executable(one.file, one.facts(), one.mesh)


def test_damaged_and_foreign_files_are_refused(saved_for_one, tmp_path):
    one, file = saved_for_one, tmp_path / "step.bin"
    whole = one.file.read_bytes()

    def load(content):
        file.write_bytes(content)
        return executable.open_executable(file, one.facts(), one.mesh)()

    with pytest.raises(ValueError, match="step.bin is damaged"):
        load(whole[:-1000])
    with pytest.raises(ValueError, match="step.bin is damaged"):
        load(whole[:-1] + bytes([whole[-1] ^ 1]))
    for content in (b"", b"\x80\x04 a pickle", b"[]\n", whole[:100], b'{"format": "another"}\n'):
        with pytest.raises(ValueError, match="step.bin is no saved executable"):
            load(content)
    with pytest.raises(ValueError, match="absent.bin cannot be read: No such file"):
        executable.open_executable(tmp_path / "absent.bin", one.facts(), one.mesh)


def test_bytes_that_jax_cannot_load_are_an_error_that_says_so(saved_for_one, tmp_path, monkeypatch):
    one, file = saved_for_one, tmp_path / "step.bin"
    monkeypatch.setattr(executable.serialize_executable, "serialize", lambda compiled: (b"nothing", None, None))
    executable.save(file, one.compiled, one.facts())
    with pytest.raises(ValueError, match="step.bin does not load on these devices"):
        executable.open_executable(file, one.facts(), one.mesh)()


def test_what_cannot_be_saved_leaves_no_file(saved_for_one, tmp_path, monkeypatch):
    one = saved_for_one
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written to .*; give another file"):
        executable.save(tmp_path / "file" / "step.bin", one.compiled, one.facts())

    def refuse(compiled):
        raise ValueError("Compilation does not support serialization")

    monkeypatch.setattr(executable.serialize_executable, "serialize", refuse)
    with pytest.raises(ValueError, match=r"cannot be saved .*does not support serialization"):
        executable.save(tmp_path / "new" / "step.bin", one.compiled, one.facts())
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_the_header_is_one_line_of_json(saved_for_one):
    with saved_for_one.file.open("rb") as stream:
        header = json.loads(stream.readline())
    assert header["facts"] == saved_for_one.facts() and header["facts"]["jax"] == jax.__version__


def test_compiled_anew_keeps_out_of_the_cache_and_gives_it_back(tmp_path, monkeypatch):
    before = {
        name: getattr(jax.config, name)
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        with executable.compiled_anew():
            jax.jit(lambda x: jnp.sin(x) + 1).lower(1.0).compile()
            assert not list(tmp_path.iterdir())
        jax.jit(lambda x: jnp.sin(x) + 2).lower(1.0).compile()
        assert list(tmp_path.iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        executable.compilation_cache.reset_cache()


def test_rates_are_those_of_the_schedule_on_every_device():
    train = train_config(
        mesh=MESH, optimizer=dataclasses.replace(train_config().optimizer, schedule="cosine", warmup_steps=3)
    )
    rate = make_learning_rate(train, partitioning.make_mesh(MESH))
    assert rate(0).dtype == jnp.float32 and len(rate(0).sharding.device_set) == 8
    # Three steps of warm-up to the peak, which decays after them.
    assert float(rate(0)) == pytest.approx(1e-2 / 3, rel=1e-2)
    assert float(rate(2)) == pytest.approx(1e-2, rel=1e-2) and float(rate(50)) <= float(rate(2))
    with pytest.raises(ValueError, match="warmup_steps = 3"):
        make_learning_rate(dataclasses.replace(train, total_steps=2), partitioning.make_mesh(MESH))
