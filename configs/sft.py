"""Supervised fine-tuning: the pretraining loop with response-only loss weights, started from another run's weights.

    aromni train --config=configs/sft.py:7b --config.init_from=runs/7b --workdir=runs/7b-sft

Variants: debug, 100m, 1b, 7b, 34b. Recipe: METHOD section 5 (64 rows, 2e-5, 18,000 steps).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.common import set_mixture
from configs.pretrain import get_config as pretrain_config


def get_config(variant: str = "debug") -> ConfigDict:
    """The pretraining config of the same size, with what fine-tuning changes."""
    config = pretrain_config(variant)
    config.loss.weighting = "sft"
    config.loss.transcript_weight = 1.0
    config.loss.perceptual_weight = 0.0
    if variant.split(",")[0] == "debug":
        config.optimizer.learning_rate = 1e-3
        return config
    config.total_steps = 18_000
    config.global_batch_size = 64
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 900
    set_mixture(config, dict(instruct=dict(path="data/instruct", weight=1.0)))
    return config
