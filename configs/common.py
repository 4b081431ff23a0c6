"""What every training config shares. Loads without jax."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict


def train_defaults() -> ConfigDict:
    """A complete training config (the fields of `aromni_jax.config.TrainConfig`); variants change single keys."""
    return ConfigDict(
        dict(
            seed=0,
            model="debug",
            total_steps=1_000,
            global_batch_size=8,
            sequence_length=4096,
            gradient_accumulation_steps=1,
            optimizer=dict(
                name="adamw",
                learning_rate=3e-4,
                schedule="cosine",
                warmup_steps=100,
                decay_steps=0,
                final_learning_rate_fraction=0.1,
                b1=0.9,
                b2=0.95,
                eps=1e-8,
                weight_decay=0.1,
                clip_norm=1.0,
                ema_decay=0.0,
                moment_dtype="float32",
                master_weights=True,
                offload=False,
            ),
            mesh=dict(data=1, fsdp=-1, context=1, tensor=1, num_slices=1),
            checkpoint=dict(
                save_every_steps=1_000,
                keep_last=2,
                keep_every_steps=0,
                asynchronous=True,
                local_directory="",
                local_every_steps=0,
            ),
            loss=dict(
                weighting="balanced",
                perceptual_weight=1.0,
                perceptual_mode="predict",
                z_loss_weight=1e-4,
                chunk_tokens=1024,
                task_modality_weights=ConfigDict(),
                transcript_weight=1.0,
            ),
            data=dict(
                mixture="synthetic",
                weight_unit="examples",
                temperature=1.0,
                when_exhausted="repeat",
                epochs=1,
                duplicates="keep",
                verify=False,
                num_workers=1,
                prefetch_batches=2,
                shuffle=True,
                evaluation=ConfigDict(),
                evaluation_examples=512,
            ),
            init_from="",
            log_every_steps=10,
            eval_every_steps=0,
            watchdog_seconds=600.0,
            norm_blend_steps=0,
        ),
        type_safe=True,
    )


def set_mixture(config: ConfigDict, mixture: dict[str, dict[str, Any]]) -> None:
    """Replaces `data.mixture` by named data sets: {name: {"path": directory, "weight": share}}."""
    with config.data.ignore_type():
        config.data.mixture = ConfigDict(mixture)
