"""What pre-tokenizing can be told: the keys of `configs/pretokenize.py`, and which of them shape a shard."""

from __future__ import annotations

import dataclasses
from typing import Any

from data_pipelines.augmentation import AugmentationConfig
from data_pipelines.length_limits import LengthLimits, TooLong

_SHAPES_NO_SHARD = (
    *("source", "tasks", "columns", "tokenizers", "templates"),  # in fingerprints of their own
    *("media_batch_size", "max_bad_fraction"),
)


@dataclasses.dataclass(frozen=True)
class PretokenizeConfig:
    """What becomes a data set.

    `source` is a JSONL manifest or `kind:path` (see `source_kinds`), `split` the part of it to take ("" for all),
    `heldout_fraction` the share of groups that is held out where records name no split, `tasks` what is made of a
    record that can teach several (names with commas between; "" for all), `columns` where a table holds what
    (`tables.TableSource`). `tokenizers` is a saved TokenizerBundle, or a directory of its parts. Records that cannot
    be used go to the quarantine file with the reason; more than `max_bad_fraction` of them stop the run.
    `media_batch_size` files for each device of a tokenizer are read, and then encoded, at a time.

    A document of fewer than `min_tokens` tokens is left out. One of more than `max_tokens` (0: no limit) is left out
    (`too_long` "drop") or stops the run ("error"); a document of plain text is cut to the limit ("truncate_text") or
    becomes several ("split_text"), and any other is left out. All of them are counted and named with the reason.

    Draws depend on `seed` and the key of a record. `unconditional_fraction` of the records whose answer is a picture
    that words or speech ask for is stored a second time without the question, which is what guidance compares with;
    `min_tokens` is about the first.
    """

    source: str
    split: str
    tokenizers: str
    templates: str
    heldout_fraction: float = 0.0
    tasks: str = ""
    records_per_shard: int = 4096
    media_batch_size: int = 64
    min_tokens: int = 0
    max_tokens: int = 0
    too_long: TooLong = "drop"
    max_bad_fraction: float = 0.01
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    seed: int = 0
    unconditional_fraction: float = 0.0
    augmentation: AugmentationConfig = dataclasses.field(default_factory=AugmentationConfig)

    def __post_init__(self) -> None:
        for name in ("records_per_shard", "media_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"config key '{name}': must be at least 1, not {getattr(self, name)}")
        for name in ("max_bad_fraction", "unconditional_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"config key '{name}': must be in 0..1, not {getattr(self, name)}")
        self.limits  # noqa: B018 - checks them

    @property
    def limits(self) -> LengthLimits:
        """How long documents may be; ValueError naming the key that makes no sense."""
        return LengthLimits(self.min_tokens, self.max_tokens, self.too_long)

    @property
    def settings_of_shards(self) -> dict[str, Any]:
        """What a shard depends on, but for what has a fingerprint: source, tokenizers, templates, noises and rooms."""
        fields = dataclasses.asdict(self)
        settings = {name: value for name, value in fields.items() if name not in _SHAPES_NO_SHARD}
        for name in ("noise", "room"):
            del settings["augmentation"][name]
        return settings
