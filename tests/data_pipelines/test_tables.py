"""Parquet and Arrow: columns by name, media in cells or by path, random access, damage."""

from __future__ import annotations

import json
import pathlib
import sys

import pytest

from aromni_jax.structs import Task, Text
from data_pipelines.pretokenize import pretokenize
from data_pipelines.records import TokenDataset
from data_pipelines.source_kinds import open_source
from data_pipelines.sources import MediaFile, RecordError
from launch.cli import main
from tests.fixtures import published_layouts as made
from tests.fixtures.data_fakes import config_for, fake_bundle

pyarrow = pytest.importorskip("pyarrow")
COLUMNS = {"text": "caption", "image": "jpg", "key": "id"}


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_tables_become_records(suffix: str, tmp_path: pathlib.Path) -> None:
    path = made.write_table(tmp_path / f"a{suffix}", made.table_of_pictures(tmp_path))
    source = open_source(f"table:{tmp_path}", columns=COLUMNS)
    assert source.tasks == (Task.CAPTION, Task.TEXT_TO_IMAGE) and len(source) == 12
    assert [source[i].key for i in (11, 0, 5)] == ["text_to_image/k5", "caption/k0", "text_to_image/k2"]
    assert source.where(11) == f"{path.name} row 5" and source[3].messages[0].parts == (Text("shade 1"),)
    for index in (0, 2):
        (file,) = source[index].media()
        with file.on_disk() as on_disk:
            assert on_disk.read_bytes() == (tmp_path / f"{index // 2}.png").read_bytes()
    config = config_for(pathlib.Path(f"table:{path}"), split="", columns=COLUMNS, tasks="caption")
    assert pretokenize(config, tmp_path / "data", bundle=fake_bundle())
    assert [stored.key for stored in TokenDataset(tmp_path / "data")] == [f"caption/k{i}" for i in range(6)]


def test_columns_choose_what_is_read(tmp_path: pathlib.Path) -> None:
    content = pyarrow.table(
        {"t": ["same", "other", "same", None], "wav": ["1.wav", "2.wav", "3.wav", "4.wav"], "who": ["a", "b", "a", "c"]}
    )
    path = made.write_table(tmp_path / "a.parquet", content)
    text = open_source(f"table:{path}", columns={"text": "t"})
    assert text.tasks == (Task.TEXT,) and text[0].key == "text/a.parquet row 0"
    with pytest.raises(RecordError, match="a.parquet row 3: the column t holds NoneType, no text"):
        text[3]
    speech = open_source(f"table:{path}", columns={"text": "t", "speech": "wav", "group": "who"})
    assert speech.tasks == (Task.SPEECH_TO_TEXT, Task.TEXT_TO_SPEECH) and speech.fingerprint != text.fingerprint
    assert list(speech[1].media()) == [MediaFile("speech", tmp_path / "1.wav")]
    with pytest.raises(RecordError, match="no picture or utterance"):
        open_source(f"table:{path}", columns={"text": "t"}, tasks="caption")[0]


def test_new_files_move_no_row_and_equal_texts_are_not_split(tmp_path: pathlib.Path) -> None:
    def heldout() -> set[str]:
        return set(
            open_source(f"table:{tmp_path}", columns={"text": "t"}, split="heldout", heldout_fraction=0.3).texts()
        )

    made.write_table(tmp_path / "b.parquet", pyarrow.table({"t": [f"text {i % 30}" for i in range(60)]}))
    few = heldout()
    made.write_table(tmp_path / "a.parquet", pyarrow.table({"t": [f"text {i}" for i in range(60)]}))
    assert few == {text for text in heldout() if int(text.split()[1]) < 30} and 0 < len(few) < 30


def test_damage_and_wrong_columns_are_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made.write_table(tmp_path / "a.parquet", made.table_of_pictures(tmp_path))
    with pytest.raises(ValueError, match="has the columns id, caption, jpg, other; name that of the text"):
        open_source(f"table:{path}")
    with pytest.raises(ValueError, match="has no column captoin; it has id, caption"):
        open_source(f"table:{path}", columns={"text": "captoin"})
    with pytest.raises(ValueError, match="no use for columns of txt; choose from text, image"):
        open_source(f"table:{path}", columns={"txt": "caption"})
    with pytest.raises(ValueError, match="leave config key 'columns' empty"):
        open_source(f"text:{path}", columns={"text": "caption"})
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"cut.parquet is no whole Parquet or Arrow file"):
        open_source(f"table:{tmp_path / 'cut.parquet'}", columns=COLUMNS)

    rows = made.table_of_pictures(tmp_path).to_pylist()
    rows[1]["jpg"]["bytes"] = rows[1]["jpg"]["bytes"][:40]
    rows[3]["jpg"]["bytes"] = b""
    rows[4]["jpg"]["path"] = "gone.png"
    damaged = made.write_table(tmp_path / "damaged.parquet", pyarrow.Table.from_pylist(rows))
    config = config_for(
        pathlib.Path(f"table:{damaged}"), split="", columns=COLUMNS, tasks="caption", max_bad_fraction=0.5
    )
    assert pretokenize(config, tmp_path / "data", bundle=fake_bundle())
    lines = [json.loads(line) for line in (tmp_path / "data" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["where"] for line in lines] == [f"damaged.parquet row {i}" for i in (1, 3, 4)]
    assert all(
        f"damaged.parquet/row {i}, column jpg" in line["error"] for i, line in zip((1, 3, 4), lines, strict=True)
    )
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        open_source(f"table:{path}", columns=COLUMNS)


def test_the_command_takes_columns_and_tasks(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    from aromni_jax.tokenizers.bundle import TokenizerBundle
    from aromni_jax.tokenizers.text import ByteText

    TokenizerBundle(ByteText()).save(tmp_path / "tokenizers")
    path = made.write_table(tmp_path / "a.parquet", made.table_of_pictures(tmp_path))
    arguments = [f"--config.tokenizers={tmp_path / 'tokenizers'}", f"--output={tmp_path / 'data'}"]
    source = [f"--config.source=table:{path}", "--config.columns={'text': 'caption'}", "--config.tasks=text"]
    assert main(["pretokenize", *source, *arguments]) == 0
    assert "is complete" in capsys.readouterr().out and len(TokenDataset(tmp_path / "data")) == 6
    assert main(["pretokenize", f"--config.source=tabel:{path}", *arguments]) == 1
    assert "did you mean 'table'?" in capsys.readouterr().err
