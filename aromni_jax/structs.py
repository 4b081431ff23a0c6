"""The data types that cross rooms: conversations, examples, packed batches, weighted sums, generated tokens.

Every fact (task, role, modality, span border) is recorded here once, when a conversation is encoded, and carried
as an array from then on. Suffix letters follow `aromni_jax.arrays`.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from aromni_jax.arrays import BoolArray, FloatArray, IntArray


class Modality(enum.IntEnum):
    """What a token is made of. Delimiters (begin of image, ...) belong to the modality they enclose."""

    TEXT = 0
    IMAGE = 1
    SPEECH = 2

    @property
    def label(self) -> str:
        return self.name.lower()


class Task(enum.IntEnum):
    """What an example teaches. The integers are stored in shards: append, never renumber."""

    TEXT = 0
    TEXT_TO_IMAGE = 1
    CAPTION = 2
    SPEECH_TO_TEXT = 3
    TEXT_TO_SPEECH = 4
    SPEECH_TO_IMAGE = 5
    QUESTION = 6
    CHAT = 7

    @property
    def label(self) -> str:
        """`text_to_image`: the form used in metrics and configs."""
        return self.name.lower()

    @property
    def command(self) -> str:
        """`text-to-image`: the form used on the command line."""
        return self.label.replace("_", "-")

    @classmethod
    def from_name(cls, name: str) -> Task:
        """Accepts either form; raises ValueError listing the known tasks."""
        try:
            return cls[name.replace("-", "_").upper()]
        except KeyError:
            raise ValueError(f"unknown task {name!r}; known tasks: {', '.join(t.command for t in cls)}") from None


class Role(enum.IntEnum):
    """Who a token speaks for: what was asked, what was heard, what was answered, or the scaffolding between."""

    PROMPT = 0
    TRANSCRIPT = 1
    RESPONSE = 2
    CONTROL = 3


@dataclasses.dataclass(frozen=True)
class Text:
    """A piece of text; `is_transcript` marks what chat answers write between begin of transcript and of response."""

    text: str
    is_transcript: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """A picture as `pixels_HWC` (uint8 RGB), as `codes_P` (int32, raster order), or both."""

    pixels_HWC: np.ndarray | None = None
    codes_P: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Speech:
    """Mono sound as `waveform_T` (float32 in [-1, 1] at `sample_rate_hz`), as `codes_KU` (int32), or both."""

    waveform_T: np.ndarray | None = None
    sample_rate_hz: int | None = None
    codes_KU: np.ndarray | None = None


Part = Text | Image | Speech


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn; `role` is "user" or "assistant"."""

    role: str
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class Span:
    """A run of tokens of one origin inside an example.

    `start` and `length` count tokens; `message` is the index of the turn, -1 for beginning and end of sequence;
    `part` is the index of the part in that turn, -1 for template literals and control tokens.
    """

    start: int
    length: int
    modality: Modality
    role: Role
    message: int
    part: int


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """An encoded conversation: token ids and the facts about them. `spans` cover every token exactly once, in order."""

    tokens_L: np.ndarray
    spans: tuple[Span, ...]
    task: Task
    key: str

    def _painted(self, field: str) -> np.ndarray:
        return np.repeat(
            np.array([getattr(span, field) for span in self.spans], np.int8),
            np.array([span.length for span in self.spans], np.int64),
        )

    @property
    def roles_L(self) -> np.ndarray:
        """int8 `Role` of each token."""
        return self._painted("role")

    @property
    def modality_L(self) -> np.ndarray:
        """int8 `Modality` of each token."""
        return self._painted("modality")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Rows of packed documents, already shifted: `targets_BL[b, l]` is the token that follows `inputs_BL[b, l]`.

    The shift happens per document before packing, so no target crosses a document border:

        document a = [0 5 6 2], document b = [0 7 2]
        inputs   0 5 6 | 0 7 | 1(pad)
        targets  5 6 2 | 7 2 | 1(pad)
        segments 1 1 1   2 2   0
        positions 0 1 2  0 1   0

    `segment_ids_BL == 0` is the only meaning of padding and `loss_weights_BL == 0` the only meaning of ignored.
    `modality_BL`, `perceptual_mask_BL` (image codes that count) and `loss_weights_BL` describe the target,
    `task_BL` the document.
    """

    inputs_BL: IntArray
    targets_BL: IntArray
    segment_ids_BL: IntArray
    positions_BL: IntArray
    loss_weights_BL: FloatArray
    modality_BL: IntArray
    task_BL: IntArray
    perceptual_mask_BL: BoolArray


A = TypeVar("A")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedSum(Generic[A]):
    """A sum and the weight it was taken over: added over chunks, microbatches and devices, divided once at the end."""

    sum: Any
    weight: Any

    def __add__(self, other: WeightedSum) -> WeightedSum:
        return WeightedSum(self.sum + other.sum, self.weight + other.weight)

    def mean(self) -> Any:
        """sum / weight, and 0 where the weight is 0 (safe to differentiate)."""
        safe_weight = jnp.where(self.weight == 0, 1, self.weight)
        return jnp.where(self.weight == 0, 0, self.sum / safe_weight)

    @classmethod
    def zero(cls, shape: tuple[int, ...] = ()) -> WeightedSum:
        return cls(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))


@dataclasses.dataclass(frozen=True)
class TokenEvent:
    """One generated token of one row: `step` counts from the first generated token."""

    row: int
    step: int
    token_id: int
    modality: Modality


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """A finished run of one modality in a generated row; `codes` are codec or tokenizer ids, not joint ids."""

    modality: Modality
    codes: np.ndarray
    is_transcript: bool = False
