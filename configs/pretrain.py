"""Stage 1: pretraining on text, image and speech tokens.

    aromni train --config=configs/pretrain.py:debug --workdir=runs/debug                     # seconds, no data set
    aromni train --config=configs/pretrain.py:7b,mesh=v5p-128 --workdir=/mnt/shared/7b         # a TPU pod

Variants: a size (debug, 100m, 1b, 7b, 34b), then `key=value` pairs separated by commas: `mesh` (a named layout below)
and `weighting` (uniform, response, balanced). The recipe is METHOD section 5: 480 rows (512 on a pod, whose chips they
must divide over), linear decay, clip 1.0. Rows are packed, so that they hold several times the sequences of the
authors' padded batches. `debug` has 8 rows and layers 64 wide; on devices that do not divide them, the error names the
keys to set.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.common import set_mixture, train_defaults

# Layouts by the name a cloud gives a machine; "v5p-128" counts cores: 64 chips. The rest goes to fsdp, but not all of a
# slice of three dimensions: there the compiler gathers and sums by all-reduces, and twice the bytes go over the links.
MESHES: dict[str, dict[str, int]] = {
    "local": dict(data=1, fsdp=-1, context=1, tensor=1),
    "v5e-256": dict(data=1, fsdp=-1, context=1, tensor=1),
    "v6e-256": dict(data=1, fsdp=-1, context=1, tensor=1),
    "v5p-128": dict(data=4, fsdp=-1, context=1, tensor=1),
    "v5p-1024": dict(data=2, fsdp=-1, context=1, tensor=4),
}

SIZES = ("debug", "100m", "1b", "7b", "34b")

# One data set a modality, made by `aromni pretokenize`; the paper's text : image : speech is 0.5 : 1 : 2.
PAPER_MIXTURE = dict(
    text=dict(path="data/text", weight=0.5),
    image=dict(path="data/image", weight=1.0),
    speech=dict(path="data/speech", weight=2.0),
)


def get_config(variant: str = "debug") -> ConfigDict:
    """The config of `size[,key=value...]`; ValueError for a size or key there is not."""
    size, *pairs = variant.split(",")
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; sizes: {', '.join(SIZES)}")
    options = {"mesh": "local", "weighting": "balanced"}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in options:
            raise ValueError(f"unknown variant key {key!r}; keys: {', '.join(options)}")
        options[key] = value
    if options["mesh"] not in MESHES:
        raise ValueError(f"unknown mesh {options['mesh']!r}; layouts: {', '.join(MESHES)}")

    config = train_defaults()
    config.model = size
    config.mesh.update(MESHES[options["mesh"]])
    config.loss.weighting = options["weighting"]
    if size == "debug":
        config.total_steps = 20
        config.global_batch_size = 8
        config.sequence_length = 128
        config.optimizer.learning_rate = 3e-3
        config.optimizer.warmup_steps = 5
        config.checkpoint.save_every_steps = 10
        config.log_every_steps = 1
        return config

    config.total_steps = 140_000
    config.global_batch_size = 64 if size == "100m" else 480 if options["mesh"] == "local" else 512
    config.optimizer.learning_rate = {"100m": 3e-4, "1b": 2e-4, "7b": 6e-5, "34b": 6e-5}[size]
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 7_000
    config.optimizer.final_learning_rate_fraction = 0.0
    config.data.update(num_workers=8, prefetch_batches=4)
    set_mixture(config, PAPER_MIXTURE)
    return config
