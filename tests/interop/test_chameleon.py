"""Chameleon directories: written whole, read back exactly, refused by name when something is wrong."""

from __future__ import annotations

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from aromni_jax.interop import names
from aromni_jax.interop.chameleon import (
    EXTRA_FILE,
    METADATA_FILE,
    ChameleonDirectory,
    Provenance,
    TreeSource,
    export_chameleon,
    full_shapes,
)
from aromni_jax.interop.container import INDEX_NAME, plan_shards, whole_directory
from aromni_jax.vocab import JointVocab
from tests.fixtures.small_models import random_params, small_model

PROVENANCE = Provenance(step=7, template="quickstart", data_fingerprint="abc", max_positions=128)


def export(output, model, vocab, params=None, **options):
    params = random_params(model) if params is None else params
    export_chameleon(TreeSource(params), model, vocab, output, provenance=PROVENANCE, **options)
    return params


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def assert_trees_equal(left, right):
    left, right = names.leaf_paths(left), names.leaf_paths(right)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)


@pytest.mark.parametrize("max_shard_bytes", [10_000_000, 10_000])
def test_directory_holds_what_was_exported(tmp_path, model, vocab, max_shard_bytes):
    params = export(tmp_path / "out", model, vocab, dtype="float32", max_shard_bytes=max_shard_bytes)
    opened = ChameleonDirectory(tmp_path / "out")
    assert (opened.model, opened.vocab, opened.provenance) == (model, vocab, PROVENANCE)
    assert (opened.dtype, opened.tokenizers, opened.left_out) == ("float32", None, ())
    assert_trees_equal(opened.params(), params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_shard_bytes", [10_000_000, 10_000])
@pytest.mark.parametrize("perceptual_dim", [0, 5])
def test_export_import_export_is_bit_identical(tmp_path, vocab, dtype, max_shard_bytes, perceptual_dim):
    model = small_model(perceptual_dim=perceptual_dim)
    (tmp_path / "tokenizers" / "text").mkdir(parents=True)
    (tmp_path / "tokenizers" / "text" / "pieces").write_bytes(b"\x00abc")
    options = dict(dtype=dtype, max_shard_bytes=max_shard_bytes)
    export(tmp_path / "first", model, vocab, tokenizers=tmp_path / "tokenizers", **options)
    opened = ChameleonDirectory(tmp_path / "first")
    export_chameleon(
        opened,
        opened.model,
        opened.vocab,
        tmp_path / "second",
        provenance=opened.provenance,
        tokenizers=opened.tokenizers,
        **options,
    )
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert (EXTRA_FILE in contents(tmp_path / "first")) == (perceptual_dim > 0)


def test_bfloat16_export_rounds_each_value_once(tmp_path, model, vocab):
    params = export(tmp_path / "out", model, vocab, dtype="bfloat16")
    opened = ChameleonDirectory(tmp_path / "out")
    assert opened.dtype == "bfloat16"
    rounded = {path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in names.leaf_paths(params).items()}
    assert_trees_equal(opened.params(), names.nested(rounded))


def test_files_are_valid_safetensors_and_the_index_names_every_tensor(tmp_path, model, vocab):
    export(tmp_path / "out", model, vocab, dtype="float32", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    assert [f.name for f in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    found = {name: file.name for file in files for name in safetensors.numpy.load_file(file)}
    assert found == index["weight_map"]
    sizes = [array.nbytes for file in files for array in safetensors.numpy.load_file(file).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    largest_tensor = max(sizes)
    assert all(file.stat().st_size < max(20_000, largest_tensor) + 8_000 for file in files)


def test_plan_shards_keeps_order_and_gives_a_large_tensor_its_own_file():
    entries = [("a", (4,)), ("b", (100,)), ("c", (4,)), ("d", (4,))]
    assert plan_shards(entries, 4, 40) == [entries[:1], entries[1:2], entries[2:]]


def test_export_holds_one_tensor_at_a_time(tmp_path, vocab):
    """The tensors of 24 layers pass through memory that would hold about three of the largest."""
    model = small_model(num_layers=24, d_model=256, num_heads=4, num_kv_heads=4, head_dim=64, mlp_dim=1024)
    shapes = full_shapes(model)

    class Generated:
        """Makes each tensor when it is read."""

        def shapes(self):
            return shapes

        def read(self, path, layer):
            shape = shapes[path] if layer is None else shapes[path][1:]
            return np.full(shape, (layer or 0) + 0.5, np.float32)

    largest = 4 * 256 * 1024
    total = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    assert total > 50 * largest
    tracemalloc.start()
    try:
        export_chameleon(Generated(), model, vocab, tmp_path / "out", provenance=PROVENANCE, dtype="float32")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * largest
    assert ChameleonDirectory(tmp_path / "out").read("layers/mlp/up", 9)[0, 0] == 9.5


def test_failed_export_leaves_nothing(tmp_path, model, vocab):
    class Failing(TreeSource):
        def read(self, path, layer):
            if path == "layers/mlp/down":
                raise OSError("the disk is gone")
            return super().read(path, layer)

    with pytest.raises(OSError, match="disk is gone"):
        export_chameleon(
            Failing(random_params(model)), model, vocab, tmp_path / "out", provenance=PROVENANCE, dtype="float32"
        )
    assert list(tmp_path.iterdir()) == []


def test_export_does_not_touch_a_directory_that_holds_something(tmp_path, model, vocab):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("dear")
    with pytest.raises(ValueError, match="not empty"):
        export(tmp_path / "out", model, vocab)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "dear"


def test_overwriting_replaces_an_export_and_nothing_else(tmp_path):
    """A run and a thesis stay, though --overwrite names their folder."""
    for text in ("old", "new"):
        with whole_directory(tmp_path / "out", replaces="aromni.json") as directory:
            (directory / "aromni.json").write_text(text)
            (directory / f"{text}.txt").write_text(text)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["aromni.json", "new.txt"]
    (tmp_path / "out" / "checkpoints").mkdir()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("dear")
    for folder in ("out", "thesis"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=f"{folder} holds other things than what is written here"):
            with whole_directory(tmp_path / folder, replaces="aromni.json"):
                pass
        assert sorted(tmp_path.rglob("*")) == before


def test_checkpoint_of_another_model_is_refused_by_name(tmp_path, model, vocab):
    params = random_params(model)
    del params["layers"]["attention"]["k"]
    params["layers"]["mlp"]["gate"] = params["layers"]["mlp"]["gate"][:, :, :-1]
    params["surprise"] = np.zeros(3)
    with pytest.raises(ValueError, match="missing layers/attention/k .*unknown surprise.*layers/mlp/gate has shape"):
        export(tmp_path / "out", model, vocab, params)
    assert not (tmp_path / "out").exists()


def test_vocabulary_of_another_size_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match="vocabulary has"):
        export(tmp_path / "out", model, JointVocab.released())


@pytest.fixture
def exported(tmp_path, model, vocab):
    export(tmp_path / "out", model, vocab, dtype="float32")
    return tmp_path / "out"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, change):
    file = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


def test_missing_unknown_and_misshapen_tensors_are_named(exported):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        tensors["model.norm.weight"] = np.zeros(3, np.float32)

    edit_tensors(exported, change)
    with pytest.raises(ValueError, match="missing model.layers.1.mlp.up_proj") as caught:
        ChameleonDirectory(exported)
    assert "unknown model.layers.9" in str(caught.value) and "model.norm.weight has shape [3]" in str(caught.value)


def test_image_tokenizer_of_the_source_is_left_out_and_said(exported):
    edit_tensors(exported, lambda t: t.update({"model.vqmodel.encoder.conv_in.bias": np.zeros(2, np.float32)}))
    assert ChameleonDirectory(exported).left_out == ("model.vqmodel.encoder.conv_in.bias",)


def test_truncated_file_is_named(exported):
    file = exported / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        ChameleonDirectory(exported)


def test_missing_shard_is_named(tmp_path, model, vocab):
    export(tmp_path / "out", model, vocab, dtype="float32", max_shard_bytes=20_000)
    (tmp_path / "out" / sorted(f.name for f in (tmp_path / "out").glob("model-*"))[1]).unlink()
    with pytest.raises(ValueError, match="lacks model-00002-of"):
        ChameleonDirectory(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn'"),
        ({"swin_norm": False}, "config.json says norm_position = 'pre'"),
    ],
)
def test_configs_that_cannot_be_honoured_are_refused(exported, changes, message):
    edit_json(exported / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        ChameleonDirectory(exported)


def test_other_vocabulary_than_the_recorded_one_is_refused(exported):
    metadata = json.loads((exported / METADATA_FILE).read_text())
    metadata["vocab"]["specials"][0], metadata["vocab"]["specials"][1] = ["bos", 1], ["pad", 0]
    (exported / METADATA_FILE).write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="was made with vocabulary"):
        ChameleonDirectory(exported)


def test_directory_without_our_metadata_needs_the_released_vocabulary(exported):
    (exported / METADATA_FILE).unlink()
    with pytest.raises(ValueError, match="96 rows of vocabulary.*--tokenizers"):
        ChameleonDirectory(exported)


def test_not_a_chameleon_directory(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        ChameleonDirectory(tmp_path)


def test_foreign_directory_with_interleaved_rotation_is_reordered(tmp_path, vocab):
    """The shape of the AR-Omni authors' files: one QK-norm vector for all heads, interleaved rows, no aromni.json."""
    released = JointVocab.released()
    model = small_model(
        vocab_size=released.size, d_model=8, head_dim=2 * 2, num_heads=2, num_kv_heads=1, perceptual_dim=0
    )
    params = random_params(model)
    export_chameleon(TreeSource(params), model, released, tmp_path / "out", provenance=PROVENANCE, dtype="float32")
    (tmp_path / "out" / METADATA_FILE).unlink()

    def change(tensors):
        for name in list(tensors):
            if "q_norm" in name or "k_norm" in name:
                tensors[name] = tensors[name][0]

    edit_tensors(tmp_path / "out", change)
    opened = ChameleonDirectory(tmp_path / "out")
    assert opened.vocab == released and opened.model.num_layers == 3
    # One head of width 4: rows [a0 b0 a1 b1] are read as [a0 a1 b0 b1].
    read = opened.read("layers/attention/q", 1)
    np.testing.assert_array_equal(read, params["layers"]["attention"]["q"][1][:, :, [0, 2, 1, 3]])
    norm = opened.read("layers/attention/k_norm/scale", 1)
    np.testing.assert_array_equal(norm, params["layers"]["attention"]["k_norm"]["scale"][1][:, [0, 2, 1, 3]])
    np.testing.assert_array_equal(opened.read("layers/attention/v", None), params["layers"]["attention"]["v"])
