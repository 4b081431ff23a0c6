"""Rows, vocabulary and frozen codebook of a training config: from pre-tokenized data sets, or synthetic without any."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from typing import Any

import numpy as np

from aromni_jax.config import TrainConfig
from aromni_jax.vocab import JointVocab
from data_pipelines.pipeline import BatchIterator, make_train_iterator
from data_pipelines.records import TOKENIZERS_DIR, VOCAB_FILE

_RELEASED_FROM_LENGTH = 2048
"""Synthetic rows this long hold pictures of the released layout (1024 codes), so large models meet its 65,536 rows."""
_SYNTHETIC_CODE_WIDTHS = {True: 256, False: 16}


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What a run learns from. `frozen` holds `image_codebook` [C, E] where perceptual alignment is on, else nothing."""

    vocab: JointVocab
    batches: BatchIterator
    frozen: dict[str, Any]
    tokenizers: pathlib.Path | None

    @property
    def perceptual_dim(self) -> int:
        """Code width E of the perceptual head; 0 for a run without alignment."""
        return self.frozen["image_codebook"].shape[1] if self.frozen else 0

    def save_tokenizers(self, directory: pathlib.Path) -> None:
        """Copies the tokenizers (at least the vocabulary) into the workdir, which then stands on its own.

        What is there stays when it is of the same vocabulary, and goes when it is a leftover of a run that never saved.
        """
        saved = directory / VOCAB_FILE
        if saved.is_file() and saved.read_text(encoding="utf-8") == self.vocab.to_json():
            return
        if directory.exists():
            shutil.rmtree(directory)
        # Only one process of a run comes here, and one killed on the way may have had the same number (in containers).
        partial = directory.with_name(f".{directory.name}.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        if self.tokenizers:
            shutil.copytree(self.tokenizers, partial)
        else:
            partial.mkdir(parents=True)
        (partial / VOCAB_FILE).write_text(self.vocab.to_json(), encoding="utf-8")
        partial.rename(directory)


def open_data(config: TrainConfig, local_rows: np.ndarray) -> TrainingData:
    """The data of a config; `local_rows` are the rows of the global batch that this process reads.

    Raises:
      ValueError: no data set where the config says, data sets of different vocabularies, or perceptual alignment wanted
        where there is no image tokenizer.
    """
    vocab, frozen, tokenizers = vocabulary_and_frozen(config)
    batches = make_train_iterator(
        config.data,
        vocab,
        loss=config.loss,
        seed=config.seed,
        sequence_length=config.sequence_length,
        global_batch_size=config.global_batch_size,
        local_rows=local_rows,
    )
    return TrainingData(vocab, batches, frozen, tokenizers)


def vocabulary_and_frozen(config: TrainConfig) -> tuple[JointVocab, dict[str, Any], pathlib.Path | None]:
    """Vocabulary, frozen arrays and tokenizers folder (None for synthetic rows) of a config; no record is read.

    Raises:
      ValueError: as `open_data` does for tokenizers.
    """
    tokenizers = None if config.data.mixture == "synthetic" else _tokenizers_of(config)
    vocab = _read_vocab(tokenizers) if tokenizers else _synthetic_vocab(config.sequence_length)
    if not (config.loss.perceptual_weight and vocab.image):
        return vocab, {}, tokenizers
    return vocab, {"image_codebook": _codebook(tokenizers, vocab)}, tokenizers


def _synthetic_vocab(sequence_length: int) -> JointVocab:
    if sequence_length >= _RELEASED_FROM_LENGTH:
        return JointVocab.released()
    return JointVocab.build(text_size=256, image_codes=64, tokens_per_image=16, speech_codes=(32,))


def _tokenizers_of(config: TrainConfig) -> pathlib.Path:
    """The tokenizers folder of the first data set; the others are compared with its vocabulary when they are opened."""
    if isinstance(config.data.mixture, str) or not config.data.mixture:
        raise ValueError(
            f"config key 'data.mixture': {config.data.mixture!r} names no data set; give "
            '{"name": {"path": DIR, "weight": share}} or "synthetic"'
        )
    name, entry = next(iter(config.data.mixture.items()))
    if "path" not in entry:
        raise ValueError(f"config key 'data.mixture.{name}.path': missing; give the folder `aromni pretokenize` wrote")
    directory = pathlib.Path(entry["path"])
    if not (directory / TOKENIZERS_DIR / VOCAB_FILE).is_file():
        raise ValueError(
            f"config key 'data.mixture.{name}.path': {directory} is not a pre-tokenized data set (no {TOKENIZERS_DIR}/"
            f"{VOCAB_FILE}); make it with `aromni pretokenize`, or try the machine with --config.data.mixture=synthetic"
        )
    return directory / TOKENIZERS_DIR


def _read_vocab(tokenizers: pathlib.Path) -> JointVocab:
    return JointVocab.from_json((tokenizers / VOCAB_FILE).read_text(encoding="utf-8"))


def _codebook(tokenizers: pathlib.Path | None, vocab: JointVocab) -> np.ndarray:
    """float32 [C, E] embeddings of the image codes: the image tokenizer's, or random ones for synthetic pictures."""
    assert vocab.image
    if tokenizers is None:
        width = _SYNTHETIC_CODE_WIDTHS[vocab == JointVocab.released()]
        return np.random.default_rng(0).standard_normal((vocab.image.size, width)).astype(np.float32)
    if not (tokenizers / "image").is_dir():
        raise ValueError(
            f"{tokenizers} has no image tokenizer, whose codebook loss.perceptual_weight > 0 compares with; set "
            "loss.perceptual_weight=0"
        )
    from aromni_jax.tokenizers.image import ImageTokenizer

    return ImageTokenizer.load(tokenizers / "image").codebook_CE
