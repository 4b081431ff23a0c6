"""What a start leaves in a workdir before it trains."""

from __future__ import annotations

from aromni_jax.vocab import JointVocab
from launch.training_data import TrainingData


def test_a_start_killed_while_it_copied_the_tokenizers_holds_up_no_other(tmp_path):
    vocab = JointVocab.build(text_size=40, image_codes=8, tokens_per_image=4, speech_codes=(8,))
    tokenizers, workdir = tmp_path / "made", tmp_path / "run"
    tokenizers.mkdir()
    (tokenizers / "text.model").write_text("pieces")
    data = TrainingData(vocab, None, {}, tokenizers)
    data.save_tokenizers(workdir / "tokenizers")
    whole = {path.name: path.read_text() for path in (workdir / "tokenizers").iterdir()}
    assert set(whole) == {"text.model", "vocab.json"}
    (workdir / "tokenizers").rename(workdir / ".tokenizers.tmp")
    (workdir / ".tokenizers.tmp" / "vocab.json").write_text("half")
    (workdir / ".tokenizers.tmp" / "leftover").write_text("of another run")
    data.save_tokenizers(workdir / "tokenizers")
    assert {path.name: path.read_text() for path in (workdir / "tokenizers").iterdir()} == whole
    assert [path.name for path in workdir.iterdir()] == ["tokenizers"]
