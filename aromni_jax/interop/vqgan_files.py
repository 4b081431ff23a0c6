"""Published VQGAN files and our image tokenizer, both ways.

Two containers, one set of tensor names: safetensors as transformers keeps them (`ChameleonVQVAE`, alone or under
`model.vqmodel.` in a whole Chameleon; without a decoder), and the torch checkpoints of taming and Chameleon (`.ckpt`;
with the decoder, and with `loss.*`, which is left out). Sizes of the net are read off the shapes of the tensors.

Source of the names: `taming-transformers` (MIT) and `transformers` 5 (Apache-2.0).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from aromni_jax.interop import torch_files
from aromni_jax.interop.chameleon import IMAGE_TOKENIZER_PREFIX, check_shapes
from aromni_jax.interop.container import INDEX_NAME, whole_directory, write_file
from aromni_jax.interop.names import leaf_paths, nested
from aromni_jax.tokenizers.image import CHAMELEON, ImageTokenizer, ImageTokenizerConfig, abstract_tree
from aromni_jax.tokenizers.nets.vqgan import VQGANConfig

_GROUPS = 32
"""GroupNorm groups of every published net; no shape tells."""

Shapes = Mapping[str, tuple[int, ...]]


class PublishedVQGAN:
    """A published image tokenizer, opened: shapes are checked, values are read when asked for.

    `source` is a `.safetensors` file, a directory of them with an optional `config.json`, or a torch checkpoint.

    Attributes:
      config: what the files hold, as our image tokenizer's config (loss and recipe: those of `CHAMELEON`).
      left_out: names of tensors that are part of the training loss, or of the language model around it.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that cannot be read, the size of pictures is unknown, or tensors that are missing, unknown or
        misshapen: named.
    """

    def __init__(self, source: str | Path, image_size: int | None = None) -> None:
        self.source = Path(source)
        if not self.source.exists():
            raise FileNotFoundError(f"{self.source} does not exist")
        stored, self._read = _open(self.source)
        self.left_out = tuple(name for name in stored if name.startswith("loss."))
        shapes = {name: shape for name, shape in stored.items() if not name.startswith("loss.")}
        self.config = _config(shapes, image_size or _recorded_image_size(self.source), self.source)
        self._paths = published_names(self.config)
        expected = {name: shape for name, shape in self._paths.values()}
        check_shapes(shapes, expected, str(self.source))

    def tokenizer(self) -> ImageTokenizer:
        """The image tokenizer, in float32."""
        leaves = {}
        for path, (name, _) in self._paths.items():
            value = self._read(name).astype(np.float32)
            leaves[path] = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
        tree = nested(leaves)
        return ImageTokenizer(self.config, tree["params"], tree["codebook_CE"])


def write_vqgan(tokenizer: ImageTokenizer, output: str | Path) -> None:
    """Writes the published form: NAME.safetensors, NAME.ckpt, or a directory that `ChameleonVQVAE` loads.

    Raises:
      ValueError: the tokenizer has a part the published net has not, or `output` is a directory with something in it.
    """
    output, config = Path(output), tokenizer.config
    foreign = {
        "a linear path beside the net": config.net.linear_path,
        "normalised latents": config.normalize_latents,
        f"{config.net.groups} groups in its norms instead of {_GROUPS}": config.net.groups != _GROUPS,
    }
    if any(foreign.values()):
        parts = ", ".join(name for name, is_there in foreign.items() if is_there)
        raise ValueError(f"this image tokenizer has no published form: it has {parts}; train one of that shape instead")
    leaves = leaf_paths({"params": tokenizer.params, "codebook_CE": tokenizer.codebook_CE})
    tensors = {}
    for path, (name, _) in published_names(config).items():
        value = np.asarray(leaves[path], np.float32)
        tensors[name] = np.ascontiguousarray(value.transpose(3, 2, 0, 1) if value.ndim == 4 else value)
    entries = [(name, value.shape) for name, value in tensors.items()]
    if output.suffix == ".safetensors":
        write_file(output, entries, "float32", tensors.__getitem__, {"format": "pt"})
    elif output.suffix in torch_files.SUFFIXES:
        torch_files.write_state_dict(output, tensors)
    elif output.suffix:
        raise ValueError(f"--output={output} must end in .safetensors or .ckpt, or name a directory")
    else:
        with whole_directory(output) as directory:
            write_file(directory / "model.safetensors", entries, "float32", tensors.__getitem__, {"format": "pt"})
            described = json.dumps(_to_transformers(config), indent=2, sort_keys=True)
            (directory / "config.json").write_text(described + "\n", encoding="utf-8")


def published_names(config: ImageTokenizerConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Path in our tree -> (published name, published shape), for every tensor of a tokenizer."""
    found = {}
    for path, leaf in leaf_paths(abstract_tree(config)).items():
        shape = tuple(leaf.shape)
        found[path] = (_published_name(path), (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape)
    return found


def _published_name(path: str) -> str:
    """params/encoder/down_1_block_0/conv1/kernel -> encoder.down.1.block.0.conv1.weight."""
    if path == "codebook_CE":
        return "quantize.embedding.weight"
    name = path.removeprefix("params/").replace("/", ".")
    name = re.sub(r"\.(down|up)_(\d+)_(block|attn)_(\d+)\.", r".\1.\2.\3.\4.", name)
    name = re.sub(r"\.(down|up)_(\d+)_(downsample|upsample)\.", r".\1.\2.\3.conv.", name)
    name = re.sub(r"^(encoder|decoder)\.((post_)?quant_conv)\.", r"\2.", name)
    return re.sub(r"\.(kernel|scale)$", ".weight", name)


def _config(shapes: Shapes, image_size: int | None, source: Path) -> ImageTokenizerConfig:
    """Sizes of the net, off the shapes of its tensors."""

    def size(name: str, axis: int) -> int:
        if name not in shapes or len(shapes[name]) <= axis:
            raise ValueError(f"{source} holds no published VQGAN: it lacks the tensor {name}")
        return shapes[name][axis]

    def count(pattern: str) -> int:
        return len({match[1] for name in shapes if (match := re.match(pattern, name))})

    channels, num_levels = size("encoder.conv_in.weight", 0), count(r"encoder\.down\.(\d+)\.")
    patch_size = math.isqrt(size("encoder.conv_in.weight", 1) // 3)
    widths = [size(f"encoder.down.{level}.block.0.conv1.weight", 0) for level in range(num_levels)]
    attends = [f"encoder.down.{level}.attn.0.q.weight" in shapes for level in range(num_levels)]
    if image_size is None:
        raise ValueError(
            f"{source} does not say how large its pictures are; pass --image_size (Chameleon's are 512, taming's 256)"
        )
    if not channels or not patch_size or not num_levels or any(width % channels for width in widths):
        raise ValueError(f"{source} holds no published VQGAN: its levels have {widths} channels after {channels}")
    net = VQGANConfig(
        image_size=image_size,
        patch_size=patch_size,
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        num_res_blocks=count(r"encoder\.down\.0\.block\.(\d+)\."),
        latent_channels=size("encoder.conv_out.weight", 0),
        code_dim=size("quant_conv.weight", 0),
        groups=_GROUPS,
        attention_resolutions=tuple(image_size // patch_size // 2**i for i, there in enumerate(attends) if there),
    )
    return dataclasses.replace(
        CHAMELEON,
        net=net,
        num_codes=size("quantize.embedding.weight", 0),
        encoder_only=not any(name.startswith("decoder.") for name in shapes),
    )


def _recorded_image_size(source: Path) -> int | None:
    path = source / "config.json"
    if not source.is_dir() or not path.exists():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        recorded = config.get("vq_config", config).get("resolution")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is not the config of a Chameleon or its image tokenizer: {error}") from None
    return int(recorded) if recorded else None


def _open(source: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """(shapes by published name, a function that reads a tensor by published name)."""
    if source.suffix in torch_files.SUFFIXES:
        tensors = torch_files.read_state_dict(source)
        return {name: tensor.shape for name, tensor in tensors.items()}, lambda name: tensors[name].read()
    shapes: dict[str, tuple[int, ...]] = {}
    origin: dict[str, tuple[Path, str]] = {}
    for path in _safetensors_files(source):
        try:
            with safetensors.safe_open(path, "numpy") as file:
                for stored in file.keys():
                    name = stored.removeprefix(IMAGE_TOKENIZER_PREFIX)
                    shapes[name] = tuple(file.get_slice(stored).get_shape())
                    origin[name] = path, stored
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} cannot be read as safetensors ({error}): fetch or export it again") from None
    inside = {name for name, (_, stored) in origin.items() if stored.startswith(IMAGE_TOKENIZER_PREFIX)}
    if inside:  # a whole Chameleon: the rest is the language model
        shapes = {name: shape for name, shape in shapes.items() if name in inside}

    def read(name: str) -> np.ndarray:
        path, stored = origin[name]
        with safetensors.safe_open(path, "numpy") as file:
            return file.get_tensor(stored)

    return shapes, read


def _safetensors_files(source: Path) -> list[Path]:
    """The files that hold the net; of a sharded Chameleon only those, so that the others need not be there."""
    if not source.is_dir():
        return [source]
    index = source / INDEX_NAME
    if not index.exists():
        names = ["model.safetensors"]
    else:
        try:
            placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({file for name, file in placed.items() if name.startswith(IMAGE_TOKENIZER_PREFIX)})
        except (json.JSONDecodeError, KeyError, AttributeError, UnicodeDecodeError) as error:
            raise ValueError(f"{index} is not an index of shards: {error!r}") from None
        if not names:
            raise ValueError(f"{source} holds no image tokenizer: its index names no {IMAGE_TOKENIZER_PREFIX}*")
    missing = [name for name in names if not (source / name).is_file()]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}; fetch or export it again")
    return [source / name for name in names]


def _to_transformers(config: ImageTokenizerConfig) -> dict[str, Any]:
    """The `config.json` of a `ChameleonVQVAE`."""
    net = config.net
    return {
        "architectures": ["ChameleonVQVAE"],
        "model_type": "chameleon_vqgan",
        "attn_resolutions": list(net.attention_resolutions) or None,
        "attn_type": "vanilla",
        "base_channels": net.channels,
        "channel_multiplier": list(net.multipliers),
        "double_latent": False,
        "dropout": 0.0,
        "dtype": "float32",
        "embed_dim": net.code_dim,
        "in_channels": 3 * net.patch_size**2,
        "latent_channels": net.latent_channels,
        "num_embeddings": config.num_codes,
        "num_res_blocks": net.num_res_blocks,
        "resolution": net.image_size // net.patch_size,
    }
