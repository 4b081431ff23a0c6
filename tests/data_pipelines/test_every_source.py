"""What holds for every kind of source: a real fixture, each record once, and a defined answer to every damage."""

from __future__ import annotations

import json
import pathlib
from collections import Counter
from typing import Any

import pytest

from data_pipelines.pretokenize import pretokenize
from data_pipelines.records import TokenDataset
from data_pipelines.source_kinds import KINDS, open_source
from data_pipelines.sources import RecordError
from tests.fixtures.corpora import CORPORA, OPENING, matches, source_of
from tests.fixtures.data_fakes import config_for, fake_bundle
from tests.fixtures.released_documents import released_bundle

DAMAGES = [(kind, name) for kind, corpus in CORPORA.items() for name in corpus.damages]


def keys(source: str, **choices: Any) -> list[str]:
    """The keys of all records in order; none where this split has none."""
    try:
        opened = open_source(source, **choices)
    except ValueError as error:
        assert "no conversation of split" in str(error)
        return []
    return [opened[i].key for i in range(len(opened))]


def test_every_kind_has_a_fixture_and_damaged_twins() -> None:
    missing = [kind for kind in KINDS if kind not in CORPORA or not CORPORA[kind].damages]
    assert not missing, f"give {', '.join(missing)} a corpus with damages in tests/fixtures/corpora.py"


@pytest.mark.parametrize("kind", CORPORA)
def test_every_record_is_there_exactly_once(kind: str, tmp_path: pathlib.Path) -> None:
    source, columns = source_of(kind, tmp_path / "corpus"), CORPORA[kind].columns
    opened = open_source(source, columns=columns)
    everything = keys(source, columns=columns)
    assert len(everything) == CORPORA[kind].num_items * max(1, len(opened.tasks))
    assert set(Counter(everything).values()) == {1}
    for fraction in (0.0, 0.3, 0.5, 1.0):
        halves = {
            split: keys(source, columns=columns, split=split, heldout_fraction=fraction)
            for split in ("train", "heldout")
        }
        assert Counter(halves["train"]) + Counter(halves["heldout"]) == Counter(everything)
        assert all(half == [key for key in everything if key in set(half)] for half in halves.values())
    if opened.tasks:  # of one task after the other
        apart = [keys(source, columns=columns, tasks=task.label) for task in opened.tasks]
        assert sorted(everything) == sorted(key for part in apart for key in part)
    assert open_source(source, columns=columns).fingerprint == opened.fingerprint
    for index in reversed(range(len(opened))):
        assert opened[index].key == everything[index]


@pytest.mark.parametrize(("kind", "name"), DAMAGES)
def test_every_damage_has_its_answer(kind: str, name: str, tmp_path: pathlib.Path) -> None:
    corpus = CORPORA[kind]
    damage = corpus.damages[name]
    source = source_of(kind, tmp_path / "corpus")
    whole = open_source(source, columns=corpus.columns)
    task = whole.tasks[0].label if whole.tasks else ""
    expected = keys(source, columns=corpus.columns, tasks=task)
    damage.inflict(tmp_path / "corpus")
    if damage.stage == OPENING:
        with pytest.raises(ValueError, match=damage.says) as raised:
            open_source(source, columns=corpus.columns)
        assert not isinstance(raised.value, RecordError)
        return
    config = config_for(source, split="", columns=corpus.columns, tasks=task, max_bad_fraction=1.0)  # type: ignore[arg-type]
    bundle = released_bundle() if kind.startswith("released") else fake_bundle()
    assert pretokenize(config, tmp_path / "data", bundle=bundle)
    refused = [json.loads(line) for line in (tmp_path / "data" / "quarantine.jsonl").read_text().splitlines()]
    kept = [stored.key for stored in TokenDataset(tmp_path / "data")]
    assert all(line["stage"] == damage.stage and matches(damage.says, line["error"]) for line in refused), refused
    assert refused and kept and len(refused) + len(kept) == len(expected) and set(kept) < set(expected)
