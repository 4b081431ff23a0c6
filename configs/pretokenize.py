"""Pre-tokenizing a corpus: a JSONL manifest, or another source, becomes a data set of token shards.

    aromni pretokenize --config=configs/pretokenize.py --config.source=corpus/manifest.jsonl \
        --config.tokenizers=tokenizers --output=data/train

The source may also be a corpus in the layout it is published in (README, "Your own data"), with a held-out share:

    aromni pretokenize --config=configs/pretokenize.py:heldout --config.source=ljspeech:LJSpeech-1.1 \
        --config.heldout_fraction=0.02 --config.tokenizers=tokenizers --output=data/heldout

Variants: train (the default) and heldout, for the two splits. Any number of processes share the work with
`--shard_index=I --num_shards=N`; run it again after a crash and it goes on.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def get_config(variant: str = "train") -> ConfigDict:
    """The fields of `data_pipelines.pretokenize.PretokenizeConfig`; `variant` is the split."""
    if variant not in ("train", "heldout"):
        raise ValueError(f"unknown variant {variant!r}; variants: train, heldout")
    return ConfigDict(
        dict(
            source="corpus/manifest.jsonl",
            split=variant,
            heldout_fraction=0.0,  # only where the source names no split
            columns={},  # of a table: {"text": "caption", "image": "jpg"}
            tasks="",  # of a source whose records can teach several: "caption,text_to_image"; all by default
            tokenizers="tokenizers",
            templates="quickstart",
            records_per_shard=4096,
            media_batch_size=64,
            min_tokens=0,
            max_tokens=0,  # 0: no limit
            too_long="drop",  # or error; truncate_text and split_text cut plain text and drop what is more than text
            max_bad_fraction=0.01,
            seed=0,  # of what is drawn for each record: wording of the instruction, noise, room, unconditional copies
            unconditional_fraction=0.0,  # pictures that are stored without their prompt as well, for guidance
            augmentation=dict(  # of speech in user turns only
                noise_fraction=0.0,
                noise="",  # a folder of recordings, DEMAND for instance; "" for white, pink and brown noise
                snr_db=(0.0, 20.0),
                room_fraction=0.0,
                room="",  # a folder of impulse responses; "" for generated ones
                rt60_seconds=(0.2, 0.8),
                copies="replace",  # or beside: the clean record stays
            ),
        ),
        type_safe=True,
    )
