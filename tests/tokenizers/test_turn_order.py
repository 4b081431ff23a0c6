"""Questions with their answers are taught: any other order of turns is refused. Prompts have no answer yet."""

from __future__ import annotations

import numpy as np
import pytest

from aromni_jax.structs import Image, Message, Part, Speech, Task, Text
from aromni_jax.tokenizers import joint
from aromni_jax.tokenizers.prompts import SHIPPED, load_templates
from aromni_jax.tokenizers.text import ByteText
from aromni_jax.vocab import JointVocab

VOCAB = JointVocab.build(text_size=256, image_codes=32, tokens_per_image=4, speech_codes=(16,))
PICTURE, SOUND, WORDS = Image(codes_P=np.arange(4)), Speech(codes_KU=np.arange(3)[None]), Text("words")
PAIRS: dict[Task, tuple[Part, Part]] = {
    Task.TEXT_TO_IMAGE: (WORDS, PICTURE),
    Task.CAPTION: (PICTURE, WORDS),
    Task.SPEECH_TO_TEXT: (SOUND, WORDS),
    Task.TEXT_TO_SPEECH: (WORDS, SOUND),
    Task.SPEECH_TO_IMAGE: (SOUND, PICTURE),
    Task.QUESTION: (WORDS, WORDS),
    Task.CHAT: (WORDS, WORDS),
}
WRONG = ("u", "a", "au", "uu", "aa", "uau", "aua", "uua", "uaa", "")


def turns(task: Task, order: str) -> list[Message]:
    asked, answer = (Message(role, (part,)) for role, part in zip(("user", "assistant"), PAIRS[task], strict=True))
    return [asked if turn == "u" else answer for turn in order]


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("task", PAIRS)
def test_every_question_has_its_answer(task: Task, name: str) -> None:
    templates = load_templates(name)
    joint.encode(turns(task, "ua"), task, VOCAB, ByteText(), templates)
    for order in (*WRONG, *(("uaua",) if task != Task.CHAT else ())):
        with pytest.raises(ValueError, match=f"a document of task '{task.label}' is one user turn, then one assistant"):
            joint.encode(turns(task, order), task, VOCAB, ByteText(), templates)
    # An answer is generated from what has none.
    assert len(joint.prompt(turns(task, "u"), task, VOCAB, ByteText(), templates).tokens_L) > 1


def test_a_chat_has_any_number_of_pairs_and_a_text_one_turn() -> None:
    templates = load_templates("quickstart")
    chat = joint.encode(turns(Task.CHAT, "uauaua"), Task.CHAT, VOCAB, ByteText(), templates)
    assert [message.role for message in joint.decode(chat, VOCAB, ByteText())] == ["user", "assistant"] * 3
    with pytest.raises(ValueError, match="this one has assistant, user, user, user, user, user, ...$"):
        joint.encode(turns(Task.CHAT, "auuuuuuu"), Task.CHAT, VOCAB, ByteText(), templates)
    text = Message("assistant", (WORDS,))
    joint.encode([text], Task.TEXT, VOCAB, ByteText(), templates)
    with pytest.raises(ValueError, match="is one assistant turn; this one has assistant, assistant"):
        joint.encode([text, text], Task.TEXT, VOCAB, ByteText(), templates)
