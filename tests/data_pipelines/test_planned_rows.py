"""Streams through changes: every record once in every pass of its data set, whatever else happens to the run."""

from __future__ import annotations

import collections
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from aromni_jax.config import DataConfig, LossConfig
from data_pipelines.document_stream import Cursor
from data_pipelines.mixing import Mixture
from data_pipelines.pipeline import BatchIterator, make_train_iterator
from data_pipelines.planned_rows import PlannedRows, _read_plan, _write_plan
from data_pipelines.records import TokenDataset
from tests.fixtures.data_fakes import fake_bundle, make_dataset

VOCAB = fake_bundle().vocab()
LOSS = LossConfig("balanced", 1.0, "predict", 0.0, 64)
LENGTH = 128
SIZES = {"a": 61, "b": 30, "c": 17}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("streams")
    return {name: str(make_dataset(root, size, i, name)) for i, (name, size) in enumerate(SIZES.items())}


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipelines.document_stream.SEGMENT_DOCUMENTS", 40)


def iterator(paths: dict[str, str], weights: dict[str, float | None], batch: int = 3, **changes: Any) -> BatchIterator:
    mixture = {n: {"path": paths[n]} | ({} if w is None else {"weight": w}) for n, w in weights.items()}
    workers = changes.pop("workers", 0)
    return make_train_iterator(
        DataConfig(mixture, "examples", workers, 2, **changes),  # type: ignore[arg-type]
        VOCAB,
        loss=LOSS,
        seed=changes.pop("seed", 0),
        sequence_length=LENGTH,
        global_batch_size=batch,
    )


def draw(batches: BatchIterator, num_steps: int) -> list[str]:
    """Keys of the next steps, in order."""
    found = []
    for _ in range(num_steps):
        next(batches)
        found += batches.describe_batch(batches.state()["next_step"])
    return found


def draw_records(batches: BatchIterator, num_steps: int) -> list[tuple[str, int]]:
    """(data set, record) of the next steps: keys of two data sets may be equal."""
    rows, found = batches._rows, []
    assert isinstance(rows, PlannedRows)
    for _ in range(num_steps):
        first = batches._num_drawn * batches._global_batch_size
        for index in range(first, first + batches._global_batch_size):
            if place := batches.place(index):
                held = rows._segment(place[0])
                for document in held[place[1]].tolist():
                    name = rows._names[held.documents.dataset_N[document]]
                    found.append((name, int(held.documents.record_N[document])))
        next(batches)
    return found


def test_every_record_once_in_each_pass_through_changes_of_everything(paths: dict[str, str]) -> None:
    """Weights, data sets, batch size, workers and temperature change between starts; data sets leave and return."""
    starts: list[tuple[dict[str, float | None], dict[str, Any], int]] = [
        ({"a": None, "b": None}, {}, 4),
        ({"a": 1.0, "b": 1.0}, {"batch": 5}, 3),
        ({"b": 1.0, "a": 3.0, "c": 1.0}, {"workers": 2}, 2),
        ({"c": 1.0, "a": 1.0}, {"temperature": 2.0}, 6),
        ({"c": 1.0, "a": 1.0}, {"temperature": 2.0, "workers": 1}, 3),
        ({"a": None, "b": None, "c": None}, {"batch": 1}, 40),
        ({"a": 5.0, "b": 1.0, "c": 1.0}, {"batch": 7}, 12),
    ]
    drawn: list[tuple[str, int]] = []
    state: dict[str, Any] | None = None
    for weights, changes, num_steps in starts:
        batches = iterator(paths, weights, **changes)
        if state:
            batches.restore(json.loads(json.dumps(state)))
        drawn += draw_records(batches, num_steps)
        state = batches.state()
        seen = collections.defaultdict(list)
        for name, record in drawn:
            seen[name].append(record)
        for name, records in seen.items():
            times = np.bincount(records, minlength=SIZES[name])
            # What a changed mixture left over comes first, so passes follow one another within the rows of a segment.
            assert times.max() - times.min() <= 2 and sum(times) == len(records), (name, times)
    assert state and state["next_step"] == sum(num_steps for _, _, num_steps in starts)


def test_a_pass_that_ends_has_seen_every_record_once(paths: dict[str, str]) -> None:
    """Two epochs, with weights, with others, then without: in the end every record has been read exactly twice."""
    drawn: list[tuple[str, int]] = []
    batches = iterator(paths, {"a": 1.0, "b": 1.0}, when_exhausted="stop", epochs=2)
    drawn += draw_records(batches, 3)
    for weights in ({"a": 2.0, "b": 1.0}, {"a": None, "b": None}):
        state = batches.state()
        batches = iterator(paths, weights, when_exhausted="stop", epochs=2)
        batches.restore(state)
        steps = 4 if weights["a"] else 10_000
        try:
            for _ in range(steps):
                drawn += draw_records(batches, 1)
        except StopIteration:
            pass
    assert collections.Counter(drawn) == {(name, i): 2 for name in "ab" for i in range(SIZES[name])}


def test_everything_once_and_then_the_end(paths: dict[str, str]) -> None:
    batches = iterator(paths, {"a": None, "b": None, "c": None}, batch=4, when_exhausted="stop")
    drawn = []
    last = None
    while True:
        try:
            found = draw_records(batches, 1)
        except StopIteration:
            break
        drawn += found
        last = batches.state()
    assert collections.Counter(drawn) == {(name, i): 1 for name, size in SIZES.items() for i in range(size)}
    assert last
    again = iterator(paths, {"a": None, "b": None, "c": None}, batch=4, when_exhausted="stop")
    again.restore(last)
    with pytest.raises(StopIteration):
        next(again)


def test_shares_are_those_of_the_tokens_drawn(paths: dict[str, str]) -> None:
    batches = iterator(paths, {"a": 1.0, "b": 1.0, "c": 2.0})
    lengths = {name: TokenDataset(path).lengths_N - 1 for name, path in paths.items()}
    state = None
    for _ in range(2):  # the second time after a change of the mixture
        if state:
            batches = iterator(paths, {"a": 1.0, "b": 3.0})
            batches.restore(state)
        tokens: collections.Counter = collections.Counter()
        for _ in range(17):
            for name, record in draw_records(batches, 1):
                tokens[name] += int(lengths[name][record])
            state = batches.state()
            expected = {name: tokens[name] / sum(tokens.values()) for name in batches.shares(state)}
            assert batches.shares(state) == pytest.approx(expected)
    assert iterator(paths, {"a": None}).shares(iterator(paths, {"a": None}).state()) == {"a": 0.0}


def test_a_state_is_small_and_says_what_it_is_of(paths: dict[str, str]) -> None:
    batches = iterator(paths, {"a": 1.0, "b": 1.0})
    draw(batches, 3)
    assert len(json.dumps(batches.state())) < 800
    changed = iterator(paths, {"a": 1.0, "b": 2.0})
    changed.restore(batches.state())
    cursors = [Cursor.from_json(entry["cursor"]) for entry in changed.state()["rows"]["datasets"]]
    assert any(len(cursor.skipped) for cursor in cursors)
    again = iterator(paths, {"a": 1.0, "b": 2.0})
    again.restore(changed.state())
    assert again.fingerprint == changed.fingerprint and draw(again, 5) == draw(changed, 5)


def test_a_data_set_that_was_made_again_is_refused(paths: dict[str, str], tmp_path: pathlib.Path) -> None:
    state = iterator(paths, {"a": None, "b": None}).state()
    other = {"a": paths["c"], "b": paths["b"]}
    with pytest.raises(ValueError, match="'a' in .* is not the one .* made again"):
        iterator(other, {"a": None, "b": None}).restore(state)
    gone = iterator(paths, {"a": None, "b": None})
    draw(gone, 2)
    state = json.loads(json.dumps(gone.state()).replace(paths["b"], str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="nowhere is not a finished data set"):
        iterator(paths, {"a": None}).restore(state)


def test_copies_are_left_out_through_a_change_of_mixture(paths: dict[str, str], tmp_path: pathlib.Path) -> None:
    """Records of the fake corpus that say the same words are copies: dropped, the first of them comes once."""
    here = paths | {"copies": str(make_dataset(tmp_path, 200, 5, "copies"))}
    kept = len(np.unique(TokenDataset(here["copies"]).hashes_N))
    assert kept < 200
    drop: dict[str, Any] = {"duplicates": "drop", "when_exhausted": "stop"}
    batches = iterator(here, {"copies": 1.0, "a": 1.0}, **drop)
    drawn = draw_records(batches, 3)
    state = json.loads(json.dumps(batches.state()))
    batches = iterator(here, {"c": None, "copies": None}, **drop)
    batches.restore(state)
    with pytest.raises(StopIteration):
        for _ in range(10_000):
            drawn += draw_records(batches, 1)
    times = collections.Counter(record for name, record in drawn if name == "copies")
    assert times == {record: 1 for record in range(kept)}


def test_plans_are_stored_and_made_again_when_stale_or_damaged(tmp_path: pathlib.Path) -> None:
    data = make_dataset(tmp_path, 90)
    mixture = Mixture(DataConfig({"a": {"path": str(data)}}, "examples", 0, 1), VOCAB)
    rows = PlannedRows.of(mixture, LENGTH, seed=0)
    plan = rows._segment(0).plan
    (stored,) = (data / "plans" / rows.fingerprint).iterdir()
    assert stored.name == "000000.npz"
    stored.write_bytes(stored.read_bytes()[:50])
    again = PlannedRows.of(mixture, LENGTH, seed=0)
    np.testing.assert_array_equal(again._segment(0).plan.documents_N, plan.documents_N)
    content = bytearray(stored.read_bytes())
    content[len(content) // 2] ^= 1
    stored.write_bytes(bytes(content))
    once_more = PlannedRows.of(mixture, LENGTH, seed=0)
    np.testing.assert_array_equal(once_more._segment(0).plan.documents_N, plan.documents_N)
    assert PlannedRows.of(mixture, 160, seed=0).fingerprint != rows.fingerprint
    for segment in range(7):
        rows.num_rows(segment)
    assert sorted(path.name for path in stored.parent.iterdir()) == [f"{i:06d}.npz" for i in range(3, 7)]


def test_plans_do_not_pile_up_and_no_flipped_bit_ends_a_run(tmp_path: pathlib.Path) -> None:
    """Batches of many segments of three documents, drawn by four threads; then every bit of a stored plan."""
    data = make_dataset(tmp_path, 3)
    batches = iterator({"a": str(data)}, {"a": None}, batch=48, workers=4)
    for _ in range(4):
        next(batches)
    stored = sorted((data / "plans").rglob("[0-9]*.npz"))
    assert 0 < len(stored) <= 4
    # The threads go on drawing, and drop plans that are read to their end.
    whole = next(plan for path in reversed(stored) if (plan := _read_plan(path, LENGTH)))
    own = tmp_path / "plan.npz"
    _write_plan(own, whole)
    content = own.read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        own.write_bytes(damaged)
        found = _read_plan(own, LENGTH)
        if found is not None:
            np.testing.assert_array_equal(found.documents_N, whole.documents_N)
            np.testing.assert_array_equal(found.starts_R, whole.starts_R)


def test_a_record_longer_than_the_row_is_named(paths: dict[str, str]) -> None:
    dataset = TokenDataset(paths["a"])
    longest = int(dataset.lengths_N.argmax())
    mixture = Mixture(DataConfig({"a": {"path": paths["a"]}}, "examples", 0, 1), VOCAB)
    with pytest.raises(ValueError, match=f"record '{dataset[longest].key}'.*sequence_length 30 holds 31"):
        PlannedRows.of(mixture, 30, seed=0)
