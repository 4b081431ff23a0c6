"""A reader of answers that knows no tables: METHOD section 6 and the templates' order of parts, in plain Python."""

from __future__ import annotations

from aromni_jax.inference.policy import Policy
from aromni_jax.structs import Task
from aromni_jax.vocab import JointVocab


def read(tokens: list[int], vocab: JointVocab) -> list[tuple[str, list[int]]]:
    """An answer's segments; raises AssertionError where it is malformed. Says METHOD section 6 in plain Python."""
    assert tokens[-1] in (vocab.eos, vocab.end_model)
    segments: list[tuple[str, list[int]]] = []
    i, body = 0, tokens[:-1]
    while i < len(body):
        token = body[i]
        if token == vocab.begin_image:
            codes = body[i + 1 : i + 1 + vocab.tokens_per_image]
            assert len(codes) == vocab.tokens_per_image and all(code in vocab.image for code in codes)
            assert body[i + 1 + len(codes)] == vocab.end_image
            segments.append(("image", codes))
            i += len(codes) + 2
        elif token == vocab.begin_speech:
            stop = body.index(vocab.end_speech, i)
            codes = body[i + 1 : stop]
            assert codes and len(codes) % len(vocab.speech) == 0
            assert all(code in vocab.speech[k % len(vocab.speech)] for k, code in enumerate(codes))
            segments.append(("speech", codes))
            i = stop + 1
        elif token == vocab.begin_transcript:
            stop = body.index(vocab.begin_response, i)
            assert all(piece in vocab.text for piece in body[i + 1 : stop])
            segments.append(("transcript", body[i + 1 : stop]))
            i = stop + 1
        else:
            start = i
            while i < len(body) and body[i] in vocab.text:
                i += 1
            assert i > start, f"token {token} may not stand here"
            segments.append(("text", body[start:i]))
    return segments


def check(tokens: list[int], task: Task, vocab: JointVocab, policy: Policy) -> None:
    kinds = [kind for kind, _ in read(tokens, vocab)]
    allowed = {
        Task.TEXT_TO_IMAGE: [["image"]],
        Task.SPEECH_TO_IMAGE: [["image"], ["transcript", "image"]],
        Task.TEXT_TO_SPEECH: [["speech"]],
    }.get(task, [["text"]])
    if task == Task.CHAT:
        rank = ["transcript", "text", "speech", "image"]
        assert kinds and kinds == sorted(set(kinds), key=rank.index) and kinds[0] in ("transcript", "text")
    else:
        assert kinds in allowed
    for kind, body in read(tokens, vocab):
        if kind == "speech":
            assert len(body) <= policy.speech_budget_frames * len(vocab.speech)
        if kind in ("text", "transcript"):
            assert len(body) <= policy.text_budget
