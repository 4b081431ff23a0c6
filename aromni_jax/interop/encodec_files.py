"""Hugging Face `EncodecModel` directories (config.json, model.safetensors), read and written.

Weight norm is folded when read and written as a norm and a direction again; both of torch's namings are understood.
Sources: transformers (Apache-2.0) for names and the meaning of the configuration; `facebookresearch/encodec` (MIT) for
the older naming, which WavTokenizer shares.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from aromni_jax.arrays import PyTree
from aromni_jax.interop.container import whole_directory
from aromni_jax.tokenizers import storage
from aromni_jax.tokenizers.nets.seanet import SeanetConfig
from aromni_jax.tokenizers.speech import SpeechTokenizer
from aromni_jax.tokenizers.speech_codecs import SeanetCodec

Naming = Literal["transformers", "encodec"]
"""How a SEANet's tensors are called: by transformers, or by the encodec package."""
Kind = Literal["conv", "transposed", "lstm"]

_KEYS: dict[str, str] = {
    "sampling_rate": "sample_rate_hz",
    "num_filters": "filters",
    "hidden_size": "code_dim",
    "kernel_size": "kernel_size",
    "last_kernel_size": "last_kernel_size",
    "residual_kernel_size": "residual_kernel_size",
    "num_residual_layers": "residual_layers",
    "dilation_growth_rate": "dilation_growth",
    "compress": "compress",
    "num_lstm_layers": "lstm_layers",
    "use_causal_conv": "causal",
    "use_conv_shortcut": "conv_shortcut",
}
"""Key of their config.json -> field of `SeanetConfig`."""
_REQUIRED: dict[str, tuple[Any, str]] = {
    "audio_channels": (1, "stereo models"),
    "normalize": (False, "models that scale each window"),
    "chunk_length_s": (None, "models that cut sound into windows"),
    "norm_type": ("weight_norm", "models with another norm"),
    "trim_right_ratio": (1.0, "models that trim on both sides"),
}
"""What the 24 kHz model has and this reader needs, and what the rest are."""


class Tensors:
    """Tensors of a file, taken out one by one: what is missing, misshapen or left over is named."""

    def __init__(self, tensors: Mapping[str, np.ndarray], source: str) -> None:
        self._left = dict(tensors)
        self._source = source

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """float32 tensor `name`; ValueError when it is missing or has another shape."""
        if name not in self._left:
            raise ValueError(f"{self._source} lacks the tensor {name!r} of shape {list(shape)}")
        tensor = self._left.pop(name)
        if tensor.shape != shape:
            raise ValueError(
                f"{self._source}: tensor {name!r} has shape {list(tensor.shape)}, expected {list(shape)}; "
                "the configuration beside it is of another model"
            )
        return np.asarray(tensor, np.float32)

    def length(self, name: str) -> int:
        """First dimension of a tensor that is not yet taken; ValueError when it is missing or a scalar."""
        if name not in self._left or not self._left[name].ndim:
            raise ValueError(f"{self._source} lacks the tensor {name!r}")
        return self._left[name].shape[0]

    def drop(self, *prefixes: str) -> int:
        """Forgets tensors this project has no use for; returns how many."""
        dropped = [name for name in self._left if name.startswith(prefixes)]
        for name in dropped:
            del self._left[name]
        return len(dropped)

    def finish(self) -> None:
        """ValueError naming a tensor that nobody took."""
        if self._left:
            raise ValueError(f"{self._source} has the unknown tensor {min(self._left)!r} ({len(self._left)} unknown)")


def load_encodec(directory: str | Path, num_codebooks: int | None = None) -> SpeechTokenizer:
    """The speech tokenizer of an `EncodecModel` directory, with its first `num_codebooks` codebooks (default: all).

    Raises:
      FileNotFoundError: config.json or model.safetensors is missing.
      ValueError: another kind of model, a tensor that is missing, extra or misshapen, or no such number of codebooks.
    """
    directory = Path(directory)
    for name in ("config.json", "model.safetensors"):
        if not (directory / name).exists():
            raise FileNotFoundError(f"{directory / name} does not exist; an EncodecModel directory has it")
    codec = codec_of(storage.read_json(directory / "config.json"), str(directory / "config.json"))
    path = directory / "model.safetensors"
    try:
        tensors = Tensors(safetensors.numpy.load_file(path), str(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error
    params = {side: read_seanet(tensors, codec.net, side, "transformers", side) for side in ("encoder", "decoder")}
    shape = (codec.num_codes, codec.net.code_dim)
    codebooks = [tensors.take(f"quantizer.layers.{k}.codebook.embed", shape) for k in range(codec.num_codebooks)]
    for k in range(codec.num_codebooks):
        # Moving averages of training; they have no part in the codes.
        tensors.drop(*(f"quantizer.layers.{k}.codebook.{name}" for name in ("inited", "cluster_size", "embed_avg")))
    tensors.finish()
    tokenizer = SpeechTokenizer(codec, params, np.stack(codebooks))
    return tokenizer if num_codebooks is None else tokenizer.with_codebooks(num_codebooks)


def save_encodec(tokenizer: SpeechTokenizer, directory: str | Path) -> None:
    """Writes a tokenizer of the SEANet family as an `EncodecModel` directory; ValueError when it is of another."""
    codec = tokenizer.codec
    if not isinstance(codec, SeanetCodec) or not codec.net.lstm_layers:
        raise ValueError("only SEANet codecs with an LSTM (EnCodec) can be written as an EncodecModel directory")
    tensors: dict[str, np.ndarray] = {}
    for side in ("encoder", "decoder"):
        tensors |= write_seanet(tokenizer.params[side], codec.net, side, "transformers", side)
    for k, table_CE in enumerate(np.asarray(tokenizer.codebook)):
        prefix = f"quantizer.layers.{k}.codebook"
        tensors |= {f"{prefix}.embed": table_CE, f"{prefix}.embed_avg": table_CE}
        tensors |= {f"{prefix}.cluster_size": np.ones(codec.num_codes, np.float32)}
        tensors |= {f"{prefix}.inited": np.ones(1, np.float32)}
    with whole_directory(Path(directory)) as partial:
        contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        safetensors.numpy.save_file(contiguous, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(config_of(codec), indent=2, sort_keys=True) + "\n")


def codec_of(raw: Mapping[str, Any], source: str) -> SeanetCodec:
    """The codec that a config.json of an EncodecModel describes; ValueError for kinds this reader does not know."""
    if raw.get("model_type") != "encodec":
        raise ValueError(f"{source}: model_type is {raw.get('model_type')!r}, expected 'encodec'")
    for key, (expected, others) in _REQUIRED.items():
        if raw.get(key, expected) != expected:
            raise ValueError(f"{source}: {key} is {raw[key]!r}; {others} are not read, only those with {expected!r}")
    needed = [*_KEYS, "upsampling_ratios", "codebook_size", "target_bandwidths"]
    if missing := [key for key in needed if key not in raw]:
        raise ValueError(f"{source} lacks the key {missing[0]!r}")
    if raw.get("codebook_dim") not in (None, raw["hidden_size"]):
        raise ValueError(f"{source}: codebook_dim {raw['codebook_dim']} must equal hidden_size {raw['hidden_size']}")
    net = SeanetConfig(
        ratios=tuple(reversed(raw["upsampling_ratios"])),
        padding="reflect" if raw.get("pad_mode", "reflect") == "reflect" else "zero",
        **{ours: raw[theirs] for theirs, ours in _KEYS.items()},
    )
    frame_rate = math.ceil(net.sample_rate_hz / net.hop)
    bits_per_code = math.ceil(math.log2(raw["codebook_size"]))
    num_codebooks = int(1000 * raw["target_bandwidths"][-1] // (frame_rate * bits_per_code))
    if num_codebooks < 1:
        raise ValueError(f"{source}: target_bandwidths {raw['target_bandwidths']} leave no codebook")
    return SeanetCodec("seanet", net, raw["codebook_size"], num_codebooks)


def config_of(codec: SeanetCodec) -> dict[str, Any]:
    """Inverse of `codec_of`: what `EncodecModel.from_pretrained` reads. The largest bandwidth has all codebooks."""
    net = codec.net
    bits_per_frame = math.ceil(net.sample_rate_hz / net.hop) * math.ceil(math.log2(codec.num_codes))
    counts = [2**i for i in range(codec.num_codebooks.bit_length()) if 2**i < codec.num_codebooks]
    return {
        "architectures": ["EncodecModel"],
        "model_type": "encodec",
        **{theirs: getattr(net, ours) for theirs, ours in _KEYS.items()},
        **{key: expected for key, (expected, _) in _REQUIRED.items()},
        "upsampling_ratios": list(reversed(net.ratios)),
        "pad_mode": "reflect" if net.padding == "reflect" else "constant",
        "codebook_size": codec.num_codes,
        "codebook_dim": net.code_dim,
        "target_bandwidths": [count * bits_per_frame / 1000 for count in (*counts, codec.num_codebooks)],
    }


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One layer with tensors: our path below the encoder or decoder, its index in their list, its kernel's shape.

    `shape` is ours: [kernel, in, out] of convolutions, [num_layers, width] of an LSTM.
    """

    path: str
    index: str
    kind: Kind
    shape: tuple[int, ...]


def _layers(cfg: SeanetConfig, side: str) -> Iterator[_Layer]:
    """Layers of one side in their order; activations take a place in their list too."""

    def unit(path: str, at: int, width: int) -> Iterator[_Layer]:
        inner = width // cfg.compress
        yield _Layer(f"{path}/wide", f"{at}.block.1", "conv", (cfg.residual_kernel_size, width, inner))
        yield _Layer(f"{path}/pointwise", f"{at}.block.3", "conv", (1, inner, width))
        if cfg.conv_shortcut:
            yield _Layer(f"{path}/shortcut", f"{at}.shortcut", "conv", (1, width, width))

    widest = cfg.filters * 2 ** len(cfg.ratios)
    encoding = side == "encoder"
    width = cfg.filters if encoding else widest
    first = (cfg.kernel_size, 1, width) if encoding else (cfg.kernel_size, cfg.code_dim, width)
    yield _Layer("conv_in", "0", "conv", first)
    at = 1
    if not encoding and cfg.lstm_layers:
        yield _Layer("lstm", str(at), "lstm", (cfg.lstm_layers, width))
        at += 1
    for stage, ratio in enumerate(cfg.ratios if encoding else reversed(cfg.ratios)):
        if not encoding:
            yield _Layer(f"stage_{stage}_up", str(at + 1), "transposed", (2 * ratio, width, width // 2))
            at, width = at + 2, width // 2
        for layer in range(cfg.residual_layers):
            yield from unit(f"stage_{stage}_unit_{layer}", at, width)
            at += 1
        if encoding:
            yield _Layer(f"stage_{stage}_down", str(at + 1), "conv", (2 * ratio, width, 2 * width))
            at, width = at + 2, 2 * width
    if encoding and cfg.lstm_layers:
        yield _Layer("lstm", str(at), "lstm", (cfg.lstm_layers, width))
        at += 1
    last = (cfg.last_kernel_size, width, cfg.code_dim if encoding else 1)
    yield _Layer("conv_out", str(at + 1), "conv", last)


def _module(layer: _Layer, naming: Naming, prefix: str) -> str:
    if naming == "transformers":
        return f"{prefix}.layers.{layer.index}" + (".lstm" if layer.kind == "lstm" else ".conv")
    ending = {"conv": ".conv.conv", "transposed": ".convtr.convtr", "lstm": ".lstm"}[layer.kind]
    return f"{prefix}.model.{layer.index}{ending}"


def read_seanet(tensors: Tensors, cfg: SeanetConfig, side: str, naming: Naming, prefix: str) -> PyTree:
    """Parameters of one side of a SEANet, "encoder" or "decoder", from tensors named `prefix`..."""
    tree: dict[str, Any] = {}
    for layer in _layers(cfg, side):
        module = _module(layer, naming, prefix)
        *parents, leaf = layer.path.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = _read_lstm(tensors, module, layer) if layer.kind == "lstm" else _read_conv(tensors, module, layer)
    return tree


def _read_conv(tensors: Tensors, module: str, layer: _Layer) -> dict[str, np.ndarray]:
    size, inputs, outputs = layer.shape
    theirs = (outputs, inputs, size) if layer.kind == "conv" else (inputs, outputs, size)
    if f"{module}.weight" in tensors:
        weight = tensors.take(f"{module}.weight", theirs)
    else:
        g, v = "weight_g", "weight_v"
        if f"{module}.{v}" not in tensors:
            g, v = "parametrizations.weight.original0", "parametrizations.weight.original1"
        norm = tensors.take(f"{module}.{g}", (theirs[0], 1, 1))
        direction = tensors.take(f"{module}.{v}", theirs)
        weight = direction * (norm / _norm(direction))
    kernel = weight.transpose(2, 1, 0) if layer.kind == "conv" else weight.transpose(2, 0, 1)
    return {"kernel": np.ascontiguousarray(kernel), "bias": tensors.take(f"{module}.bias", (outputs,))}


def _norm(direction: np.ndarray) -> np.ndarray:
    """Length of each slice of the first axis; slices of length 0 count as 1."""
    norm = np.sqrt(np.square(direction.astype(np.float64)).sum(axis=(1, 2), keepdims=True)).astype(np.float32)
    return np.where(norm > 0, norm, np.float32(1))


def _read_lstm(tensors: Tensors, module: str, layer: _Layer) -> dict[str, np.ndarray]:
    num_layers, width = layer.shape
    tree: dict[str, np.ndarray] = {}
    for i in range(num_layers):
        tree[f"kernel_input_{i}"] = tensors.take(f"{module}.weight_ih_l{i}", (4 * width, width)).T
        tree[f"kernel_hidden_{i}"] = tensors.take(f"{module}.weight_hh_l{i}", (4 * width, width)).T
        biases = [tensors.take(f"{module}.bias_{name}_l{i}", (4 * width,)) for name in ("ih", "hh")]
        tree[f"bias_{i}"] = biases[0] + biases[1]
    return tree


def write_seanet(tree: PyTree, cfg: SeanetConfig, side: str, naming: Naming, prefix: str) -> dict[str, np.ndarray]:
    """Inverse of `read_seanet`: reading the tensors again gives exactly `tree`."""
    tensors: dict[str, np.ndarray] = {}
    g, v = ("weight_g", "weight_v") if naming == "encodec" else ("original0", "original1")
    weight_prefix = "" if naming == "encodec" else "parametrizations.weight."
    flat = storage.flatten(tree)
    for layer in _layers(cfg, side):
        module = _module(layer, naming, prefix)
        if layer.kind == "lstm":
            for i in range(layer.shape[0]):
                tensors[f"{module}.weight_ih_l{i}"] = flat[f"{layer.path}/kernel_input_{i}"].T
                tensors[f"{module}.weight_hh_l{i}"] = flat[f"{layer.path}/kernel_hidden_{i}"].T
                tensors[f"{module}.bias_ih_l{i}"] = flat[f"{layer.path}/bias_{i}"]
                tensors[f"{module}.bias_hh_l{i}"] = np.zeros(4 * layer.shape[1], np.float32)
            continue
        kernel = flat[f"{layer.path}/kernel"]
        weight = kernel.transpose(2, 1, 0) if layer.kind == "conv" else kernel.transpose(1, 2, 0)
        tensors[f"{module}.{weight_prefix}{g}"] = _norm(weight)
        tensors[f"{module}.{weight_prefix}{v}"] = weight
        tensors[f"{module}.bias"] = flat[f"{layer.path}/bias"]
    return tensors
