"""The authors' token formats: ids come through unchanged, with the spans that our own encoder would record."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from aromni_jax.structs import Example, Role, Text
from aromni_jax.tokenizers import joint
from data_pipelines.pretokenize import pretokenize
from data_pipelines.records import TokenDataset
from data_pipelines.source_kinds import open_source
from tests.fixtures.data_fakes import config_for, fake_bundle
from tests.fixtures.released_documents import (
    CHAT,
    STAGE_1,
    VOCAB,
    LettersText,
    chat_columns,
    line,
    released_bundle,
    write_lines,
)


def same_facts(found: Example, expected: Example) -> None:
    assert found.tokens_L.tolist() == expected.tokens_L.tolist() and found.task == expected.task
    assert found.modality_L.tolist() == expected.modality_L.tolist()
    # Template literals are text of the prompt to those who see only ids.
    is_answer = [np.isin(e.roles_L, (Role.RESPONSE, Role.TRANSCRIPT)) * e.roles_L for e in (found, expected)]
    assert is_answer[0].tolist() == is_answer[1].tolist()
    images = [[s for s in e.spans if s.modality == 1] for e in (found, expected)]
    assert [(s.start, s.length) for s in images[0]] == [(s.start, s.length) for s in images[1]]
    ours, theirs = (joint.decode(e, VOCAB, LettersText()) for e in (found, expected))  # type: ignore[arg-type]
    assert [m.role for m in ours] == [m.role for m in theirs]
    texts = [
        [p for m in turns if m.role == "assistant" for p in m.parts if isinstance(p, Text)] for turns in (ours, theirs)
    ]
    assert texts[0] == texts[1]


def test_tokenized_lines_become_the_records_our_encoder_makes(tmp_path: pathlib.Path) -> None:
    path = write_lines(tmp_path / "shard.jsonl")
    config = config_for(pathlib.Path(f"released_jsonl:{path}"), split="")
    assert pretokenize(config, tmp_path / "data", bundle=released_bundle())
    stored = list(TokenDataset(tmp_path / "data"))
    assert [one.key for one in stored] == list(STAGE_1)
    for one, expected in zip(stored, STAGE_1.values(), strict=True):
        same_facts(one.example, expected)
    with pytest.raises(ValueError, match="ids of the released layout, the tokenizers have another"):
        pretokenize(config, tmp_path / "other", bundle=fake_bundle())


def test_the_side_of_a_document_is_its_content(tmp_path: pathlib.Path) -> None:
    def heldout(numbers: list[int]) -> set[str]:
        lines = [
            {"id": str(i), "task": "text_to_text", "discrete_code": [VOCAB.bos, VOCAB.text.start + i]} for i in numbers
        ]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        source = open_source(f"released_jsonl:{tmp_path}", split="heldout", heldout_fraction=0.3)
        return {source[i].key for i in range(len(source))}

    few = heldout(list(range(30)))
    assert 0 < len(few) < 30 and few == {key for key in heldout(list(range(59, -1, -1))) if int(key) < 30}


def test_bad_documents_are_quarantined(tmp_path: pathlib.Path) -> None:
    good = line("text_to_image", STAGE_1["text_to_image"])
    codes = good["discrete_code"]
    bad = [
        (good | {"discrete_code": codes[:-3]}, "encode", "the image at token"),
        (good | {"discrete_code": [*codes[:5], VOCAB.image.start, *codes[5:]]}, "encode", "that has not begun"),
        (good | {"discrete_code": [*codes, VOCAB.size + 3]}, "encode", "ids that mean nothing"),
        (good | {"discrete_code": [], "response": []}, "parse", "must be a list of ids"),
        (good | {"discrete_code": codes[:9]}, "parse", "the response has 1026 ids, the document 9"),
        (good | {"task": "text_to_video"}, "parse", "known: image_caption"),
        ({"task": "text_to_text"}, "parse", "lacks the field 'discrete_code'"),
    ]
    path = tmp_path / "shard.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [good, *(fields for fields, _, _ in bad)]))
    config = config_for(pathlib.Path(f"released_jsonl:{path}"), split="", max_bad_fraction=1.0)
    assert pretokenize(config, tmp_path / "data", bundle=released_bundle())
    lines = [json.loads(one) for one in (tmp_path / "data" / "quarantine.jsonl").read_text().splitlines()]
    assert [(one["where"], one["stage"]) for one in lines] == [
        (f"shard.jsonl:{i}", stage) for i, (_, stage, _) in enumerate(bad, 2)
    ]
    assert all(message in one["error"] for one, (_, _, message) in zip(lines, bad, strict=True))


def test_instruction_tables_become_chat_records(tmp_path: pathlib.Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    ids, labels = chat_columns()
    content = {"input_ids": [ids, ids, ids[:9]], "labels": [labels, [7, *labels[1:]], labels]}
    parquet.write_table(pyarrow.table(content), tmp_path / "sft.parquet", row_group_size=2)
    config = config_for(pathlib.Path(f"released_parquet:{tmp_path}"), split="", max_bad_fraction=1.0)
    assert pretokenize(config, tmp_path / "data", bundle=released_bundle())
    (stored,) = TokenDataset(tmp_path / "data")
    same_facts(stored.example, CHAT)
    lines = [json.loads(one) for one in (tmp_path / "data" / "quarantine.jsonl").read_text().splitlines()]
    assert [one["where"] for one in lines] == ["sft.parquet row 1", "sft.parquet row 2"]
    assert all("labels must be -100 or the id they stand under" in one["error"] for one in lines)
