"""`aromni import` of weights that are not ours: what the rows mean, what is said, and what can be done afterwards."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from aromni_jax.interop import names
from aromni_jax.interop.chameleon import ChameleonDirectory
from aromni_jax.tokenizers.text import ByteText
from aromni_jax.train.checkpoint import Checkpointer
from aromni_jax.vocab import JointVocab
from launch import cli
from launch.export import export_workdir
from launch.import_ import import_directory, vocabulary_of
from tests.fixtures.published_weights import chameleon, logits, weights, write_config, write_meta, write_torch
from tests.fixtures.small_models import small_vocab


@pytest.fixture(scope="module")
def net():
    return chameleon(small_vocab().size, ranks=1)


def write_vocab(directory, vocab):
    directory.mkdir()
    (directory / "vocab.json").write_text(vocab.to_json())
    return directory


@pytest.mark.parametrize("layout", ["torch", "meta"])
def test_imported_weights_can_be_exported_for_transformers(tmp_path, net, layout):
    import transformers

    if layout == "torch":
        write_config(tmp_path / "source", net)
        write_torch(tmp_path / "source", weights(net), 2)
    else:
        write_meta(tmp_path / "source", net)
    tokenizers = write_vocab(tmp_path / "tokenizers", small_vocab())
    opened = import_directory(tmp_path / "source", tmp_path / "imported", tokenizers=tokenizers)
    assert (opened.vocab, opened.assumed_vocab) == (small_vocab(), False)
    export_workdir(tmp_path / "imported", tmp_path / "exported", dtype="float32")
    again = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "exported").eval()
    ids_BL = np.arange(30).reshape(2, 15)
    np.testing.assert_allclose(logits(again, ids_BL), logits(net, ids_BL), atol=1e-5, rtol=0)


def test_chameleon_rows_without_a_word_are_the_released_ones(tmp_path, capsys):
    write_meta(tmp_path / "7b", chameleon(65536, ranks=1, num_hidden_layers=1), anole=True)
    assert cli.main(["import", f"--source={tmp_path}/7b", f"--output={tmp_path}/run"]) == 0
    said = capsys.readouterr().out
    assert "Meta's, 1 file(s), 1 layers of width 32, pre-norm, QK-norm, interleaved rotation, float32" in said
    assert "65536 rows mean: taken as those of Chameleon and AR-Omni" in said
    assert f"--config.init_from={tmp_path}/run" in said
    assert JointVocab.from_json((tmp_path / "run/tokenizers/vocab.json").read_text()) == JointVocab.released()
    assert json.loads((tmp_path / "run/config.json").read_text())["model"]["norm_position"] == "pre"


def test_export_that_says_what_its_rows_mean_takes_no_other_vocabulary(tmp_path, net, capsys):
    write_meta(tmp_path / "source", net)
    tokenizers = write_vocab(tmp_path / "tokenizers", small_vocab())
    import_directory(tmp_path / "source", tmp_path / "imported", tokenizers=tokenizers)
    export_workdir(tmp_path / "imported", tmp_path / "exported")
    assert ChameleonDirectory(tmp_path / "exported", small_vocab()).vocab == small_vocab()
    other = write_vocab(tmp_path / "other", JointVocab.build(text_size=70, pad_to_multiple=96))
    arguments = ["import", f"--source={tmp_path}/exported", f"--output={tmp_path}/again", f"--tokenizers={other}"]
    assert cli.main(arguments) == 1
    assert "already says what the rows mean" in capsys.readouterr().err


def test_weights_wait_for_their_checkpoint_in_a_file_not_in_memory(tmp_path, net, monkeypatch):
    """What is saved is the mapping of a file that has no name any more."""
    saved = {}
    save = Checkpointer.save

    def watched(self, step, state, facts):
        mapped = [line.split(maxsplit=5) for line in pathlib.Path("/proc/self/maps").read_text().splitlines()]
        ranges = [[int(end, 16) for end in line[0].split("-")] for line in mapped if "(deleted)" in line[-1]]
        for path, leaf in names.leaf_paths(state["params"]).items():
            pointer = leaf.unsafe_buffer_pointer()
            saved[path] = any(start <= pointer and pointer + leaf.nbytes <= stop for start, stop in ranges)
        save(self, step, state, facts)

    monkeypatch.setattr(Checkpointer, "save", watched)
    write_meta(tmp_path / "source", net)
    opened = import_directory(
        tmp_path / "source", tmp_path / "run", tokenizers=write_vocab(tmp_path / "tokenizers", small_vocab())
    )
    assert saved == dict.fromkeys(opened.shapes(), True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "config.json", "tokenizers"]


def test_tokenizers_that_do_not_speak_the_released_rows(tmp_path):
    ByteText().save(tmp_path / "text")
    with pytest.raises(ValueError, match="text is not the text tokenizer of Chameleon.*vocab.json"):
        vocabulary_of(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source={}/none"], "is not a Hugging Face Chameleon directory"),
        (["--source={}/source"], "96 rows of vocabulary"),
        (["--source={}/source", "--tokenizers={}/empty"], "neither vocab.json nor text/"),
    ],
)
def test_what_users_get_wrong_is_answered_in_one_line(tmp_path, net, capsys, arguments, message):
    write_meta(tmp_path / "source", net)
    (tmp_path / "empty").mkdir()
    assert cli.main(["import", f"--output={tmp_path}/out", *(text.format(tmp_path) for text in arguments)]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
