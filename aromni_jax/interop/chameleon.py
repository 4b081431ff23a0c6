"""Chameleon directories: writing Hugging Face's from our parameters, and reading published ones as if they were ours.

Both ends are a `TensorSource`: a checkpoint, a tree in memory and a Chameleon directory all answer "the q projection of
layer 3", in our layout. Export reads a source one tensor at a time; import is the same question asked of a directory.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

import aromni_jax
from aromni_jax.config import from_mapping
from aromni_jax.interop import names
from aromni_jax.interop.chameleon_config import (
    ARCHITECTURE_FIELDS,
    generation_config,
    model_card,
    to_chameleon,
)
from aromni_jax.interop.container import DTYPES, whole_directory, write_file, write_shards
from aromni_jax.interop.stored_model import Rotary, open_stored
from aromni_jax.interop.weight_files import read_json, safetensors_entries
from aromni_jax.models.config import ModelConfig
from aromni_jax.vocab import JointVocab

EXTRA_FILE = "aromni_extra.safetensors"
METADATA_FILE = "aromni.json"
TOKENIZERS_DIR = "tokenizers"
IMAGE_TOKENIZER_PREFIX = "model.vqmodel."
_QK_NORMS = ("layers/attention/q_norm/", "layers/attention/k_norm/")


class TensorSource(Protocol):
    """Parameters by path ("layers/attention/q"), one tensor at a time."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path -> full shape, layers included, of everything there is."""
        ...

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """The whole tensor, or the slice of one layer of a stacked one."""
        ...


class TreeSource:
    """A `TensorSource` over a parameter tree in memory (numpy or jax arrays)."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._leaves = names.leaf_paths(params)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {path: tuple(leaf.shape) for path, leaf in self._leaves.items()}

    def read(self, path: str, layer: int | None) -> np.ndarray:
        leaf = self._leaves[path]
        return np.asarray(leaf if layer is None else leaf[layer])


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What an export says about where it comes from; everything is written to `aromni.json`."""

    step: int
    template: str = ""
    data_fingerprint: str = ""
    uses_ema: bool = False
    max_positions: int = 4096


def full_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter of `model`, stacked layers included."""
    dims = names.dimensions(model)
    return {
        rule.path: ((model.num_layers,) if rule.per_layer else ()) + rule.our_shape(dims) for rule in names.rules(model)
    }


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises one ValueError that names every tensor missing from, unknown in, or misshapen in `where`."""
    troubles = [f"missing {name} {list(expected[name])}" for name in expected if name not in found]
    troubles += [f"unknown {name} {list(found[name])}" for name in found if name not in expected]
    troubles += [
        f"{name} has shape {list(found[name])}, the config says {list(expected[name])}"
        for name in expected
        if name in found and tuple(found[name]) != tuple(expected[name])
    ]
    if troubles:
        shown = "; ".join(troubles[:8]) + (f"; and {len(troubles) - 8} more" if len(troubles) > 8 else "")
        raise ValueError(f"{where} does not hold this model: {shown}")


def export_chameleon(
    source: TensorSource,
    model: ModelConfig,
    vocab: JointVocab,
    output: Path,
    *,
    provenance: Provenance,
    dtype: str = "bfloat16",
    tokenizers: Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Path]:
    """Writes a directory that `transformers.ChameleonForConditionalGeneration.from_pretrained` loads.

    Tensors are read, converted and written one by one. The directory appears when it is complete.

    Args:
      tokenizers: directory copied to `tokenizers/`.
      overwrite: an export that is at `output` goes.
      progress: called with the name of each tensor before it is read.

    Returns:
      The files with weights.

    Raises:
      ValueError: `output` is taken, `source` does not hold `model`, or the model has no Chameleon form.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype} is not one of {', '.join(DTYPES)}")
    if vocab.size != model.vocab_size:
        raise ValueError(f"the vocabulary has {vocab.size} rows, the model {model.vocab_size}")
    rules, dims = names.rules(model), names.dimensions(model)
    check_shapes(source.shapes(), full_shapes(model), "the checkpoint")
    origin = {rule.their_name(layer): (rule, layer) for rule in rules for layer in names.layers_of(rule, model)}

    def read(name: str) -> np.ndarray:
        progress(name)
        rule, layer = origin[name]
        return rule.to_theirs(source.read(rule.path, layer), dims)

    def entries(extra: bool) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, rule.their_shape(dims)) for name, (rule, _) in origin.items() if rule.is_extra == extra]

    metadata = {
        "format": 1,
        "package_version": aromni_jax.__version__,
        "model": dataclasses.asdict(model),
        "vocab": json.loads(vocab.to_json()),
        "vocab_fingerprint": vocab.fingerprint,
        "dtype": dtype,
        **dataclasses.asdict(provenance),
    }
    config = to_chameleon(model, vocab, dtype=dtype, max_positions=provenance.max_positions)
    with whole_directory(output, replaces=METADATA_FILE if overwrite else None) as directory:
        written = write_shards(
            directory,
            entries(extra=False),
            dtype=dtype,
            read=read,
            max_shard_bytes=max_shard_bytes,
            metadata={"format": "pt"},
        )
        if entries(extra=True):
            write_file(directory / EXTRA_FILE, entries(extra=True), dtype, read, {"format": "pt"})
            written.append(directory / EXTRA_FILE)
        _write_json(directory / "config.json", config)
        _write_json(directory / "generation_config.json", generation_config(vocab))
        _write_json(directory / METADATA_FILE, metadata)
        (directory / "README.md").write_text(model_card(metadata), encoding="utf-8")
        if tokenizers is not None:
            shutil.copytree(tokenizers, directory / TOKENIZERS_DIR)
    return [output / path.name for path in written]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class ChameleonDirectory:
    """A directory of Chameleon weights as a `TensorSource` in our layout.

    Our exports, Chameleon, Anole and AR-Omni as Hugging Face directories (safetensors or torch), and Meta's own layout.
    Names and shapes are checked on opening; values are read when asked for. Query and key rows that are stored for
    interleaved rotation (`stored_model`) are reordered on the way, which changes no logit.

    Args:
      vocab: what the rows mean, for a directory that does not say; without it, Chameleon's 65,536 rows have the layout
        of the released weights.
      rotary: order of query and key rows, for the few directories that cannot say (`stored_model.open_stored`).

    Attributes:
      layout, rotary: what kind of directory it is, in words, and the order of its query and key rows.
      assumed_vocab: True where the source does not say what its rows mean, and nobody else did.
      model, vocab, provenance: what the directory holds.
      dtype: what `read` gives: "bfloat16" where every tensor is stored so, else "float32" (exact for all that is read).
      tokenizers: its `tokenizers/`, or None.
      left_out: names of tensors that belong to the source's own image tokenizer.

    Raises:
      ValueError: naming the tensors that are missing, unknown or misshapen, the file that is cut short, or the key of
        the config that our decoder cannot honour.
    """

    def __init__(self, directory: Path, vocab: JointVocab | None = None, rotary: Rotary | None = None) -> None:
        self.directory = Path(directory)
        self._stored = open_stored(self.directory, rotary)
        self.layout, self.rotary = self._stored.layout, self._stored.rotary
        self.assumed_vocab = vocab is None and not (self.directory / METADATA_FILE).exists()
        self.model, self.vocab, self.provenance = self._describe(vocab)
        tokenizers = self.directory / TOKENIZERS_DIR
        self.tokenizers = tokenizers if tokenizers.is_dir() else None
        self._tensors = dict(self._stored.tensors)
        if (self.directory / EXTRA_FILE).exists():
            self._tensors |= safetensors_entries(self.directory / EXTRA_FILE)
        self.left_out = tuple(name for name in self._tensors if name.startswith(IMAGE_TOKENIZER_PREFIX))
        self._dims = names.dimensions(self.model)
        self._rules = {rule.path: rule for rule in names.rules(self.model)}
        check_shapes(
            {name: tensor.shape for name, tensor in self._tensors.items() if name not in self.left_out},
            {
                self._name(rule, layer): self._stored_shape(rule)
                for rule in self._rules.values()
                for layer in names.layers_of(rule, self.model)
            },
            str(self.directory),
        )
        used = {tensor.dtype for name, tensor in self._tensors.items() if name not in self.left_out}
        self.dtype: Literal["float32", "bfloat16"] = "bfloat16" if used == {DTYPES["bfloat16"][1]} else "float32"

    def _describe(self, given: JointVocab | None) -> tuple[ModelConfig, JointVocab, Provenance]:
        architecture = self._stored.architecture
        path = self.directory / METADATA_FILE
        if not path.exists():
            vocab = given or JointVocab.released()
            if architecture["vocab_size"] != vocab.size:
                what = "the given vocabulary has" if given else f"it has no {METADATA_FILE}, and Chameleon's layout has"
                raise ValueError(
                    f"{self.directory} has {architecture['vocab_size']} rows of vocabulary, of which nothing says what "
                    f"they mean: {what} {vocab.size} rows; name a directory with its vocab.json with --tokenizers"
                )
            model = from_mapping(ModelConfig, {**architecture, "perceptual_dim": 0})
            return model, vocab, Provenance(step=0, max_positions=self._stored.max_positions)
        metadata = read_json(path)
        try:
            model = from_mapping(ModelConfig, metadata["model"])
            vocab = JointVocab.from_json(json.dumps(metadata["vocab"]))
            fields = [field.name for field in dataclasses.fields(Provenance)]
            provenance = Provenance(**{name: metadata[name] for name in fields})
            vocab.check_fingerprint(metadata["vocab_fingerprint"], str(path))
        except KeyError as error:
            raise ValueError(f"{path} lacks {error}; export the model again") from None
        for field in ARCHITECTURE_FIELDS:
            if getattr(model, field) != architecture[field]:
                raise ValueError(
                    f"{self.directory}: config.json says {field} = {architecture[field]!r}, {METADATA_FILE} "
                    f"{getattr(model, field)!r}; one of them was edited, export the model again"
                )
        if given is not None and given.fingerprint != vocab.fingerprint:
            raise ValueError(
                f"{path} already says what the rows mean (vocabulary {vocab.fingerprint}), the given tokenizers have "
                f"vocabulary {given.fingerprint}; leave --tokenizers out"
            )
        return model, vocab, provenance

    def _name(self, rule: names.TensorRule, layer: int | None) -> str:
        name = rule.their_name(layer)
        return name if rule.is_extra else self._stored.name_of(name)

    def _stored_shape(self, rule: names.TensorRule) -> tuple[int, ...]:
        if self._stored.norm_lead is not None and rule.path.startswith(_QK_NORMS):
            return (*self._stored.norm_lead, self.model.head_dim)
        return rule.their_shape(self._dims)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return full_shapes(self.model)

    def is_stacked(self, path: str) -> bool:
        """True for a parameter of every layer, of which `read` can give one."""
        return self._rules[path].per_layer

    @property
    def numpy_dtype(self) -> np.dtype:
        return DTYPES[self.dtype][1]

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """One tensor in our layout and `dtype`; `layer` None on a stacked path reads all layers."""
        rule, dtype = self._rules[path], self.numpy_dtype
        if rule.per_layer and layer is None:
            stacked = np.empty(self.shapes()[path], dtype)
            for index in range(self.model.num_layers):
                stacked[index] = self.read(path, index)
            return stacked
        tensor = self._tensors[self._name(rule, layer)].read()
        if self.rotary == "interleaved" and path.startswith(("layers/attention/q", "layers/attention/k")):
            heads = self._dims["N" if path.startswith("layers/attention/q") else "K"]
            deinterleave = names.deinterleave_norm if path.startswith(_QK_NORMS) else names.deinterleave_rows
            tensor = deinterleave(tensor, heads)
        return rule.to_ours(tensor, self._dims).astype(dtype, copy=False)

    def params(self) -> dict[str, Any]:
        """The whole parameter tree as numpy arrays of `dtype`."""
        return names.nested({path: self.read(path, None) for path in self.shapes()})
