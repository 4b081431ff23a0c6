"""Duplicates: the first copy in order stays, whoever made it; the same picture for another task is no copy."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from aromni_jax.structs import Image, Message, Task, Text
from aromni_jax.tokenizers import joint
from aromni_jax.tokenizers.prompts import load_templates
from data_pipelines.duplicates import first_copies, open_dataset
from data_pipelines.pretokenize import pretokenize
from data_pipelines.records import StoredExample, TokenDataset, content_hash, target_counts_MR
from tests.fixtures.data_fakes import config_for, fake_bundle, write_corpus

BUNDLE = fake_bundle()
VOCAB = BUNDLE.vocab()
PICTURE = Image(codes_P=np.arange(16, dtype=np.int32))


def hash_of(task: Task, *parts: Text | Image, templates: str = "quickstart", **options: str) -> int:
    messages = [Message(role, (part,)) for role, part in zip(("user", "assistant")[-len(parts) :], parts, strict=True)]
    example = joint.encode(messages, task, VOCAB, BUNDLE.text, load_templates(templates), **options)
    return content_hash(StoredExample.of(example, {"any": "fact"}))


def test_the_hash_is_of_task_and_parts_alone() -> None:
    same = hash_of(Task.CAPTION, PICTURE, Text("a cat"))
    assert same == hash_of(Task.CAPTION, PICTURE, Text("a cat"), key="another key")
    assert same == hash_of(Task.CAPTION, PICTURE, Text("a cat"), instruction="say what you see")
    assert same == hash_of(Task.CAPTION, PICTURE, Text("a cat"), templates="official-v0.1")
    others = [
        hash_of(Task.QUESTION, PICTURE, Text("a cat")),
        hash_of(Task.TEXT_TO_IMAGE, Text("a cat"), PICTURE),
        hash_of(Task.CAPTION, PICTURE, Text("a cap")),
        hash_of(Task.CAPTION, Image(codes_P=np.arange(16, dtype=np.int32)[::-1]), Text("a cat")),
        hash_of(Task.TEXT, Text("a cat")),
    ]
    assert len({same, *others}) == 6


def test_a_record_without_parts_is_hashed_whole() -> None:
    def bare(*ids: int) -> StoredExample:
        spans_S6 = np.array([[0, len(ids), 0, 3, -1, -1]], np.int32)
        return StoredExample(np.array(ids, np.int32), spans_S6, Task.TEXT, "", {})

    assert content_hash(bare(1, 2)) == content_hash(bare(1, 2)) != content_hash(bare(1, 3))


def test_the_first_in_order_stays_within_and_across_data_sets() -> None:
    first, second = np.array([5, 7, 5, 2**64 - 1], np.uint64), np.array([7, 9, 9], np.uint64)
    masks = first_copies([first, second])
    assert [mask.tolist() for mask in masks] == [[True, True, False, True], [False, True, False]]
    assert [mask.tolist() for mask in first_copies([second, np.zeros(0, np.uint64)])] == [[True, True, False], []]
    assert first_copies([]) == []


def test_stored_hashes_do_not_depend_on_the_workers(tmp_path: pathlib.Path) -> None:
    manifest = write_corpus(tmp_path / "corpus", 40)
    lines = manifest.read_text().splitlines()
    copies = [json.dumps(json.loads(lines[i]) | {"key": f"copy of {i}"}) for i in (3, 7, 3)]
    manifest.write_text("\n".join([*lines, *copies]) + "\n")
    config = config_for(manifest, records_per_shard=9)
    assert pretokenize(config, tmp_path / "one", bundle=BUNDLE)
    for worker in (3, 1, 4, 0, 2):
        pretokenize(config, tmp_path / "five", shard_index=worker, num_shards=5, bundle=BUNDLE)
    one, five = TokenDataset(tmp_path / "one"), TokenDataset(tmp_path / "five")
    np.testing.assert_array_equal(one.hashes_N, five.hashes_N)
    assert one.hashes_N.tolist() == [content_hash(stored) for stored in one]
    (kept_N,) = first_copies([one.hashes_N])
    # Short texts over four words repeat of themselves: equal ones must be, and all copies are, left out.
    assert not kept_N[40:].any()
    assert one.dataset["statistics"]["duplicates"] == (~kept_N).sum()
    seen: set[tuple[int, bytes]] = set()
    for stored, kept in zip(one, kept_N, strict=True):
        identity = int(stored.task), stored.tokens_L.tobytes()
        assert kept == (identity not in seen)
        seen.add(identity)


def test_a_data_set_without_its_copies_is_one_like_any_other(tmp_path: pathlib.Path) -> None:
    manifest = write_corpus(tmp_path / "corpus", 30)
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join([*lines[:20], *lines[3:9], *lines[20:]]) + "\n")
    assert pretokenize(config_for(manifest, records_per_shard=8), tmp_path / "data", bundle=BUNDLE)
    whole, kept = open_dataset(tmp_path / "data", VOCAB), open_dataset(tmp_path / "data", VOCAB, duplicates="drop")
    (kept_N,) = first_copies([whole.hashes_N])
    assert len(whole) == 36 and len(kept) == kept_N.sum() == len(set(whole.hashes_N.tolist())) <= 30
    expected = [stored for stored, is_first in zip(whole, kept_N, strict=True) if is_first]
    assert [stored.key for stored in kept] == [stored.key for stored in expected]
    assert kept.lengths_N.tolist() == [len(stored.tokens_L) for stored in kept]
    assert kept.tasks_N.tolist() == [stored.task for stored in kept]
    assert kept.hashes_N.tolist() == [content_hash(stored) for stored in kept]
    counts_TMR, unigram_V = np.zeros_like(whole.counts_TMR), np.zeros_like(whole.unigram_V)
    for stored in expected:
        counts_TMR[stored.task] += target_counts_MR(stored)
        np.add.at(unigram_V, stored.tokens_L[1:], 1)
    np.testing.assert_array_equal(kept.counts_TMR, counts_TMR)
    np.testing.assert_array_equal(kept.unigram_V, unigram_V)
    last = len(kept) - 1
    assert kept.where(last) == whole.where(35)
    with pytest.raises(IndexError):
        kept[last + 1]
    again = open_dataset(tmp_path / "data", duplicates="drop")
    assert kept.fingerprint == again.fingerprint != whole.fingerprint and int(kept.fingerprint, 16)
    manifest.write_text("\n".join(lines[:3]) + "\n")
    assert pretokenize(config_for(manifest), tmp_path / "no copies", bundle=BUNDLE)
    alone = [open_dataset(tmp_path / "no copies", duplicates=choice) for choice in ("keep", "drop")]  # type: ignore[arg-type]
    assert alone[0].fingerprint == alone[1].fingerprint
