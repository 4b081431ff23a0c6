"""WavTokenizer checkpoints (PyTorch Lightning `.ckpt`, or the same tensors in `.safetensors`), read and written.

A checkpoint does not say what shape it has; the caller does, and every tensor must fit. What training left beside the
tokenizer is not read: discriminators, losses, and a SEANet decoder that WavTokenizer never calls.

Names: `jishengpeng/WavTokenizer` (MIT).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from aromni_jax.arrays import PyTree
from aromni_jax.interop import torch_files
from aromni_jax.interop.encodec_files import Tensors, read_seanet, write_seanet
from aromni_jax.tokenizers import storage
from aromni_jax.tokenizers.nets import spectral
from aromni_jax.tokenizers.nets.wavtokenizer import SMALL_600_24KHZ_4096, WavTokenizerConfig
from aromni_jax.tokenizers.speech import SpeechTokenizer
from aromni_jax.tokenizers.speech_codecs import WavTokenizerCodec

_ENCODEC = "feature_extractor.encodec"
_CODEBOOK = f"{_ENCODEC}.quantizer.vq.layers.0._codebook"
_READ = ("feature_extractor.", "backbone.", "head.")
"""What the published code reads of a checkpoint; the rest is of training."""
_UNUSED = (f"{_ENCODEC}.decoder.", f"{_CODEBOOK}.inited", f"{_CODEBOOK}.cluster_size", f"{_CODEBOOK}.embed_avg")


def load_wavtokenizer(path: str | Path, net: WavTokenizerConfig = SMALL_600_24KHZ_4096) -> SpeechTokenizer:
    """The speech tokenizer of a checkpoint of the shape `net` (default: the released model of 40 codes a second).

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a checkpoint, one that asks to run code, or a tensor that is missing, extra or misshapen.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the .ckpt or .safetensors file of a WavTokenizer")
    tensors = Tensors(_file_tensors(path), str(path))
    codebook_name = f"{_CODEBOOK}.embed"
    num_codes = tensors.length(codebook_name)
    codebook_CE = tensors.take(codebook_name, (num_codes, net.encoder.code_dim))
    params = {
        "encoder": read_seanet(tensors, net.encoder, "encoder", "encodec", f"{_ENCODEC}.encoder"),
        "decoder": _read_decoder(tensors, net),
    }
    window = tensors.take("head.istft.window", (net.window,))
    if np.abs(window - spectral.hann_window(net.window)).max() > 1e-4:
        raise ValueError(f"{path}: head.istft.window is not a Hann window; only those are read")
    tensors.drop(*_UNUSED)
    tensors.finish()
    return SpeechTokenizer(WavTokenizerCodec("wavtokenizer", net, num_codes), params, codebook_CE)


def save_wavtokenizer(tokenizer: SpeechTokenizer, path: str | Path) -> None:
    """Writes the tokenizer's tensors under their published names, as `.ckpt` or `.safetensors` by the path's suffix.

    The decoder that WavTokenizer never calls is not written; load the file with `strict=False` there.

    Raises:
      ValueError: a tokenizer of another family, or another suffix.
    """
    path, codec = Path(path), tokenizer.codec
    if not isinstance(codec, WavTokenizerCodec):
        raise ValueError("only a WavTokenizer can be written as one")
    tensors = write_seanet(tokenizer.params["encoder"], codec.net.encoder, "encoder", "encodec", f"{_ENCODEC}.encoder")
    tensors |= _write_decoder(tokenizer.params["decoder"], codec.net)
    tensors["head.istft.window"] = spectral.hann_window(codec.net.window)
    tensors |= {f"{_CODEBOOK}.embed": tokenizer.codebook, f"{_CODEBOOK}.embed_avg": tokenizer.codebook}
    tensors |= {f"{_CODEBOOK}.cluster_size": np.ones(codec.num_codes, np.float32)}
    tensors |= {f"{_CODEBOOK}.inited": np.ones(1, np.float32)}
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(tensors, path)
    elif path.suffix == ".ckpt":
        torch_files.write_state_dict(path, tensors)
    else:
        raise ValueError(f"{path} must end in .ckpt or .safetensors")


def _file_tensors(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".safetensors":
        try:
            tensors: dict[str, Any] = safetensors.numpy.load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); fetch it again") from error
        return {name: value for name, value in tensors.items() if name.startswith(_READ)}
    stored = torch_files.read_state_dict(path)
    return {
        name: value.read() for name, value in stored.items() if name.startswith(_READ) and not name.startswith(_UNUSED)
    }


@dataclasses.dataclass(frozen=True)
class _Rule:
    """A parameter of the decoder: our path, their name, their shape, and the axes that turn theirs into ours."""

    path: str
    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()


def _rules(cfg: WavTokenizerConfig) -> list[_Rule]:
    """One row per tensor of `WavTokenizerDecoder`; kernels are [out, in, size] there and [size, in, out] here."""
    width = cfg.width
    rules: list[_Rule] = []

    def conv(path: str, name: str, *shape: int) -> None:
        rules.append(_Rule(f"{path}/kernel", f"{name}.weight", shape, (2, 1, 0)))
        rules.append(_Rule(f"{path}/bias", f"{name}.bias", shape[:1]))

    def dense(path: str, name: str, outputs: int, inputs: int) -> None:
        rules.append(_Rule(f"{path}/kernel", f"{name}.weight", (outputs, inputs), (1, 0)))
        rules.append(_Rule(f"{path}/bias", f"{name}.bias", (outputs,)))

    def norm(path: str, name: str) -> None:
        rules.append(_Rule(f"{path}/scale", f"{name}.weight", (width,)))
        rules.append(_Rule(f"{path}/bias", f"{name}.bias", (width,)))

    def conditioned_norm(path: str, name: str) -> None:
        for leaf in ("scale", "shift"):
            rules.append(_Rule(f"{path}/{leaf}", f"{name}.{leaf}.weight", (cfg.num_conditions, width)))

    conv("embed", "backbone.embed", width, cfg.encoder.code_dim, 7)
    for i in (0, 1, 3, 4):
        for j in (1, 2):
            norm(f"pos_net_{i}/norm{j}", f"backbone.pos_net.{i}.norm{j}")
            conv(f"pos_net_{i}/conv{j}", f"backbone.pos_net.{i}.conv{j}", width, width, 3)
    norm("pos_net_2/norm", "backbone.pos_net.2.norm")
    for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "proj_out")):
        # A convolution of size 1 there, a dense layer here.
        rules.append(
            _Rule(f"pos_net_2/{ours}/kernel", f"backbone.pos_net.2.{theirs}.weight", (width, width, 1), (1, 0, 2))
        )
        rules.append(_Rule(f"pos_net_2/{ours}/bias", f"backbone.pos_net.2.{theirs}.bias", (width,)))
    norm("pos_net_norm", "backbone.pos_net.5")
    conditioned_norm("norm", "backbone.norm")
    for i in range(cfg.num_layers):
        ours, theirs = f"convnext_{i}", f"backbone.convnext.{i}"
        conv(f"{ours}/dwconv", f"{theirs}.dwconv", width, 1, 7)
        conditioned_norm(f"{ours}/norm", f"{theirs}.norm")
        dense(f"{ours}/pwconv1", f"{theirs}.pwconv1", cfg.mlp_dim, width)
        dense(f"{ours}/pwconv2", f"{theirs}.pwconv2", width, cfg.mlp_dim)
        rules.append(_Rule(f"{ours}/gamma", f"{theirs}.gamma", (width,)))
    norm("final_layer_norm", "backbone.final_layer_norm")
    dense("head", "head.out", cfg.window + 2, width)
    return rules


def _read_decoder(tensors: Tensors, cfg: WavTokenizerConfig) -> PyTree:
    tree: dict[str, Any] = {}
    for rule in _rules(cfg):
        value = tensors.take(rule.name, rule.shape)
        if rule.axes:
            value = value.transpose(rule.axes)
        *parents, leaf = rule.path.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = np.ascontiguousarray(value.squeeze(-1) if value.ndim == 3 and rule.shape[-1] == 1 else value)
    return tree


def _write_decoder(tree: PyTree, cfg: WavTokenizerConfig) -> dict[str, np.ndarray]:
    flat = storage.flatten(tree)
    tensors: dict[str, np.ndarray] = {}
    for rule in _rules(cfg):
        value = flat[rule.path].reshape([rule.shape[axis] for axis in rule.axes] or rule.shape)
        tensors[rule.name] = value.transpose(np.argsort(rule.axes)) if rule.axes else value
    return tensors
