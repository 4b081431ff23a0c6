"""Hugging Face Chameleon's `config.json` and our `ModelConfig`, both ways, and the model card of an export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aromni_jax.models.config import ModelConfig
from aromni_jax.vocab import JointVocab

ARCHITECTURE_FIELDS = (
    "vocab_size",
    "num_layers",
    "d_model",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_dim",
    "norm_position",
    "qk_norm",
    "rope_theta",
    "norm_eps",
)
"""Fields of `ModelConfig` that change what the model computes; the others say how it is computed."""

_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "tie_word_embeddings": (False,),
    "rope_scaling": (None,),
    "qk_layernorm": (True, None),
}
"""Keys of a foreign config and the values our decoder can honour; an absent key has the first one."""


def to_chameleon(model: ModelConfig, vocab: JointVocab, *, dtype: str, max_positions: int) -> dict[str, Any]:
    """The `config.json` of an export.

    `vocabulary_map` is empty, since transformers replaces the logits of every image token it lists by the dtype's
    minimum; with none listed, image logits are what the model says. The image encoder of the class is not ours, and is
    configured as small as it can be.
    """
    return {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.mlp_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rope_theta": model.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "model_parallel_size": 1,
        "swin_norm": model.norm_position == "swin",
        "tie_word_embeddings": False,
        "vocabulary_map": {},
        "bos_token_id": vocab.bos,
        "eos_token_id": vocab.eos,
        "pad_token_id": vocab.pad,
        "dtype": dtype,
        "vq_config": {
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "latent_channels": 32,
            "embed_dim": 32,
            "num_embeddings": 32,
            "resolution": 32,
        },
    }


def generation_config(vocab: JointVocab) -> dict[str, Any]:
    """The `generation_config.json` of an export: both ways an answer can end, and greedy decoding."""
    return {
        "bos_token_id": vocab.bos,
        "eos_token_id": [vocab.eos, vocab.end_model],
        "pad_token_id": vocab.pad,
        "do_sample": False,
    }


def architecture_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `ARCHITECTURE_FIELDS` that a Hugging Face Chameleon config stands for.

    Raises:
      ValueError: not a Chameleon config, a key is missing, or a feature is on that our decoder does not have.
    """
    if config.get("model_type") != "chameleon":
        raise ValueError(f"config.json has model_type {config.get('model_type')!r}; only 'chameleon' can be imported")
    for key, allowed in _REQUIRED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"config.json has {key} = {config[key]!r}; only {allowed[0]!r} can be imported")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"config.json has rope_type {rope['rope_type']!r}; only 'default' can be imported")
    try:
        d_model, num_heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return {
            "vocab_size": int(config["vocab_size"]),
            "num_layers": int(config["num_hidden_layers"]),
            "d_model": d_model,
            "num_heads": num_heads,
            "num_kv_heads": int(config.get("num_key_value_heads") or num_heads),
            "head_dim": d_model // num_heads,
            "mlp_dim": int(config["intermediate_size"]),
            "norm_position": "swin" if config.get("swin_norm") else "pre",
            "qk_norm": True,
            "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
            "norm_eps": float(config.get("rms_norm_eps") or 1e-5),
        }
    except KeyError as error:
        raise ValueError(f"config.json lacks {error}; a Chameleon config has it") from None


def model_card(metadata: Mapping[str, Any]) -> str:
    """README.md of an export: what it is, how to load it, and the one trap of the class it loads into."""
    model = metadata["model"]
    return f"""---
library_name: transformers
pipeline_tag: any-to-any
tags: [aromni, chameleon, omni-modal]
---
# AR-Omni decoder, exported from aromni-jax

One autoregressive decoder over one token stream of text, images and speech: {model["num_layers"]} layers, width
{model["d_model"]}, {model["num_heads"]} heads ({model["num_kv_heads"]} key-value heads), {model["norm_position"]}
norm, {model["vocab_size"]} rows of vocabulary; weights in {metadata["dtype"]}, step {metadata["step"]}.

```python
from transformers import ChameleonForConditionalGeneration
model = ChameleonForConditionalGeneration.from_pretrained("this/directory")
```

* **Image logits.** `ChameleonForConditionalGeneration` overwrites the logits of every image token named in
  `config.vocabulary_map` by the smallest number of the dtype. The map is empty here, so that logits are what the model
  says. If you fill it in, read `model.lm_head(model.model(input_ids).last_hidden_state)` instead of
  `model(...).logits`, and expect an infinite loss on image labels.
* **`model.vqmodel.*` is not in the files.** Pictures enter as token ids from `tokenizers/`, never as pixels; the
  library reports those weights as newly initialised, and they are not used.
* `aromni.json` holds the joint vocabulary (which row means what), the prompt template and fingerprints. `tokenizers/`
  turns text, pictures and sound into ids and back, and `aromni generate --model=DIR` does all of it.
* `aromni_extra.safetensors`, where present, holds the training head of the perceptual loss; inference does not need it.
"""
