"""What is drawn for each record: the wording of its instruction, and whether its picture is stored unasked as well."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from aromni_jax.inference import decode, machine
from aromni_jax.inference.grammar import compile_grammar
from aromni_jax.inference.policy import DecodingConfig, Mode, policy_for
from aromni_jax.models.config import ModelConfig
from aromni_jax.structs import Image, Message, Role, Speech, Task, Text
from aromni_jax.tokenizers import joint
from aromni_jax.tokenizers.prompts import SHIPPED, load_templates, parse_templates
from data_pipelines.duplicates import first_copies
from data_pipelines.pretokenize import pretokenize
from data_pipelines.records import TokenDataset, target_counts_MR
from tests.fixtures.data_fakes import config_for, fake_bundle, write_corpus

BUNDLE = fake_bundle()
VOCAB = BUNDLE.vocab()
PICTURE = Image(codes_P=np.arange(16, dtype=np.int32))
QUESTIONS: dict[Task, Message] = {
    Task.TEXT_TO_IMAGE: Message("user", (Text("a cat"),)),
    Task.SPEECH_TO_IMAGE: Message("user", (Speech(codes_KU=np.arange(9, dtype=np.int32)[None]),)),
}


def corpus(root: pathlib.Path) -> pathlib.Path:
    """The usual tasks, and pictures that speech asks for."""
    manifest = write_corpus(root, 40)
    asked = [
        {
            "key": f"speech_to_image/{i}", "task": "speech_to_image", "split": "train", "facts": {"label": "red"},
            "messages": [
                {"role": "user", "parts": [{"speech": f"sound_{i}.wav"}]},
                {"role": "assistant", "parts": [{"image": f"picture_{i}.png"}]},
            ],
        }
        for i in range(8)
    ]  # fmt: skip
    manifest.write_text(manifest.read_text() + "".join(json.dumps(line) + "\n" for line in asked))
    return manifest


def stored(directory: pathlib.Path) -> dict[str, Any]:
    return {example.key: example for example in TokenDataset(directory)}


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("task", QUESTIONS)
def test_an_unasked_answer_is_what_guidance_compares_with(
    name: str, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training holds the answer after the very ids that decoding puts before it in its twin without the question."""
    messages = [QUESTIONS[task], Message("assistant", (PICTURE,))]
    templates = load_templates(name)
    whole = joint.encode(messages, task, VOCAB, BUNDLE.text, templates)
    asked = joint.prompt(messages[:1], task, VOCAB, BUNDLE.text, templates)
    unasked = joint.unconditional(whole, VOCAB, "k")
    assert unasked is not None and (unasked.task, unasked.key) == (task, "k")
    opening = joint.unconditional_prompt(VOCAB)
    np.testing.assert_array_equal(unasked.tokens_L, [*opening, *whole.tokens_L[len(asked.tokens_L) :]])
    assert sum(span.length for span in unasked.spans) == len(unasked.tokens_L)
    assert [span.start for span in unasked.spans] == np.cumsum([0, *(s.length for s in unasked.spans)])[:-1].tolist()
    assert set(unasked.roles_L[len(opening) :]) == {Role.RESPONSE}

    read = []

    def forward(config: Any, params: Any, ids_BL: Any, places_BL: Any, is_token_BL: Any, caches: Any) -> None:
        """Stands for the decoder and keeps what it is first given to read."""
        read.extend(np.asarray(ids)[np.asarray(mask) > 0] for ids, mask in zip(ids_BL, is_token_BL, strict=True))
        raise InterruptedError

    config = ModelConfig(VOCAB.size, num_layers=1, d_model=2, num_heads=1, num_kv_heads=1, head_dim=2, mlp_dim=2)
    monkeypatch.setattr(machine, "forward", forward)
    monkeypatch.setattr(decode, "extend_jitted", machine.extend)  # eager: ids are numbers
    grammar = compile_grammar(VOCAB, {task: policy_for(task, DecodingConfig(image=Mode(1.0, guidance=3.0)))})
    with pytest.raises(InterruptedError):
        decode.generate(decode.OmniModel(config, {}, VOCAB), grammar, [asked], max_new_tokens=64)
    assert [ids.tolist() for ids in read] == [asked.tokens_L.tolist(), opening.tolist()]


def test_only_the_last_answer_of_a_conversation_and_only_where_there_is_one() -> None:
    templates = load_templates("quickstart")
    turns = [QUESTIONS[Task.TEXT_TO_IMAGE], Message("assistant", (Text("ok"), PICTURE))] * 2
    chat = joint.unconditional(joint.encode(turns, Task.CHAT, VOCAB, BUNDLE.text, templates), VOCAB)
    assert chat is not None
    np.testing.assert_array_equal(
        chat.tokens_L,
        [VOCAB.bos, *VOCAB.text_to_rows(list(b"ok")), *chat.tokens_L[3:-1], VOCAB.special_ids["end_model"]],
    )
    assert len(chat.tokens_L) == 1 + 2 + 18 + 1
    prompt = joint.prompt(turns[:1], Task.CHAT, VOCAB, BUNDLE.text, templates)
    assert joint.unconditional(prompt, VOCAB) is None


def test_a_share_of_pictures_is_stored_unasked_as_documents_of_their_own(tmp_path: pathlib.Path) -> None:
    manifest = corpus(tmp_path / "corpus")
    assert pretokenize(config_for(manifest), tmp_path / "plain", bundle=BUNDLE)
    plain = stored(tmp_path / "plain")
    pictures = [key for key in plain if key.startswith(("text_to_image", "speech_to_image"))]
    assert len(pictures) == 16
    assert pretokenize(config_for(manifest, unconditional_fraction=1.0), tmp_path / "all", bundle=BUNDLE)
    found, dataset = stored(tmp_path / "all"), TokenDataset(tmp_path / "all")
    assert set(found) == set(plain) | {f"{key}#unconditional" for key in pictures}
    for key in pictures:
        unasked = found[f"{key}#unconditional"]
        np.testing.assert_array_equal(unasked.tokens_L, [VOCAB.bos, *plain[key].tokens_L[-19:]])
        assert unasked.facts == plain[key].facts | {"pretokenize": {"unconditional": True}}
        assert unasked.task == plain[key].task
        assert target_counts_MR(unasked)[1, Role.RESPONSE] == 18
    assert dataset.lengths_N.tolist() == [len(example.tokens_L) for example in dataset]
    assert first_copies([dataset.hashes_N])[0].sum() > len(plain) - 10  # an unasked picture is no copy of an asked one

    for seed in (0, 1):
        half = config_for(manifest, unconditional_fraction=0.5, seed=seed, records_per_shard=5)
        assert pretokenize(half, tmp_path / f"half {seed}", bundle=BUNDLE)
    chosen = [{key for key in stored(tmp_path / f"half {seed}") if "#" in key} for seed in (0, 1)]
    assert all(3 <= len(keys) <= 13 for keys in chosen) and chosen[0] != chosen[1]
    for index in (1, 0):
        pretokenize(half, tmp_path / "two workers", shard_index=index, num_shards=2, bundle=BUNDLE)
    read = [json.loads((tmp_path / name / "dataset.json").read_text()) for name in ("half 1", "two workers")]
    assert read[0] == read[1]
    with pytest.raises(ValueError, match="'unconditional_fraction': must be in 0..1, not 2"):
        config_for(manifest, unconditional_fraction=2.0)


def test_wordings_are_drawn_for_training_and_the_first_is_asked_with(tmp_path: pathlib.Path) -> None:
    manifest = corpus(tmp_path / "corpus")
    config = config_for(manifest, templates="varied-v1")
    assert pretokenize(config, tmp_path / "one", bundle=BUNDLE)
    for index in (1, 0):
        pretokenize(config, tmp_path / "two", shard_index=index, num_shards=2, bundle=BUNDLE)
    one, two = (json.loads((tmp_path / name / "dataset.json").read_text()) for name in ("one", "two"))
    assert one == two
    templates, numbers = load_templates("varied-v1"), []
    for example in TokenDataset(tmp_path / "one"):
        if example.task == Task.TEXT:
            assert "pretokenize" not in example.facts
            continue
        number = example.facts["pretokenize"]["instruction"]
        numbers.append(number)
        wording = templates.of(example.task).instructions[number]
        (question, answer) = joint.decode(example.example, VOCAB, BUNDLE.text)
        prompt = joint.prompt([question], example.task, VOCAB, BUNDLE.text, templates, instruction=wording)
        np.testing.assert_array_equal(example.tokens_L[: len(prompt.tokens_L)], prompt.tokens_L)
        first = joint.prompt([question], example.task, VOCAB, BUNDLE.text, templates)
        same = (
            len(first.tokens_L) <= len(example.tokens_L)
            and (example.tokens_L[: len(first.tokens_L)] == first.tokens_L).all()
        )
        assert same == (number == 0)
    assert len(numbers) == 40 and 0 in numbers and len(set(numbers)) >= 6


def test_the_varied_set_has_eight_wordings_of_every_instruction_and_they_are_checked() -> None:
    templates = load_templates("varied-v1")
    for task, template in templates.tasks.items():
        has_instruction = any(piece.kind == "instruction" for piece in template.user)
        assert len(template.instructions) == (8 if has_instruction else 1), task
        assert template.instruction == template.instructions[0]
    assert [load_templates("quickstart").of(Task.CAPTION).instructions] == [("describe",)]

    def parsed(instruction: object) -> object:
        task = {"instruction": instruction, "turns": {"assistant": ["{text}"]}, "end": ["<eos>"]}
        return parse_templates(json.dumps({"name": "x", "tasks": {"text": task}}), "x")

    with pytest.raises(ValueError, match="x, task 'text': the instruction is .* give a string, or a list"):
        parsed([])
    with pytest.raises(ValueError, match="give a string, or a list"):
        parsed(["a", 3])
    with pytest.raises(ValueError, match="stands twice"):
        parsed(["a", "b", "a"])
