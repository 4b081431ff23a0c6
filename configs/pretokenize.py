"""Pre-tokenizing a corpus: a JSONL manifest becomes a data set of token shards.

    aromni pretokenize --config=configs/pretokenize.py --config.source=corpus/manifest.jsonl \
        --config.tokenizers=tokenizers --output=data/train

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
            heldout_fraction=0.0,  # only where the manifest names no split
            tokenizers="tokenizers",
            templates="quickstart",
            records_per_shard=4096,
            media_batch_size=64,
            max_tokens=0,
            too_long="drop",
            max_bad_fraction=0.01,
        ),
        type_safe=True,
    )
