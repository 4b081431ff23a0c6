"""The commands `aromni export` and `aromni import` on workdirs, end to end."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from aromni_jax.config import CheckpointConfig
from aromni_jax.interop import names
from aromni_jax.interop.chameleon import METADATA_FILE, ChameleonDirectory
from aromni_jax.train.checkpoint import Checkpointer
from aromni_jax.train.saved import load_params
from aromni_jax.train.saved_step import RunFacts
from launch import cli
from launch.export import export_workdir, parse_size
from launch.import_ import import_directory
from tests.fixtures.small_models import random_params, small_model, small_vocab


def make_workdir(path, *, steps=(3, 5), ema=False, mixture="synthetic"):
    """A run as `aromni train` leaves it, without the optimizer; returns the parameters of each step."""
    model, vocab = small_model(), small_vocab()
    fields = {k: v for k, v in dataclasses.asdict(model).items() if k not in ("vocab_size", "perceptual_dim")}
    config = {"model": fields, "sequence_length": 64, "data": {"mixture": mixture}}
    saver = Checkpointer(path, CheckpointConfig(1, len(steps), 0, asynchronous=False))
    saved = {}
    for step in steps:
        saved[step] = random_params(model, seed=step)
        state = {"params": jax.device_put(saved[step])}
        if ema:
            state["ema"] = jax.device_put(random_params(model, seed=step + 100))
        saver.save(step, state, RunFacts(config, vocab.fingerprint, "data-1", {"step": step}, {}))
    saver.close()
    (path / "tokenizers").mkdir()
    (path / "tokenizers" / "vocab.json").write_text(vocab.to_json())
    return saved


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def assert_trees_equal(left, right):
    left, right = names.leaf_paths(left), names.leaf_paths(right)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)


def test_export_takes_the_newest_checkpoint_or_the_step_asked_for(tmp_path):
    saved = make_workdir(tmp_path / "run")
    for step, arguments in ((5, {}), (3, {"step": 3})):
        export_workdir(tmp_path / "run", tmp_path / f"out{step}", dtype="float32", **arguments)
        opened = ChameleonDirectory(tmp_path / f"out{step}")
        assert_trees_equal(opened.params(), saved[step])
        assert (opened.model, opened.vocab) == (small_model(), small_vocab())
        assert (opened.tokenizers / "vocab.json").is_file()
        metadata = json.loads((tmp_path / f"out{step}" / METADATA_FILE).read_text())
        assert (metadata["step"], metadata["data_fingerprint"], metadata["max_positions"]) == (step, "data-1", 64)


def test_export_of_the_moving_average(tmp_path):
    make_workdir(tmp_path / "run", steps=(5,), ema=True)
    export_workdir(tmp_path / "run", tmp_path / "out", ema=True, dtype="float32")
    assert_trees_equal(ChameleonDirectory(tmp_path / "out").params(), random_params(small_model(), seed=105))
    assert json.loads((tmp_path / "out" / METADATA_FILE).read_text())["uses_ema"] is True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_import_export_of_a_workdir_is_bit_identical(tmp_path, dtype):
    make_workdir(tmp_path / "run", ema=True)
    export_workdir(tmp_path / "run", tmp_path / "first", dtype=dtype, ema=True, max_shard_bytes=20_000)
    opened = import_directory(tmp_path / "first", tmp_path / "imported")
    assert (opened.provenance.step, opened.left_out, opened.assumed_vocab) == (5, (), False)
    export_workdir(tmp_path / "imported", tmp_path / "second", dtype=dtype, max_shard_bytes=20_000)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_import_gives_the_weights_that_training_starts_from(tmp_path):
    saved = make_workdir(tmp_path / "run")
    export_workdir(tmp_path / "run", tmp_path / "exported", dtype="float32")
    import_directory(tmp_path / "exported", tmp_path / "imported")
    params = load_params(tmp_path / "imported")
    assert_trees_equal(params, saved[5])
    assert "perceptual_head" in params


def test_templates_are_those_of_the_data_sets(tmp_path):
    for name, template in (("a", "paper"), ("b", "paper"), ("c", "quickstart")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset.json").write_text(json.dumps({"templates": {"name": template}}))

    def template_of(*data_sets, **arguments):
        run = tmp_path / "-".join(["run", *data_sets])
        make_workdir(
            run, steps=(1,), mixture={name: {"path": str(tmp_path / name), "weight": 1.0} for name in data_sets}
        )
        export_workdir(run, run / "out", **arguments)
        return json.loads((run / "out" / METADATA_FILE).read_text())["template"]

    assert template_of("a", "b") == "paper"
    with pytest.raises(ValueError, match="several templates \\(paper, quickstart\\)"):
        template_of("a", "c")
    with pytest.raises(ValueError, match="--template"):
        template_of("gone")
    assert template_of("lost", template="official-v0.1") == "official-v0.1"


def run_command(capsys, *argv):
    status = cli.main(argv)
    return status, capsys.readouterr()


def test_commands_say_what_they_did(tmp_path, capsys):
    make_workdir(tmp_path / "run")
    status, said = run_command(capsys, "export", f"--workdir={tmp_path}/run", f"--output={tmp_path}/exported")
    assert status == 0 and "MB of bfloat16 weights in 2 file(s)" in said.out
    status, said = run_command(capsys, "import", f"--source={tmp_path}/exported", f"--output={tmp_path}/imported")
    assert status == 0 and f"--config.init_from={tmp_path}/imported" in said.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["export", "--workdir={}/none", "--output={}/out"], "no checkpoint below"),
        (["export", "--workdir={}/run", "--output={}/out", "--step=4"], "there are 3, 5"),
        (["export", "--workdir={}/run", "--output={}/out", "--ema"], "holds no ema"),
        (["export", "--workdir={}/run", "--output={}/run"], "is not empty"),
        (["export", "--workdir={}/run", "--output={}/out", "--max_shard_size=many"], "for example 5GB"),
        (["import", "--source={}/none", "--output={}/out"], "is not a Hugging Face Chameleon directory"),
        (["import", "--source={}/run", "--output={}/out"], "only 'chameleon' can be imported"),
    ],
)
def test_what_users_get_wrong_is_answered_in_one_line(tmp_path, capsys, argv, message):
    make_workdir(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{}")
    status, said = run_command(capsys, *[argument.format(tmp_path) for argument in argv])
    assert status == 1
    assert message in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_workdir_with_another_vocabulary_is_refused(tmp_path):
    make_workdir(tmp_path / "run")
    other = dataclasses.replace(small_vocab(), tokenizer_fingerprints=(("text", "another"),))
    (tmp_path / "run" / "tokenizers" / "vocab.json").write_text(other.to_json())
    with pytest.raises(ValueError, match="was made with vocabulary"):
        export_workdir(tmp_path / "run", tmp_path / "out")


def test_sizes():
    assert [parse_size(text) for text in ("5GB", "20 mb", "7KB")] == [5 * 10**9, 20 * 10**6, 7 * 10**3]
    for text in ("5", "GB", "-1GB", "0GB"):
        with pytest.raises(ValueError, match="--max_shard_size"):
            parse_size(text)
