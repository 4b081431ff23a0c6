"""What lies in a directory of Chameleon weights, whichever published layout it has, before any value is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from aromni_jax.interop.chameleon_config import architecture_of
from aromni_jax.interop.consolidated import (
    PARAMS_FILE,
    architecture_of_params,
    consolidated_entries,
    consolidated_name,
)
from aromni_jax.interop.names import TABLE
from aromni_jax.interop.weight_files import LazyTensor, directory_entries, read_json

Rotary = Literal["half_split", "interleaved"]
"""Which features of a head RoPE rotates together: (i, i + H/2), or (2i, 2i + 1)."""

_FIRST_QUERY_NORM = next(rule for rule in TABLE if rule.path == "layers/attention/q_norm/scale").their_name(0)


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A model on disk.

    Attributes:
      layout: what the directory is, in words.
      architecture: `chameleon_config.ARCHITECTURE_FIELDS` by name.
      max_positions: longest sequence the model was made for.
      tensors: what is stored, by the names of the layout.
      name_of: from a name of `interop.names` to that of the layout.
      rotary: the order of query and key rows.
      norm_lead: how many QK-norm vectors are stored, as the leading dimensions of the tensor: () is one for all heads,
        (S,) one for each of S ranks, None one for every head.
    """

    layout: str
    architecture: dict[str, Any]
    max_positions: int
    tensors: Mapping[str, LazyTensor]
    name_of: Callable[[str], str]
    rotary: Rotary
    norm_lead: tuple[int, ...] | None


def open_stored(directory: Path, rotary: Rotary | None = None) -> StoredModel:
    """Looks at the weights in `directory`: a Hugging Face directory, or one with Meta's `params.json`.

    `rotary` says how queries and keys are ordered where the files cannot.

    Raises:
      ValueError: neither of the two, damaged or incomplete files, or an order that cannot be told or is not so.
    """
    if (directory / "config.json").is_file() and not any(directory.glob("consolidated.*pth")):
        return _huggingface(directory, rotary)
    if (directory / PARAMS_FILE).is_file():
        return _consolidated(directory, rotary)
    below = sorted(directory.glob(f"**/{PARAMS_FILE}"))
    hint = f"; give {below[0].parent}, where {PARAMS_FILE} is" if below else ""
    raise ValueError(
        f"{directory} is not a Hugging Face Chameleon directory, it has no config.json, and not one of Meta's, it has "
        f"no {PARAMS_FILE}{hint}"
    )


def _huggingface(directory: Path, rotary: Rotary | None) -> StoredModel:
    config = read_json(directory / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{directory / 'config.json'} is not the config of a model; fetch or export it again")
    architecture = architecture_of(config)
    tensors = directory_entries(directory)
    norm = tensors.get(_FIRST_QUERY_NORM)
    # One vector for all heads is how the lineage of the AR-Omni authors stores QK-norm, whose code rotates interleaved
    # features; transformers stores one vector for each head, and has rotated half-split features in every release. In
    # between, before the first release, there were directories with a vector per head and either order: those have the
    # key qk_layernorm, and nothing in them tells which.
    shared = norm is not None and len(norm.shape) == 1
    if shared and rotary == "half_split":
        raise ValueError(
            f"{directory} has one QK-norm vector for all heads: such files are interleaved, not half_split"
        )
    if not shared and rotary is None and config.get("qk_layernorm"):
        raise ValueError(
            f"{directory} was written by code from before the first release of Chameleon in transformers (config.json "
            "has qk_layernorm): say with --rotary whether its queries and keys are in interleaved order (Anole's own "
            "code) or half_split (transformers)"
        )
    return StoredModel(
        layout="Hugging Face",
        architecture=architecture,
        max_positions=int(config.get("max_position_embeddings") or 4096),
        tensors=tensors,
        name_of=lambda name: name,
        rotary=rotary or ("interleaved" if shared else "half_split"),
        norm_lead=() if shared else None,
    )


def _consolidated(directory: Path, rotary: Rotary | None) -> StoredModel:
    if rotary == "half_split":
        raise ValueError(f"{directory} has Meta's layout, which is interleaved; leave --rotary out")
    architecture = architecture_of_params(directory)
    tensors, num_ranks = consolidated_entries(directory)
    for field in ("num_heads", "num_kv_heads", "mlp_dim"):
        if architecture[field] % num_ranks:
            raise ValueError(
                f"{directory} has {num_ranks} consolidated files, which cannot share {field} = "
                f"{architecture[field]} of {PARAMS_FILE}; remove files that belong to another model"
            )
    table = tensors.get(consolidated_name("model.embed_tokens.weight"))
    if table is None:
        raise ValueError(
            f"{directory}: no file has tok_embeddings.weight; this is not a whole Chameleon, fetch it again"
        )
    return StoredModel(
        layout=f"Meta's, {num_ranks} file(s)",
        architecture={"vocab_size": table.shape[0], **architecture},
        # As transformers converts it: params.json does not say.
        max_positions=4096 if architecture["rope_theta"] <= 10_000 else 16384,
        tensors=tensors,
        name_of=consolidated_name,
        rotary="interleaved",
        norm_lead=(num_ranks,),
    )
