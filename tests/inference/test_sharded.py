"""A model spread over eight devices says what it says on one, and each device holds its part and no more."""

from __future__ import annotations

import dataclasses
import warnings

import jax
import numpy as np
import pytest

from aromni_jax.config import MeshConfig
from aromni_jax.inference.decode import OmniModel, generate
from aromni_jax.inference.grammar import compile_grammar
from aromni_jax.inference.machine import begin, decode_jitted, extend_jitted
from aromni_jax.inference.policy import DecodingConfig, Mode, policy_for
from aromni_jax.inference.sampling import row_keys
from aromni_jax.inference.streaming import stream_tokens
from aromni_jax.interop.chameleon import ChameleonDirectory, Provenance, TreeSource, export_chameleon
from aromni_jax.partitioning import make_mesh
from aromni_jax.structs import Example, Task
from tests.fixtures.small_models import random_params, small_model, small_vocab
from tests.fixtures.tpu_compiler import answer_of, needs_tpu_compiler
from tests.inference.answers import check

VOCAB = small_vocab()
WIDE = small_model(num_layers=2, d_model=64, num_heads=8, num_kv_heads=8)
GROUPED = small_model(num_layers=2, d_model=64, num_heads=8, num_kv_heads=2)
TASKS = [Task.CAPTION, Task.TEXT_TO_IMAGE, Task.TEXT_TO_SPEECH, Task.CHAT, Task.TEXT]
MESHES = [MeshConfig(1, 1, 1, 8), MeshConfig(2, 1, 1, 4), MeshConfig(1, 2, 2, 2)]


def spread(model, config: MeshConfig) -> OmniModel:
    return OmniModel.of(model, random_params(model), VOCAB, mesh=make_mesh(config))


def grammar_of(text: Mode):
    decoding = DecodingConfig(text=text)
    return compile_grammar(VOCAB, {task: policy_for(task, decoding) for task in Task})


def prompts() -> list[Example]:
    rng = np.random.default_rng(0)
    rows = [rng.integers(VOCAB.text.start, VOCAB.text.stop, rng.integers(1, 30)).astype(np.int32) for _ in TASKS]
    return [Example(row, (), task, str(i)) for i, (row, task) in enumerate(zip(rows, TASKS, strict=True))]


@pytest.mark.parametrize(
    "model, config",
    [*((WIDE, config) for config in MESHES), *((GROUPED, config) for config in MESHES[:2])],
    ids=lambda value: f"{value.num_kv_heads} kv heads" if value in (WIDE, GROUPED) else str(value),
)
def test_answers_are_those_of_one_device(model, config):
    alone, many = OmniModel.of(model, random_params(model), VOCAB), spread(model, config)
    for text in (Mode(0.0), Mode(1.0, top_p=0.9, repetition_penalty=1.2)):
        grammar = grammar_of(text)
        wanted = generate(alone, grammar, prompts(), max_new_tokens=24, seed=3)
        # Four rows a call divide over the mesh, the one that a stream has does not.
        found = generate(many, grammar, prompts(), max_new_tokens=24, seed=3, batch_size=4)
        for left, right in zip(wanted, found, strict=True):
            np.testing.assert_array_equal(left, right)
    runs = stream_tokens(many, grammar, prompts()[1], max_new_tokens=24, seed=3, row_id=1)
    np.testing.assert_array_equal([event.token_id for run in runs for event in run], wanted[1])


@pytest.mark.parametrize(
    "config, dtype", [(MeshConfig(1, 1, 1, 8), "float32"), (MeshConfig(1, 2, 1, 4), "bfloat16")], ids=str
)
def test_eight_bits_on_eight_devices(config, dtype):
    """The very bits and tokens of one device, well formed, in about half of the bytes of bfloat16."""
    model, mesh = dataclasses.replace(WIDE, dtype=dtype), make_mesh(config)
    alone = OmniModel.of(model, random_params(model), VOCAB, weights="int8")
    many = OmniModel.of(model, random_params(model), VOCAB, mesh=mesh, weights="int8")
    jax.tree.map(np.testing.assert_array_equal, alone.params, many.params)
    grammar = grammar_of(Mode(0.0))
    found = generate(many, grammar, prompts(), max_new_tokens=24)
    for task, tokens in zip(TASKS, found, strict=True):
        check(tokens.tolist(), task, VOCAB, policy_for(task, DecodingConfig(text=Mode(0.0))))
    if dtype == "float32":  # In bfloat16 sums of another order choose another token now and then.
        jax.tree.map(np.testing.assert_array_equal, found, generate(alone, grammar, prompts(), max_new_tokens=24))
    halves = OmniModel.of(model, random_params(model), VOCAB, mesh=mesh, weights="bfloat16")
    for device in mesh.devices.flat:
        eight, sixteen = ([own["attention"] for own in model.params["layers"]] for model in (many, halves))
        for name in ("q", "o"):
            assert 2 * held_by([x[name] for x in eight], device) == held_by([x[name] for x in sixteen], device)
    assert many.config.dtype == dtype and halves.config.dtype == "bfloat16"


def test_a_model_trained_with_rematerialisation_keeps_its_scales():
    params = random_params(WIDE)
    plain, trained = (
        OmniModel.of(dataclasses.replace(WIDE, remat=remat), params, VOCAB, weights="int8")
        for remat in ("none", "full")
    )
    grammar = grammar_of(Mode(0.0))
    wanted, found = (generate(model, grammar, prompts(), max_new_tokens=24) for model in (plain, trained))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def held_by(tree, device) -> int:
    """Bytes of a tree's arrays on one device."""
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards if shard.device == device]
    return sum(shard.data.nbytes for shard in shards)


@pytest.mark.parametrize("config", MESHES, ids=str)
def test_a_device_holds_its_part_of_every_matrix_and_cache(config):
    many, mesh = spread(WIDE, config), make_mesh(config)
    whole = OmniModel.of(WIDE, random_params(WIDE), VOCAB).params
    norms = sum(
        leaf.nbytes for path, leaf in jax.tree.leaves_with_path(whole) if "scale" in str(path) or "bias" in str(path)
    )
    ways = mesh.shape["fsdp"] * mesh.shape["tensor"]
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
    for device in mesh.devices.flat:
        assert held_by(many.params, device) <= total / ways + norms

    state = begin(
        many.machine,
        grammar_of(Mode(0.0)).start([Task.CAPTION] * 4),
        np.full(4, 24, np.int32),
        row_keys(0, list(range(4))),
        cache_length=64,
        max_new_tokens=24,
    )
    size = sum(cache.keys.nbytes + cache.values.nbytes for cache in state.caches)
    tokens, lengths = np.ones((4, 8), np.int32), np.array([8, 5, 1, 3], np.int32)
    grammar = grammar_of(Mode(0.0))
    with warnings.catch_warnings():
        # Caches are written in place: what is donated has the placement of what comes out.
        warnings.filterwarnings("error", message="Some donated buffers")
        for _ in range(2):
            for device in mesh.devices.flat:
                assert held_by([(cache.keys, cache.values) for cache in state.caches], device) == size // 8
            state = extend_jitted(many.machine, many.params, state, tokens, lengths)
            state = decode_jitted(many.machine, many.params, grammar.tables, state, 2)


def test_kv_heads_that_do_not_divide_are_everywhere_and_other_heads_may_not_be():
    many = spread(GROUPED, MeshConfig(1, 1, 1, 8))
    attention = many.params["layers"][0]["attention"]
    assert attention["k"].is_fully_replicated and attention["k_norm"]["scale"].is_fully_replicated
    assert attention["q"].addressable_shards[0].data.shape == (64, 1, 8)
    with pytest.raises(ValueError, match="'heads' of size 4 cannot be split 8 ways over mesh axis 'tensor'"):
        spread(small_model(), MeshConfig(1, 1, 1, 8))


def test_an_export_is_read_one_array_at_a_time_and_each_device_gets_its_part(tmp_path):
    params = random_params(WIDE)
    provenance = Provenance(step=1, max_positions=512)
    export_chameleon(TreeSource(params), WIDE, VOCAB, tmp_path / "out", provenance=provenance, dtype="float32")
    opened, mesh, largest = ChameleonDirectory(tmp_path / "out"), make_mesh(MeshConfig(1, 2, 1, 4)), []

    def read(path, layer):
        array = opened.read(path, layer)
        largest.append(array.nbytes)
        return array

    found = OmniModel.read(opened.model, read, opened.vocab, mesh=mesh).params
    wanted = OmniModel.of(WIDE, params, VOCAB, mesh=mesh).params
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert left.sharding == right.sharding
        np.testing.assert_array_equal(left, right)
    # The tables are the largest arrays; no stack of layers was ever whole.
    assert len(largest) == len(jax.tree.leaves(found)) and max(largest) == params["embedding"].nbytes


@needs_tpu_compiler
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_eight_chips_read_an_eighth_of_the_weights_each(weights):
    """Two layers of 7b: a chip has an eighth of the weights, none are gathered, nothing large is copied."""
    found = answer_of("tests.fixtures.compiled_decode", weights)
    share = found["weight_bytes"] / 8
    cache = 2 * 2 * 1024 * 4096 * 2  # keys and values of two layers, 1024 slots of bfloat16
    assert 0 < found["argument_bytes"] - share - cache / 8 < 0.1 * share  # the tables of the grammar
    # Nor are there matrices of 16 bits beside those of 8.
    assert found["temporary_bytes"] < 0.03 * share
    assert not [line for line in found["gathers"] if "65536" not in line]
