"""The one encoder: golden ids of every template, exact inverses, and prompts that are prefixes of training data."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aromni_jax.structs import Image, Message, Modality, Role, Speech, Task, Text
from aromni_jax.tokenizers import joint
from aromni_jax.tokenizers.prompts import SHIPPED, load_templates, parse_templates
from aromni_jax.tokenizers.text import ByteText
from aromni_jax.vocab import JointVocab

TEXT = ByteText()
SMALL = JointVocab.build(text_size=256, image_codes=32, tokens_per_image=4, speech_codes=(16, 16))
RELEASED = JointVocab.released()


class ReleasedBytes(ByteText):
    """Bytes at the first text rows of the released layout, whose text tokenizer speaks rows itself."""

    def encode(self, text):
        return [RELEASED.text.start + byte for byte in super().encode(text)]

    def decode(self, ids):
        return super().decode([i - RELEASED.text.start for i in ids])


def released_ids(*pieces):
    """Ids of a golden sequence: names of control tokens, literal text, or lists of rows."""
    ids = []
    for piece in pieces:
        if isinstance(piece, list):
            ids += piece
        elif piece in RELEASED.special_ids:
            ids.append(RELEASED.special_ids[piece])
        else:
            ids += [16384 + byte for byte in piece.encode()]
    return ids


IMAGE = Image(codes_P=np.arange(1024, dtype=np.int32))
SPEECH = Speech(codes_KU=np.array([[5, 6, 7]], np.int32))
IMAGE_IDS = [8197, *range(4, 1028), 8196]
SPEECH_IDS = [12821, 8729, 8730, 8731, 12820]

GOLDEN = {
    ("official-v0.1", Task.TEXT_TO_IMAGE): (
        [Text("a cat")],
        [IMAGE],
        [
            "bos",
            "USER:",
            "Please generate an image.",
            " This is input: ",
            "a cat",
            "end_human",
            " GPT:",
            IMAGE_IDS,
            "eos",
        ],
    ),
    ("official-v0.1", Task.SPEECH_TO_TEXT): (
        [SPEECH],
        [Text("five")],
        ["bos", "USER:", "Please transcribe the speech.", SPEECH_IDS, "end_human", "GPT:", "five", "eos"],
    ),
    ("official-v0.1", Task.TEXT_TO_SPEECH): (
        [Text("five")],
        [SPEECH],
        [
            "bos",
            "USER:",
            "Please read the text aloud.",
            "This is input: ",
            "five",
            "end_human",
            "GPT:",
            SPEECH_IDS,
            "eos",
        ],
    ),
    ("official-v0.1", Task.CAPTION): (
        [IMAGE],
        [Text("a cat")],
        ["bos", "USER:", IMAGE_IDS, "Please describe the image.", "end_human", "GPT:", "a cat", "eos"],
    ),
    ("official-v0.1", Task.CHAT): (
        [Text("look"), SPEECH, IMAGE],
        [Text("what is it", is_transcript=True), Text("a cat"), SPEECH],
        ["bos", "USER:", IMAGE_IDS, SPEECH_IDS, "look", "end_human", "GPT:", "begin_transcript", "what is it"]
        + ["begin_response", "a cat", SPEECH_IDS, "end_model"],
    ),
    ("paper", Task.TEXT_TO_IMAGE): (
        [Text("a cat")],
        [IMAGE],
        ["bos", "USER: Create an image for: ", "a cat", "end_human", "ASSISTANT:", IMAGE_IDS, "eos"],
    ),
    ("paper", Task.SPEECH_TO_TEXT): (
        [SPEECH],
        [Text("five")],
        ["bos", "USER: Transcribe the audio.", SPEECH_IDS, "end_human", "ASSISTANT:", "five", "eos"],
    ),
    ("paper", Task.CAPTION): (
        [IMAGE],
        [Text("a cat")],
        ["bos", "USER: Describe the image.", IMAGE_IDS, "end_human", "ASSISTANT:", "a cat", "eos"],
    ),
    ("quickstart", Task.TEXT_TO_SPEECH): (
        [Text("five")],
        [SPEECH],
        ["bos", "say: ", "five", "end_human", SPEECH_IDS, "eos"],
    ),
    ("quickstart", Task.SPEECH_TO_IMAGE): (
        [SPEECH],
        [IMAGE],
        ["bos", SPEECH_IDS, "draw", "end_human", IMAGE_IDS, "eos"],
    ),
    ("quickstart", Task.TEXT): (None, [Text("a cat")], ["bos", "a cat", "eos"]),
}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case[0]}-{case[1].label}")
def test_golden_ids_in_the_released_vocabulary(case):
    name, task = case
    user, assistant, pieces = GOLDEN[case]
    messages = [Message("assistant", tuple(assistant))]
    if user:
        messages.insert(0, Message("user", tuple(user)))
    example = joint.encode(messages, task, RELEASED, ReleasedBytes(), load_templates(name))
    assert example.tokens_L.tolist() == released_ids(*pieces)


texts = st.builds(Text, st.text(max_size=12))
images = st.lists(st.integers(0, 31), min_size=4, max_size=4).map(lambda c: Image(codes_P=np.array(c, np.int32)))
speeches = st.integers(0, 6).flatmap(
    lambda n: st.lists(st.integers(0, 15), min_size=2 * n, max_size=2 * n).map(
        lambda c: Speech(codes_KU=np.array(c, np.int32).reshape(2, n))
    )
)
transcripts = st.builds(Text, st.text(max_size=12), st.just(True))


def turn(role, *kinds):
    return st.tuples(*kinds).map(lambda groups: Message(role, tuple(part for group in groups for part in group)))


def many(parts):
    return st.lists(parts, max_size=2)


def one(parts):
    return parts.map(lambda part: [part])


SHAPES = {
    Task.TEXT: [("assistant", one(texts))],
    Task.TEXT_TO_IMAGE: [("user", one(texts)), ("assistant", one(images))],
    Task.CAPTION: [("user", one(images)), ("assistant", one(texts))],
    Task.SPEECH_TO_TEXT: [("user", one(speeches)), ("assistant", one(texts))],
    Task.TEXT_TO_SPEECH: [("user", one(texts)), ("assistant", one(speeches))],
    Task.SPEECH_TO_IMAGE: [("user", one(speeches)), ("assistant", one(images))],
    Task.QUESTION: [("user", many(texts), many(images)), ("assistant", one(texts))],
    Task.CHAT: [
        ("user", many(speeches), many(texts), many(images)),
        ("assistant", many(transcripts), many(texts), many(images)),
        ("user", many(texts)),
        ("assistant", many(speeches)),
    ],
}
conversations = st.sampled_from(sorted(SHAPES)).flatmap(
    lambda task: st.tuples(*(turn(role, *kinds) for role, *kinds in SHAPES[task])).map(lambda m: (task, list(m)))
)


def same(a, b):
    if isinstance(a, Text):
        return a == b
    codes = "codes_P" if isinstance(a, Image) else "codes_KU"
    return type(a) is type(b) and np.array_equal(getattr(a, codes), getattr(b, codes))


@given(conversations, st.sampled_from(SHIPPED))
def test_decode_is_the_inverse_of_encode(conversation, templates_name):
    task, messages = conversation
    example = joint.encode(messages, task, SMALL, TEXT, load_templates(templates_name), key="k")
    assert sum(span.length for span in example.spans) == len(example.tokens_L) == len(example.roles_L)
    decoded = joint.decode(example, SMALL, TEXT)
    assert [m.role for m in decoded] == [m.role for m in messages]
    for found, given_message in zip(decoded, messages, strict=True):
        assert len(found.parts) == len(given_message.parts)
        assert all(same(a, b) for a, b in zip(found.parts, given_message.parts, strict=True))


@given(conversations, st.sampled_from(SHIPPED))
def test_a_prompt_is_the_prefix_the_model_was_trained_on(conversation, templates_name):
    task, messages = conversation
    templates = load_templates(templates_name)
    whole = joint.encode(messages, task, SMALL, TEXT, templates)
    prefix = joint.prompt(messages[:-1], task, SMALL, TEXT, templates)
    np.testing.assert_array_equal(whole.tokens_L[: len(prefix.tokens_L)], prefix.tokens_L)
    rest = whole.tokens_L[len(prefix.tokens_L) :]
    assert set(whole.roles_L[len(prefix.tokens_L) :]) <= {Role.RESPONSE, Role.TRANSCRIPT}
    parts = [p for p in messages[-1].parts]
    if len(parts) == 1 and not (isinstance(parts[0], Text) and parts[0].text == ""):
        (found,) = joint.parts_of(rest, SMALL, TEXT)
        assert same(found, parts[0])


def test_roles_and_modalities_are_facts_of_spans():
    messages = [Message("user", (Text("x"),)), Message("assistant", (Image(codes_P=np.arange(4)),))]
    example = joint.encode(messages, Task.TEXT_TO_IMAGE, SMALL, TEXT, load_templates("paper"))
    image = example.modality_L == Modality.IMAGE
    assert image.sum() == 6 and (example.roles_L[image] == Role.RESPONSE).all()
    assert example.roles_L[-1] == Role.RESPONSE and example.roles_L[0] == Role.CONTROL


def test_parts_without_a_place_and_missing_parts_are_named():
    templates = load_templates("official-v0.1")
    with pytest.raises(ValueError, match="needs a part of kind speech; it has text"):
        joint.encode([Message("user", (Text("x"),))], Task.SPEECH_TO_TEXT, SMALL, TEXT, templates)
    with pytest.raises(ValueError, match="no place for these parts of the user turn: text"):
        joint.encode([Message("user", (Text("x"), Text("y")))], Task.TEXT_TO_IMAGE, SMALL, TEXT, templates)
    with pytest.raises(ValueError, match="must be tokenized"):
        joint.encode([Message("user", (Image(),))], Task.CAPTION, SMALL, TEXT, templates)
    with pytest.raises(ValueError, match="unknown role 'system'"):
        joint.encode([Message("system", ())], Task.CHAT, SMALL, TEXT, templates)


def test_template_files_are_checked():
    with pytest.raises(ValueError, match="neither shipped"):
        load_templates("offcial")
    with pytest.raises(ValueError, match="did you mean <end_human>"):
        parse_templates('{"name": "x", "tasks": {"text": {"turns": {"assistant": ["<end_humn>"]}, "end": []}}}', "x")
    with pytest.raises(ValueError, match="not a template file"):
        parse_templates("{}", "x")
