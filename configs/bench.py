"""What `aromni bench train` measures where nothing else is said: a shape that two CPU cores step in seconds.

aromni bench train
aromni bench train --config=configs/bench.py:1b      # a GPU of 140 GB; of 80 GB with --no_peer
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.common import train_defaults


def get_config(variant: str = "small") -> ConfigDict:
    """`small`: eight layers 512 wide under the released vocabulary, four rows of 2048, two at a time, float32.

    `1b`: the size of that name, eight rows of 4096 in bfloat16, with what makes it fast where memory is plenty: nothing
    is computed again, layers are compiled one by one, logits exist for a quarter of the vocabulary at once.
    """
    config = train_defaults()
    if variant == "1b":
        with config.ignore_type():
            config.model = dict(size="1b", remat="none", scan_layers=False)
        config.loss.chunk_tokens = 8192
        config.global_batch_size = 8
        config.sequence_length = 4096
        return config
    if variant != "small":
        raise ValueError(f"unknown variant {variant!r}; variants: small, 1b")
    with config.ignore_type():
        config.model = dict(
            num_layers=8,
            d_model=512,
            num_heads=8,
            num_kv_heads=8,
            head_dim=64,
            mlp_dim=1408,
        )
    config.loss.chunk_tokens = 2048  # products of few rows are slower
    config.global_batch_size = 4
    config.sequence_length = 2048
    config.gradient_accumulation_steps = 2  # half the memory: both sides live beside each other
    return config
