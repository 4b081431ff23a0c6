"""A corpus of random ids with the lengths of the released recipe: to measure packing and reading without any data set.

Documents of text, pictures and speech stand 0.5 : 1 : 2 as in the recipe. A text has 50 to 500 tokens; a picture is
1,024 codes with its two borders and a caption, 1,030 to 1,100 tokens; an utterance of 100 to 800 tokens is its codes
with a transcript. Ids are drawn from the rows that the released layout gives each modality, so that shards compress as
badly as real codes do.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterator

import numpy as np

from aromni_jax.structs import Modality, Role, Task
from aromni_jax.vocab import JointVocab
from data_pipelines.records import TOKENIZERS_DIR, VOCAB_FILE, StoredExample, finalize, write_shard

SHARES = {Task.TEXT: 0.5, Task.TEXT_TO_IMAGE: 1.0, Task.SPEECH_TO_TEXT: 2.0}
"""Task -> its share of documents, the recipe's text : image : speech."""
_LENGTHS = {Task.TEXT: (50, 500), Task.TEXT_TO_IMAGE: (1030, 1100), Task.SPEECH_TO_TEXT: (100, 800)}
_TRANSCRIPT_SHARE = 8
RECORDS_PER_SHARD = 4096


def recipe_lengths(num_documents: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(int32 tokens of each document, int8 tasks): both [num_documents], in an order without pattern."""
    rng = np.random.default_rng([seed, num_documents])
    shares = np.array(list(SHARES.values()))
    tasks_N = rng.choice(np.array([int(task) for task in SHARES], np.int8), num_documents, p=shares / shares.sum())
    lengths_N = np.zeros(num_documents, np.int32)
    for task, (shortest, longest) in _LENGTHS.items():
        chosen = tasks_N == task
        lengths_N[chosen] = rng.integers(shortest, longest + 1, chosen.sum())
    return lengths_N, tasks_N


def write_recipe_corpus(directory: pathlib.Path, num_documents: int, seed: int = 0) -> None:
    """A finished data set of `num_documents` such documents under the released vocabulary, whose tokenizers are that
    vocabulary and nothing else: there is nothing that they could decode."""
    vocab = JointVocab.released()
    tokenizers = directory / TOKENIZERS_DIR
    tokenizers.mkdir(parents=True, exist_ok=True)
    (tokenizers / VOCAB_FILE).write_text(vocab.to_json(), encoding="utf-8")
    lengths_N, tasks_N = recipe_lengths(num_documents, seed)
    starts = range(0, num_documents, RECORDS_PER_SHARD)
    run = hashlib.sha256(f"recipe {num_documents} {seed}".encode()).hexdigest()[:16]
    for shard, start in enumerate(starts):
        places = slice(start, start + RECORDS_PER_SHARD)
        write_shard(
            directory,
            shard,
            _examples(vocab, lengths_N[places], tasks_N[places], np.random.default_rng([seed, shard])),
            vocab_size=vocab.size,
            run=run,
            quarantined={},
            suffix="recipe",
        )
    finalize(directory, len(starts), run=run, vocab=vocab, description={}, suffix="recipe")


def _examples(
    vocab: JointVocab, lengths_N: np.ndarray, tasks_N: np.ndarray, rng: np.random.Generator
) -> Iterator[StoredExample]:
    assert vocab.image
    (speech,) = vocab.speech
    for number, (length, task) in enumerate(zip(lengths_N.tolist(), tasks_N.tolist(), strict=True)):
        words = _drawn(rng, vocab.text.start, vocab.text.size, length - 2)
        bos, eos = np.array([vocab.bos]), np.array([vocab.eos])
        if task == Task.TEXT:
            pieces = [(bos, Modality.TEXT, Role.CONTROL, -1), (words, Modality.TEXT, Role.RESPONSE, 0)]
        elif task == Task.TEXT_TO_IMAGE:
            codes = _drawn(rng, vocab.image.start, vocab.image.size, vocab.tokens_per_image)
            picture = np.concatenate([[vocab.begin_image], codes, [vocab.end_image]])
            pieces = [
                (bos, Modality.TEXT, Role.CONTROL, -1),
                (words[: length - 2 - len(picture)], Modality.TEXT, Role.PROMPT, 0),
                (picture, Modality.IMAGE, Role.RESPONSE, 0),
            ]
        else:
            transcript = words[: length // _TRANSCRIPT_SHARE]
            codes = _drawn(rng, speech.start, speech.size, length - 4 - len(transcript))
            sound = np.concatenate([[vocab.begin_speech], codes, [vocab.end_speech]])
            pieces = [
                (bos, Modality.TEXT, Role.CONTROL, -1),
                (sound, Modality.SPEECH, Role.PROMPT, 0),
                (transcript, Modality.TEXT, Role.RESPONSE, 0),
            ]
        pieces.append((eos, Modality.TEXT, Role.CONTROL, -1))
        spans, start = [], 0
        for ids, modality, role, part in pieces:
            spans.append((start, len(ids), modality, role, 0, part))
            start += len(ids)
        tokens_L = np.concatenate([ids for ids, *_ in pieces]).astype(np.int32)
        yield StoredExample(tokens_L, np.array(spans, np.int32), Task(task), f"recipe/{number}", {})


def _drawn(rng: np.random.Generator, first: int, size: int, count: int) -> np.ndarray:
    return first + rng.integers(0, size, max(count, 0))
