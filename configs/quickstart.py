"""The main job on the embedded corpus: at most 15 minutes on 2 cores and 8 GiB, evaluation included.

    aromni quickstart --workdir=runs/quickstart

Variants: the default, and `tiny`, which walks the whole road in about a minute and learns next to nothing.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.common import train_defaults


def get_config(variant: str = "") -> ConfigDict:
    """The fields of `launch.quickstart_job.QuickstartConfig`."""
    if variant not in ("", "tiny"):
        raise ValueError(f"unknown variant {variant!r}; variants: tiny, or none")
    train = train_defaults()
    # Two cores see about 3 million tokens in the time there is. A model this small, small batches and Muon at a high
    # rate learn most from them (LOG.md); layers are unrolled and rows are as short as packs well: fastest here.
    with train.ignore_type():
        train.model = dict(
            size="quickstart",
            num_layers=4,
            d_model=128,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            mlp_dim=352,
            scan_layers=False,
        )
    train.total_steps = 2_900
    train.global_batch_size = 3
    train.sequence_length = 336
    train.optimizer.name = "muon"
    train.optimizer.learning_rate = 1e-2
    train.optimizer.warmup_steps = 40
    train.loss.chunk_tokens = 2048
    # Answers count more than what is only read: pictures made over pictures described, speech made over speech heard.
    train.loss.task_modality_weights = ConfigDict(
        dict(
            text_to_image=dict(text=0.3, image=1.5),
            speech_to_image=dict(speech=0.3, image=1.5),
            caption=dict(image=0.2),
            question=dict(image=0.2),
            speech_to_text=dict(speech=0.3),
            text_to_speech=dict(text=0.3, speech=1.5),
        )
    )
    train.checkpoint.save_every_steps = 100
    train.log_every_steps = 10
    config = ConfigDict(
        dict(
            seed=0,
            corpus=dict(
                train_scenes=6000,
                heldout_scenes=120,
                heldout_scans=297,
                digit_utterances_per_voice=120,
                phrase_utterances=2000,
                heldout_digit_utterances_per_voice=20,
                heldout_phrases_per_voice=30,
            ),
            tokenizers=dict(codecs="shipped", text_vocab_size=600, image_steps=1200, speech_steps=900),
            train=train,
            evaluate=dict(
                cases_per_group=dict(
                    text_to_image=40,
                    speech_to_image=30,
                    text_to_speech=20,
                    speech_to_text=40,
                    caption=30,
                    question=30,
                ),
                loss_cases_per_group=40,
                judge_examples=1500,
                batch_size=64,
                speech_seconds=3.0,
                text_tokens=40,
                image_temperature=0.4,
                image_guidance=2.0,
            ),
            expected_seconds=dict(
                corpus=22.0,
                tokenizers=6.0,
                codecs=120.0,
                pretokenize=32.0,
                train=600.0,
                export=1.0,
                evaluate=62.0,
                report=1.0,
            ),
        ),
        type_safe=True,
    )
    return tiny(config) if variant == "tiny" else config


def tiny(config: ConfigDict) -> ConfigDict:
    """The same road with toy sizes."""
    config.corpus.update(
        train_scenes=72,
        heldout_scenes=12,
        heldout_scans=1700,
        digit_utterances_per_voice=10,
        phrase_utterances=24,
        heldout_digit_utterances_per_voice=10,
        heldout_phrases_per_voice=4,
    )
    config.tokenizers.update(text_vocab_size=380, image_steps=30, speech_steps=20)
    with config.ignore_type():
        config.train.model = "debug"
    config.train.total_steps = 20
    config.train.optimizer.warmup_steps = 4
    config.train.checkpoint.save_every_steps = 5
    config.train.log_every_steps = 2
    for task in config.evaluate.cases_per_group:
        config.evaluate.cases_per_group[task] = 4
    config.evaluate.update(loss_cases_per_group=4, judge_examples=200, batch_size=16, speech_seconds=0.5, text_tokens=8)
    config.expected_seconds.update(
        corpus=5.0, tokenizers=3.0, codecs=28.0, pretokenize=10.0, train=10.0, export=1.0, evaluate=20.0, report=1.0
    )
    return config
