"""Loss weights: the shift by hand, each weighting by its definition, and errors that name the key."""

from __future__ import annotations

import numpy as np
import pytest

from aromni_jax.config import LossConfig
from aromni_jax.structs import Image, Message, Modality, Role, Speech, Task, Text
from aromni_jax.tokenizers import joint
from aromni_jax.tokenizers.prompts import load_templates
from aromni_jax.tokenizers.text import ByteText
from aromni_jax.vocab import JointVocab
from data_pipelines.records import StoredExample
from data_pipelines.weighting import UNIFORM_TMR, to_targets, weight_table

VOCAB = JointVocab.build(text_size=256, image_codes=16, tokens_per_image=4, speech_codes=(8,))


def loss(weighting: str, **changes: object) -> LossConfig:
    return LossConfig(weighting, 1.0, "predict", 0.0, 64, **changes)  # type: ignore[arg-type]


def encode(task: Task, *parts: object) -> StoredExample:
    roles = ["user", "assistant"] if len(parts) == 2 else ["assistant"]
    messages = [Message(role, (part,)) for role, part in zip(roles, parts, strict=True)]  # type: ignore[arg-type]
    return StoredExample.of(joint.encode(messages, task, VOCAB, ByteText(), load_templates("quickstart")))


IMAGE = Image(codes_P=np.array([3, 1, 2, 0]))


def test_shift_by_hand() -> None:
    example = encode(Task.TEXT, Text("ab"))
    document = to_targets([example], UNIFORM_TMR)
    a, b = (VOCAB.text.start + ord(c) for c in "ab")
    np.testing.assert_array_equal(document.inputs_L, [VOCAB.bos, a, b])
    np.testing.assert_array_equal(document.targets_L, [a, b, VOCAB.eos])
    np.testing.assert_array_equal(document.loss_weights_L, [1, 1, 1])


def test_perceptual_mask_is_exactly_the_codes_that_count() -> None:
    example = encode(Task.TEXT_TO_IMAGE, Text("x"), IMAGE)
    document = to_targets([example], UNIFORM_TMR)
    assert VOCAB.image
    expected = (document.targets_L >= VOCAB.image.start) & (document.targets_L < VOCAB.image.stop)
    np.testing.assert_array_equal(document.perceptual_mask_L, expected)
    assert document.perceptual_mask_L.sum() == 4
    np.testing.assert_array_equal(document.modality_L, VOCAB.modality_V[document.targets_L])

    table_TMR = weight_table(loss("sft"), np.zeros_like(UNIFORM_TMR))
    caption = to_targets([encode(Task.CAPTION, IMAGE, Text("red"))], table_TMR)
    assert not caption.perceptual_mask_L.any()
    np.testing.assert_array_equal(caption.targets_L[caption.loss_weights_L > 0][-1:], [VOCAB.eos])
    assert caption.loss_weights_L.sum() == len("red") + 1


def test_response_doubles_recognition_and_captions_only() -> None:
    table_TMR = weight_table(loss("response"), np.zeros_like(UNIFORM_TMR))
    speech = Speech(codes_KU=np.array([[1, 2, 3]]))
    for task, example in {
        Task.SPEECH_TO_TEXT: encode(Task.SPEECH_TO_TEXT, speech, Text("hi")),
        Task.CAPTION: encode(Task.CAPTION, IMAGE, Text("hi")),
        Task.TEXT_TO_IMAGE: encode(Task.TEXT_TO_IMAGE, Text("hi"), IMAGE),
    }.items():
        document = to_targets([example], table_TMR)
        doubled = (example.example.roles_L[1:] == Role.RESPONSE) & (task != Task.TEXT_TO_IMAGE)
        np.testing.assert_array_equal(document.loss_weights_L, np.where(doubled, 2, 1))


def test_balanced_follows_its_formula_and_has_mean_one() -> None:
    counts_TMR = np.zeros((len(Task), len(Modality), len(Role)), np.int64)
    counts_TMR[Task.TEXT_TO_IMAGE, Modality.IMAGE, Role.RESPONSE] = 640
    counts_TMR[Task.TEXT_TO_IMAGE, Modality.TEXT, Role.PROMPT] = 40
    counts_TMR[Task.SPEECH_TO_TEXT, Modality.SPEECH, Role.PROMPT] = 320
    table_TMR = weight_table(loss("balanced"), counts_TMR)
    image, text, speech = (table_TMR[0, m, 0] for m in (Modality.IMAGE, Modality.TEXT, Modality.SPEECH))
    assert text / image == pytest.approx((640 / 40) ** 0.5) and speech / image == pytest.approx(2**0.5)
    assert (table_TMR * counts_TMR).sum() / counts_TMR.sum() == pytest.approx(1)

    scale = {"speech_to_text": {"speech": 3.0}}
    scaled_TMR = weight_table(loss("balanced", task_modality_weights=scale), counts_TMR)
    ratio = scaled_TMR[Task.SPEECH_TO_TEXT, Modality.SPEECH, 0] / scaled_TMR[Task.TEXT_TO_SPEECH, Modality.SPEECH, 0]
    assert ratio == pytest.approx(3)
    assert (scaled_TMR * counts_TMR).sum() / counts_TMR.sum() == pytest.approx(1)


def test_sft_counts_responses_and_transcripts() -> None:
    table_TMR = weight_table(loss("sft", transcript_weight=0.25), np.zeros_like(UNIFORM_TMR))
    messages = [Message("user", (Text("q"),)), Message("assistant", (Text("heard", is_transcript=True), Text("ok")))]
    example = joint.encode(messages, Task.CHAT, VOCAB, ByteText(), load_templates("quickstart"))
    weights_L = to_targets([StoredExample.of(example)], table_TMR).loss_weights_L
    expected = {Role.RESPONSE: 1.0, Role.TRANSCRIPT: 0.25, Role.PROMPT: 0.0, Role.CONTROL: 0.0}
    np.testing.assert_array_equal(weights_L, [expected[Role(role)] for role in example.roles_L[1:]])
    assert (weights_L == 0.25).sum() == len("heard")


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({"captoin": {"text": 1.0}}, "unknown task"),
        ({"caption": {"imagee": 1.0}}, "did you mean 'image'"),
        ({"caption": {"text": -1.0}}, "negative"),
    ],
)
def test_bad_tables_name_the_key(scale: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weight_table(loss("balanced", task_modality_weights=scale), np.ones_like(UNIFORM_TMR))
