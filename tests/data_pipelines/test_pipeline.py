"""Batches: one stream for any hosts, threads, resume and batch size; every record once; damage becomes padding."""

from __future__ import annotations

import collections
import pathlib

import numpy as np
import pytest

from aromni_jax.config import DataConfig, LossConfig
from aromni_jax.structs import PackedBatch, Task
from aromni_jax.tokenizers import joint
from data_pipelines.pipeline import BatchIterator, evaluation_batches, load_examples, make_train_iterator
from data_pipelines.records import TokenDataset
from tests.fixtures.data_fakes import fake_bundle, make_dataset

VOCAB = fake_bundle().vocab()
LOSS = LossConfig("balanced", 1.0, "predict", 0.0, 64)
LENGTH = 128
FIELDS = (
    "inputs_BL targets_BL segment_ids_BL positions_BL loss_weights_BL modality_BL task_BL perceptual_mask_BL".split()
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_dataset(tmp_path_factory.mktemp("pipeline"), 90)


def iterator(
    data: pathlib.Path | str,
    *,
    rows: np.ndarray | None = None,
    workers: int = 0,
    batch: int = 4,
    seed: int = 0,
    length: int = LENGTH,
    shuffle: bool = True,
) -> BatchIterator:
    mixture = data if data == "synthetic" else {"a": {"path": str(data)}}
    config = DataConfig(mixture, "examples", workers, 2, shuffle)  # type: ignore[arg-type]
    return make_train_iterator(
        config, VOCAB, loss=LOSS, seed=seed, sequence_length=length, global_batch_size=batch, local_rows=rows
    )


def stack(batches: list[PackedBatch]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([getattr(batch, name) for batch in batches]) for name in FIELDS}


def assert_same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.mark.parametrize("source", ["data", "synthetic"])
def test_the_stream_does_not_depend_on_hosts_threads_or_resume(source: str, data: pathlib.Path) -> None:
    origin: pathlib.Path | str = data if source == "data" else "synthetic"
    reference_iterator = iterator(origin)
    reference = stack([next(reference_iterator) for _ in range(24)])

    def global_batches(num_hosts: int, workers: int, num: int, state: dict | None, batch: int) -> tuple[list, dict]:
        hosts = [
            iterator(origin, rows=rows, workers=workers, batch=batch) for rows in np.split(np.arange(batch), num_hosts)
        ]
        for host in hosts if state else []:
            host.restore(state)
        found = []
        for _ in range(num):
            found += [next(host) for host in hosts]
        states = [host.state() for host in hosts]
        assert all(s == states[0] for s in states)
        return found, states[0]

    first, state = global_batches(num_hosts=2, workers=1, num=6, state=None, batch=4)
    second, state = global_batches(num_hosts=4, workers=4, num=5, state=state, batch=8)
    third, state = global_batches(num_hosts=1, workers=0, num=8, state=state, batch=4)
    assert state["next_step"] == 19 and state["next_row"] == 96
    assert_same(stack(first + second + third), reference)


def test_every_record_is_read_once_an_epoch(data: pathlib.Path) -> None:
    batches = iterator(data, batch=1)
    num_rows = batches._rows.num_rows(0)
    epochs = []
    for _ in range(2):
        keys: list[str] = []
        for _ in range(num_rows):
            next(batches)
            keys += batches.describe_batch(batches.state()["next_step"])
        epochs.append(keys)
        assert sorted(keys) == sorted(stored.example.key for stored in TokenDataset(data))
    assert epochs[0] != epochs[1]
    unshuffled = iterator(data, batch=1, shuffle=False)
    assert [unshuffled.place(i) for i in range(num_rows + 1)] == [*((0, i) for i in range(num_rows)), (1, 0)]


def test_a_row_holds_its_documents_and_nothing_crosses_them(data: pathlib.Path) -> None:
    examples = {stored.example.key: stored.example for stored in TokenDataset(data)}
    batches = iterator(data, batch=2)
    for step in range(1, 6):
        batch = next(batches)
        keys = iter(batches.describe_batch(step))
        for b in range(2):
            for segment in range(1, batch.segment_ids_BL[b].max() + 1):
                example = examples[next(keys)]
                place = batch.segment_ids_BL[b] == segment
                np.testing.assert_array_equal(batch.inputs_BL[b, place], example.tokens_L[:-1])
                np.testing.assert_array_equal(batch.targets_BL[b, place], example.tokens_L[1:])
                np.testing.assert_array_equal(batch.positions_BL[b, place], np.arange(place.sum()))
                np.testing.assert_array_equal(batch.modality_BL[b, place], example.modality_L[1:])
                assert (batch.task_BL[b, place] == example.task).all()
                assert np.diff(np.flatnonzero(place)).max(initial=1) == 1
            padding = batch.segment_ids_BL[b] == 0
            assert (batch.inputs_BL[b, padding] == VOCAB.pad).all() and not batch.loss_weights_BL[b, padding].any()


def test_rows_are_full_and_weights_have_mean_one(data: pathlib.Path) -> None:
    batches = iterator(data, batch=1)
    rows = stack([next(batches) for _ in range(batches._rows.num_rows(0))])
    assert (rows["segment_ids_BL"] > 0).mean() == pytest.approx(batches.statistics["fill"])
    assert batches.statistics["fill"] > 0.97
    assert rows["loss_weights_BL"].sum() / (rows["segment_ids_BL"] > 0).sum() == pytest.approx(1, rel=1e-3)
    shares = batches.statistics["weight_share"]["modality"]
    assert sum(shares.values()) == pytest.approx(1)


def test_state_of_other_data_is_refused(data: pathlib.Path) -> None:
    state = iterator(data).state()
    for other, message in (
        (iterator(data, seed=1), "another seed"),
        (iterator(data, length=160), "another row_length"),
        (iterator("synthetic"), "plan"),
    ):
        with pytest.raises(ValueError, match=message):
            other.restore(state)


def test_a_damaged_record_becomes_padding_and_is_named(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_dataset(tmp_path, 90)
    whole_iterator = iterator(data, batch=1)
    num_rows = whole_iterator._rows.num_rows(0)
    whole = [next(whole_iterator) for _ in range(num_rows)]
    path = data / "shard_00000.array_record"
    monkeypatch.setattr("data_pipelines.planned_rows._DAMAGED_ALLOWED_AT_ONCE", 40)
    damaged = _hurt_one_record(path)
    batches = iterator(data, batch=1)
    found = [next(batches) for _ in range(num_rows)]
    lost = sum((a.segment_ids_BL > 0).sum() - (b.segment_ids_BL > 0).sum() for a, b in zip(whole, found, strict=True))
    assert lost == sum(TokenDataset(data).lengths_N[i] - 1 for i in damaged)
    assert all(b.inputs_BL.shape == (1, LENGTH) for b in found)
    assert f"shard_00000 record {damaged[0]}" in caplog.text and "becomes padding" in caplog.text
    monkeypatch.setattr("data_pipelines.planned_rows._DAMAGED_ALLOWED_AT_ONCE", 0)
    monkeypatch.setattr("data_pipelines.planned_rows.MAX_DAMAGED_SHARE", 0.0)
    with pytest.raises(ValueError, match="records read are damaged"):
        strict = iterator(data, batch=1)
        for _ in range(num_rows):
            next(strict)


def _hurt_one_record(path: pathlib.Path) -> list[int]:
    """Flips one bit of the shard such that few records no longer read, but the file does; returns which."""
    original = path.read_bytes()
    used = [i for i, byte in enumerate(original) if byte]
    for position in used[len(used) // 3 :: 37]:
        content = bytearray(original)
        content[position] ^= 0x10
        path.write_bytes(bytes(content))
        dataset, hurt = TokenDataset(path.parent), []
        for index in range(dataset.markers[0].records):
            try:
                dataset[index]
            except ValueError:
                hurt.append(index)
        if 0 < len(hurt) < 3:
            return hurt
    raise AssertionError("no flipped bit hurt a single record")


def test_evaluation_is_one_pass_in_whole_batches(data: pathlib.Path) -> None:
    examples = [stored.example for stored in load_examples(data, VOCAB)]
    batches = list(evaluation_batches(examples, VOCAB, sequence_length=LENGTH, batch_size=8))
    assert all(batch.inputs_BL.shape == (8, LENGTH) for batch in batches)
    rows = stack(batches)
    assert rows["loss_weights_BL"].sum() == sum(len(example.tokens_L) - 1 for example in examples)
    halves = [
        stack(
            list(
                evaluation_batches(examples, VOCAB, sequence_length=LENGTH, batch_size=8, local_rows=np.arange(8)[part])
            )
        )
        for part in (slice(0, 4), slice(4, 8))
    ]
    joined = np.concatenate([h["inputs_BL"].reshape(-1, 4, LENGTH) for h in halves], axis=1).reshape(-1, LENGTH)
    np.testing.assert_array_equal(joined, rows["inputs_BL"])
    with pytest.raises(ValueError, match="a row holds 11"):
        next(iter(evaluation_batches(examples, VOCAB, sequence_length=10, batch_size=8)))


def test_examples_by_task_and_holdout(data: pathlib.Path) -> None:
    captions = load_examples(data, VOCAB, tasks=[Task.CAPTION])
    assert len(captions) == 18 and {stored.example.task for stored in captions} == {Task.CAPTION}
    scans = load_examples(data, VOCAB, tasks=[Task.CAPTION], holdout="scan")
    assert 0 < len(scans) < 18 and {stored.facts["holdout"] for stored in scans} == {"scan"}
    assert len(load_examples(data, limit=7)) == 7


@pytest.mark.parametrize("tasks", [None, [Task.CAPTION]])
def test_a_few_examples_are_found_without_reading_the_others(
    data: pathlib.Path, tasks: list[Task] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = load_examples(data, VOCAB, tasks=tasks)
    read, get = [], TokenDataset.__getitem__
    monkeypatch.setattr(TokenDataset, "__getitem__", lambda self, index: read.append(index) or get(self, index))
    for limit in (1, 8, len(everything), len(everything) + 1):
        read.clear()
        few = load_examples(data, VOCAB, tasks=tasks, limit=limit)
        number = min(limit, len(everything))
        places = np.linspace(0, len(everything) - 1, number).round().astype(int)
        assert [stored.key for stored in few] == [everything[place].key for place in places]
        assert len(read) == number, "every process reads them at each of its starts"


def test_local_rows_must_lie_in_the_batch(data: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="outside a global batch of 4"):
        iterator(data, rows=np.array([3, 4]))


def test_synthetic_rows_are_full_valid_and_varied() -> None:
    batches = iterator("synthetic", batch=8)
    rows = stack([next(batches) for _ in range(4)])
    assert (rows["segment_ids_BL"] > 0).mean() > 0.98
    tasks = collections.Counter(rows["task_BL"][rows["segment_ids_BL"] > 0].tolist())
    assert set(tasks) == set(Task) - {Task.QUESTION, Task.CHAT}
    np.testing.assert_array_equal(
        rows["modality_BL"][rows["segment_ids_BL"] > 0],
        VOCAB.modality_V[rows["targets_BL"][rows["segment_ids_BL"] > 0]],
    )
    assert rows["perceptual_mask_BL"].sum() % VOCAB.tokens_per_image == 0


def test_synthetic_documents_follow_from_their_prompt() -> None:
    from data_pipelines.synthetic import SyntheticRows

    rows = SyntheticRows(VOCAB, LENGTH, seed=3)
    for row in range(20):
        for example in rows.examples(row):
            if example.task == Task.TEXT_TO_IMAGE:
                asked, drawn = joint.decode(example, VOCAB, fake_bundle().text)
                start, stride = map(int, asked.parts[0].text.split())  # type: ignore[union-attr]
                expected = (start + stride * np.arange(VOCAB.tokens_per_image)) % VOCAB.image.size  # type: ignore[union-attr]
                np.testing.assert_array_equal(drawn.parts[0].codes_P, expected)  # type: ignore[union-attr]
