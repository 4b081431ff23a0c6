"""Builders of TensorFlow Datasets: without TensorFlow, by number, features by name, splits by their names or a hash."""

from __future__ import annotations

import io
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image as PilImage

from aromni_jax.structs import Task, Text
from data_pipelines.pretokenize import pretokenize
from data_pipelines.records import TokenDataset
from data_pipelines.source_kinds import open_source
from data_pipelines.sources import RecordError, Source
from tests.fixtures import shades_builder
from tests.fixtures.data_fakes import config_for, fake_bundle

PICTURES = {"text": "caption", "image": "picture"}


@pytest.fixture(scope="module")
def shades(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a version of a builder with splits for training and testing."""
    return shades_builder.built(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module")
def unsplit(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The same with a single split."""
    return shades_builder.built(tmp_path_factory.mktemp("tfds"), shades_builder.Unsplit)


def numbers(source: Source) -> list[int]:
    return [int(text.split()[1]) for text in source.texts()]


def test_records_are_read_at_random_and_by_pretokenize(shades: pathlib.Path, tmp_path: pathlib.Path) -> None:
    source = open_source(f"tfds:{shades}", columns=PICTURES)
    assert source.tasks == (Task.CAPTION, Task.TEXT_TO_IMAGE) and len(source) == 18
    assert source[17].key == "text_to_image/test record 2" and source.where(0) == "train record 0"
    order = np.random.default_rng(0).permutation(18)
    in_order = [source[i] for i in range(18)]
    assert [source[int(i)] for i in order] == [in_order[i] for i in order]
    (picture,) = source[4].media()
    with picture.on_disk() as path, PilImage.open(path) as opened:  # the PNG that the builder was given
        shade = int(str(source[4].facts["label"]).split()[1])
        assert opened.format == "PNG" and opened.getpixel((0, 0)) == (20 * shade,) * 3
    for above in (shades.parent, shades.parent.parent):
        assert open_source(f"tfds:{above}", columns=PICTURES).fingerprint == source.fingerprint
    config = config_for(f"tfds:{shades}", split="train", columns=PICTURES, tasks="caption")  # type: ignore[arg-type]
    assert pretokenize(config, tmp_path / "data", bundle=fake_bundle())
    assert [stored.key for stored in TokenDataset(tmp_path / "data")] == [f"caption/train record {i}" for i in range(6)]


def test_features_choose_what_is_read(shades: pathlib.Path) -> None:
    pixels = open_source(
        f"tfds:{shades}", columns={"text": "class", "image": "pixels", "key": "number"}, tasks="caption"
    )
    assert {pixels[i].key for i in range(9)} == {f"caption/{i}" for i in range(9)}
    for conversation in (pixels[i] for i in range(9)):
        number = int(conversation.key.split("/")[1])
        assert conversation.messages[1].parts == (Text("light" if number % 2 else "dark"),)
        (picture,) = conversation.media()
        shown = np.asarray(PilImage.open(io.BytesIO(picture.content())))
        assert shown.shape == (4, 4, 3) and (shown == 20 * number).all()
    speech = open_source(f"tfds:{shades}", columns={"text": "caption", "speech": "sound"})
    assert speech.tasks == (Task.SPEECH_TO_TEXT, Task.TEXT_TO_SPEECH)
    (sound,) = speech[0].media()
    assert sound.content()[:4] == b"fLaC" and speech.fingerprint != pixels.fingerprint
    with pytest.raises(RecordError, match="train record 0: the feature words holds list, no text"):
        open_source(f"tfds:{shades}", columns={"text": "words"})[0]
    (wrong,) = open_source(f"tfds:{shades}", columns={"text": "caption", "speech": "pixels"})[0].media()
    with pytest.raises(RecordError, match=r"feature pixels holds uint8 \[4, 4, 3\], not the bytes of a sound file"):
        wrong.content()
    with pytest.raises(ValueError, match="has the columns caption, .*name that of the text in config key 'columns'"):
        open_source(f"tfds:{shades}")
    with pytest.raises(ValueError, match="has no column captoin; it has caption, "):
        open_source(f"tfds:{shades}", columns={"text": "captoin"})


def test_the_names_of_splits_decide_where_they_name_both_sides(shades: pathlib.Path) -> None:
    sides = {
        split: numbers(open_source(f"tfds:{shades}", columns=PICTURES, tasks="caption", split=split, **choices))
        for choices in ({}, {"heldout_fraction": 0.5})
        for split in ("train", "heldout", "test", "")
    }
    assert sorted(sides["train"]) == list(range(6)) and sorted(sides["heldout"]) == [6, 7, 8] == sorted(sides["test"])
    assert sides[""] == sides["train"] + sides["heldout"]
    with pytest.raises(ValueError, match="has no split 'validation'; choose from train, heldout, test"):
        open_source(f"tfds:{shades}", columns=PICTURES, split="validation")


def test_the_hash_decides_in_a_builder_of_one_split(unsplit: pathlib.Path) -> None:
    def texts(split: str, fraction: float = 0.4) -> set[str]:
        opened = open_source(f"tfds:{unsplit}", columns=PICTURES, split=split, heldout_fraction=fraction)
        return set(opened.texts())

    train, heldout = texts("train"), texts("heldout")
    assert not train & heldout and len(train | heldout) == 9 and train and heldout
    assert texts("train", 0.0) == texts("everything") == train | heldout  # by the builder's own name of it: everything
    from data_pipelines.containers import content_hash
    from data_pipelines.sources import split_by_group

    # The same texts as a source of plain text holds out.
    assert heldout == {t for t in train | heldout if split_by_group(content_hash(t.encode()), 0.4) == "heldout"}


def test_what_is_no_builder_is_said(
    shades: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("1.0.0", "2.0.0"):
        shutil.copytree(shades, tmp_path / "two" / "shades" / version)
    with pytest.raises(ValueError, match=r"2 prepared builders \(shades/1.0.0, shades/2.0.0\); name one of them"):
        open_source(f"tfds:{tmp_path / 'two'}", columns=PICTURES)
    with pytest.raises(ValueError, match="there is no folder none; tfds: takes that of a prepared builder"):
        open_source("tfds:none", columns=PICTURES)
    with pytest.raises(ValueError, match="memory://a: tfds: reads builders on a disk only"):
        open_source("tfds:memory://a", columns=PICTURES)
    description = tmp_path / "two" / "shades" / "1.0.0" / "dataset_info.json"
    description.write_text(description.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(ValueError, match="holds files of tfrecord, .*prepare it again with file_format='array_record'"):
        open_source(f"tfds:{description.parent}", columns=PICTURES)
    features = tmp_path / "two" / "shades" / "2.0.0" / "features.json"
    features.write_text(features.read_text().replace("text_feature.Text", "audio_feature.Audio"))
    with pytest.raises(ValueError, match="no builder that reads without TensorFlow"):
        open_source(f"tfds:{features.parent}", columns=PICTURES)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match="pip install tensorflow-datasets importlib_resources"):
        open_source(f"tfds:{shades}", columns=PICTURES)


def test_tensorflow_is_not_imported(shades: pathlib.Path) -> None:
    program = f"""
import sys
from data_pipelines.source_kinds import open_source
source = open_source("tfds:{shades}", columns={PICTURES!r}, split="heldout")
assert len(source) == 6 and all(len(file.content()) for i in range(6) for file in source[i].media())
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
