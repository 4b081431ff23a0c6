"""Foreign directories that are incomplete, damaged or of another model: each is refused by name, with a remedy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from aromni_jax.interop import names
from aromni_jax.interop.chameleon import ChameleonDirectory
from aromni_jax.interop.consolidated import consolidated_name
from tests.fixtures.published_weights import chameleon, weights, write_config, write_meta, write_torch
from tests.fixtures.small_models import small_vocab


@pytest.fixture(scope="module")
def net():
    return chameleon(small_vocab().size, ranks=2)


@pytest.fixture
def shards(tmp_path, net):
    write_config(tmp_path / "hf", net)
    write_torch(tmp_path / "hf", weights(net), 3)
    return tmp_path / "hf"


@pytest.fixture
def ranks(tmp_path, net):
    write_meta(tmp_path / "meta", net, 2)
    return tmp_path / "meta"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_torch(path, change):
    tensors = torch.load(path)
    change(tensors)
    torch.save(tensors, path)


def refused(directory, message, **options):
    with pytest.raises(ValueError, match=message):
        ChameleonDirectory(directory, small_vocab(), **options)


def test_missing_torch_shard(shards):
    (shards / "pytorch_model-00002-of-00003.bin").unlink()
    refused(shards, "lacks pytorch_model-00002-of-00003.bin, named in pytorch_model.bin.index.json; fetch")


def test_torch_shard_that_is_cut_short(shards):
    file = shards / "pytorch_model-00003-of-00003.bin"
    file.write_bytes(file.read_bytes()[:-2000])
    refused(shards, "pytorch_model-00003-of-00003.bin is not a zip file .*it is cut short, fetch it again")


def test_flipped_bits_of_a_torch_shard_are_found_when_the_tensor_is_read(shards):
    file = shards / "pytorch_model-00001-of-00003.bin"
    content = bytearray(file.read_bytes())
    value = torch.load(file)["lm_head.weight"].numpy().tobytes()
    content[content.index(value) + 5] ^= 0x10
    file.write_bytes(content)
    opened = ChameleonDirectory(shards, small_vocab())
    with pytest.raises(ValueError, match="pytorch_model-00001-of-00003.bin: .* is damaged"):
        opened.params()


def test_shards_of_two_downloads(shards):
    edit_torch(shards / "pytorch_model-00001-of-00003.bin", lambda t: t.pop("lm_head.weight"))
    refused(shards, "00001-of-00003.bin lacks lm_head.weight, which the index says is in it; shards of two downloads")


@pytest.mark.parametrize("content", ["[]", '{"weight_map": 3}', "{}", "nothing"])
def test_index_that_is_none(shards, content):
    (shards / "pytorch_model.bin.index.json").write_text(content)
    refused(shards, "pytorch_model.bin.index.json is not")


def test_no_weights_at_all(tmp_path, net):
    write_config(tmp_path, net)
    refused(tmp_path, "lacks weights: there is none of model.safetensors, pytorch_model.bin")


def test_quantized_weights(tmp_path, net):
    write_config(tmp_path, net)
    write_torch(tmp_path, weights(net) | {"lm_head.weight": torch.zeros(96, 32, dtype=torch.int8)})
    refused(tmp_path, "pytorch_model.bin stores lm_head.weight as int8; only .* take the unquantized weights")


def test_one_tensor_under_two_names(tmp_path, net):
    write_config(tmp_path, net)
    write_torch(tmp_path, weights(net) | {"module.lm_head.weight": torch.zeros(96, 32)})
    refused(tmp_path, "has two tensors lm_head.weight .one of them as module.lm_head.weight in pytorch_model.bin")


def test_missing_unknown_and_misshapen_tensors(tmp_path, net):
    tensors = weights(net) | {
        "model.layers.7.mlp.up_proj.weight": torch.zeros(2, 2),
        "model.norm.weight": torch.ones(3),
    }
    del tensors["model.layers.1.self_attn.q_norm.bias"]
    write_config(tmp_path, net)
    write_torch(tmp_path, tensors)
    with pytest.raises(ValueError, match="missing model.layers.1.self_attn.q_norm.bias") as caught:
        ChameleonDirectory(tmp_path, small_vocab())
    assert "unknown model.layers.7" in str(caught.value) and "model.norm.weight has shape [3]" in str(caught.value)


def test_model_without_qk_norm(tmp_path, net):
    write_config(tmp_path, net, qk_layernorm=False)
    refused(tmp_path, "qk_layernorm = False; only True can be imported")


def test_order_that_contradicts_the_files(ranks):
    refused(ranks, "Meta's layout, which is interleaved", rotary="half_split")


def test_missing_rank(ranks):
    (ranks / "consolidated.01.pth").unlink()
    refused(ranks, "has params.json but lacks consolidated.01.pth; fetch it again")


def test_no_rank_at_all(ranks):
    for file in ranks.glob("*.pth"):
        file.unlink()
    refused(ranks, r"lacks consolidated.00.pth, consolidated.01.pth \(and consolidated.pth\)")


def test_ranks_of_two_models(ranks):
    file = ranks / "consolidated.01.pth"
    edit_torch(file, lambda t: t.update({"norm.weight": torch.ones(3)}))
    refused(ranks, r"consolidated.01.pth: norm.weight is float32 \[3\], but float32 \[32\] in consolidated.00.pth")
    edit_torch(file, lambda t: t.pop("norm.weight"))
    refused(ranks, "parts of the same tensors, but only one of them has norm.weight")


def test_consolidated_names_in_the_complaint_are_those_of_the_file(ranks):
    for file in ranks.glob("*.pth"):
        edit_torch(file, lambda t: t.update({"layers.1.attention.wqkv.weight": t.pop("layers.1.attention.wq.weight")}))
    with pytest.raises(ValueError, match="missing layers.1.attention.wq.weight") as caught:
        ChameleonDirectory(ranks, small_vocab())
    assert "unknown layers.1.attention.wqkv.weight" in str(caught.value)


def test_consolidated_tensor_with_a_dimension_too_many(ranks):
    for file in ranks.glob("*.pth"):
        edit_torch(file, lambda t: t.update({"norm.weight": torch.ones(1, 32)}))
    refused(ranks, r"norm.weight has shape \[1, 32\], which has a dimension too many or too few")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": None}, "is not the params.json of a Chameleon"),
        ({"qk_normalization": False}, "qk_normalization = False"),
        ({"multiple_of": 64}, r"layers.0.feed_forward.w1.weight has shape \[48, 32\], the config says \[64, 32\]"),
        ({"n_kv_heads": 1}, "has 2 consolidated files, which cannot share num_kv_heads = 1"),
    ],
)
def test_parameters_of_another_model(ranks, changes, message):
    params = json.loads((ranks / "params.json").read_text())
    edit_json(ranks / "params.json", model=params["model"] | changes)
    refused(ranks, message)


def test_parameters_that_lack_a_key(ranks):
    (ranks / "params.json").write_text(json.dumps({"model": {"dim": 32}}))
    refused(ranks, "params.json lacks 'n_heads'")


def test_folder_above_the_one_with_the_files(tmp_path, net):
    write_meta(tmp_path / "data" / "models" / "7b", net, 2)
    refused(tmp_path / "data", "no params.json; give .*data/models/7b, where params.json is")


def test_vocabulary_of_another_size(ranks):
    with pytest.raises(ValueError, match="96 rows of vocabulary, .* Chameleon's layout has 65536 rows; .*--tokenizers"):
        ChameleonDirectory(ranks)


def test_every_tensor_of_the_table_has_a_consolidated_name():
    for rule in names.TABLE:
        if not rule.is_extra:
            assert consolidated_name(rule.their_name(13 if rule.per_layer else None))
    assert consolidated_name("model.layers.13.mlp.down_proj.weight") == "layers.13.feed_forward.w2.weight"


def test_norm_vectors_of_ranks_go_to_neighbouring_heads():
    """[S, H] = [2, 4] for four heads: pairs (a0 b0), (a1 b1) become a0 a1 b0 b1, rank 0 for heads 0 and 1."""
    vectors = np.array([[0, 1, 2, 3], [4, 5, 6, 7]])
    assert names.deinterleave_norm(vectors, 4).tolist() == [[0, 2, 1, 3]] * 2 + [[4, 6, 5, 7]] * 2
    assert names.deinterleave_norm(vectors[0], 2).tolist() == [[0, 2, 1, 3]] * 2
