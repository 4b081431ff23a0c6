"""The shipped decoding configs; the released one against METHOD section 6 said in plain Python, token by token."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax.config import from_mapping
from aromni_jax.inference.grammar import advance, allowed_tokens, compile_grammar
from aromni_jax.inference.policy import GREEDY, DecodingConfig, Mode, Policy, policy_for
from aromni_jax.inference.sampling import row_keys, sample
from aromni_jax.structs import Task
from aromni_jax.vocab import JointVocab
from launch.flags import load_config

VOCAB = JointVocab.build(text_size=40, image_codes=16, tokens_per_image=5, speech_codes=(8,))
LENGTH = 80


def shipped(variant: str = "", *overrides: str) -> DecodingConfig:
    target = "configs/decode.py" + (f":{variant}" if variant else "")
    return from_mapping(
        DecodingConfig, load_config(argparse.Namespace(config=target, config_overrides=list(overrides)))
    )


RELEASED = shipped("released")
FREELY = Policy(
    start=("text", "transcript", "speech", "image"),
    after={
        "text": ("transcript", "speech", "image", "end"),
        "transcript": ("text", "transcript", "speech", "image", "end"),
        "speech": ("text", "transcript", "speech", "image", "end"),
        "image": ("text", "transcript", "speech", "image", "end"),
    },
    text=RELEASED.text,
    transcript=RELEASED.transcript,
    speech=RELEASED.speech,
    image=RELEASED.image,
)
"""Everything may follow everything: the machine of METHOD section 6, which knows no order of parts."""


def method_6(tokens: list[int]) -> Iterator[tuple[str, bool, int]]:
    """What is being made, whether greedily, and how many image codes are to come, before each token and at the end."""
    kind, is_greedy, codes_to_come = "text", False, 0
    for token in tokens:
        yield kind, is_greedy, codes_to_come
        if token in (VOCAB.begin_transcript, VOCAB.begin_speech):
            kind, is_greedy = "transcript" if token == VOCAB.begin_transcript else "speech", True
        elif token in (VOCAB.begin_response, VOCAB.end_speech):
            kind, is_greedy = "text", False
        elif token == VOCAB.begin_image:
            kind, codes_to_come = "image", VOCAB.tokens_per_image
        elif token == VOCAB.end_image:
            kind = "text"
        elif kind == "image":
            codes_to_come -= 1
        elif token in (VOCAB.eos, VOCAB.end_model):
            kind, is_greedy = "done", True
    yield kind, is_greedy, codes_to_come


@functools.partial(jax.jit, static_argnames=("num_steps",))
def random_streams(tables, state, keys_B, *, num_steps):
    """Random legal tokens, each kind of token as likely as every other, with each state and what was legal there."""
    num_rows = len(keys_B)
    share_V = -jnp.log(jnp.zeros(len(tables.next_SC[0])).at[tables.class_V].add(1.0))[tables.class_V]

    def emit(state, step):
        remaining_B = jnp.full(num_rows, num_steps - step)
        allowed_BV = allowed_tokens(tables, state, remaining_B)
        token_B = sample(
            jnp.broadcast_to(share_V, allowed_BV.shape),
            allowed_BV,
            jax.vmap(jax.random.fold_in, (0, None))(keys_B, step),
            temperature_B=jnp.ones(num_rows),
            top_k_B=jnp.zeros(num_rows, jnp.int32),
            top_p_B=jnp.ones(num_rows),
            min_p_B=jnp.zeros(num_rows),
        )
        return advance(tables, state, token_B), (token_B, state.state_B, allowed_BV)

    end, (tokens_TB, states_TB, allowed_TBV) = jax.lax.scan(emit, state, jnp.arange(num_steps))
    states_TB = jnp.concatenate([states_TB, end.state_B[None]])
    return tokens_TB.T, states_TB.T, jnp.swapaxes(allowed_TBV, 0, 1)


@pytest.mark.parametrize("policies", [{Task.CHAT: FREELY}, {task: policy_for(task, RELEASED) for task in Task}])
def test_the_released_policy_is_method_6(policies):
    grammar = compile_grammar(VOCAB, policies)
    tasks = list(policies) * (800 // len(policies))
    tables = jax.tree.map(np.asarray, grammar.tables)
    run = random_streams(grammar.tables, grammar.start(tasks), row_keys(0, list(range(len(tasks)))), num_steps=LENGTH)
    modes = {
        "text": Mode(1.2, top_p=0.96, repetition_penalty=1.2),
        "image": Mode(1.0, top_p=0.96, guidance=3.07, image_guidance=1.15),
    }
    media = {"image": VOCAB.image, "speech": VOCAB.speech[0]}
    visits, returns = set(), set()
    for tokens_T, states_T, allowed_TV in zip(*map(np.asarray, run), strict=True):
        said = list(method_6(tokens_T.tolist()))
        assert said[-1][0] == "done"
        for step, (kind, is_greedy, codes_to_come) in enumerate(said):
            state = int(states_T[step])
            assert grammar.kinds[state] == kind
            assert grammar.modes[state] == (GREEDY if is_greedy else modes[kind])
            assert (tables.temperature_S[state] == 0) == is_greedy
            visits.add(kind)
            if kind in media:
                legal = set(np.flatnonzero(allowed_TV[step]).tolist())
                codes = set(range(media[kind].start, media[kind].stop))
                wanted = codes if codes_to_come else {VOCAB.end_image}
                assert legal == wanted if kind == "image" else legal <= codes | {VOCAB.end_speech}
            if step and kind == "text":
                returns.add(said[step - 1][0])
    assert visits == {"text", "transcript", "speech", "image", "done"}
    assert returns == {"text", "transcript", "speech", "image"}


def test_shipped_configs_are_the_defaults_and_the_released_settings():
    assert shipped() == shipped("ours") == DecodingConfig()
    assert RELEASED.text == RELEASED.recognition == Mode(1.2, top_p=0.96, repetition_penalty=1.2)
    assert RELEASED.transcript == RELEASED.speech == DecodingConfig().recognition == GREEDY
    assert shipped("", "--config.image.top_k=9").image.top_k == 9
    with pytest.raises(ValueError, match="unknown variant 'paper'"):
        shipped("paper")


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("text.temperature", "-1.0", "a number of at least 0"),
        ("image.top_k", "-1", "a whole number from 0"),
        ("speech.top_p", "0.0", "a number above 0 and at most 1"),
        ("text.min_p", "2.0", "a number from 0 to 1"),
        ("recognition.repetition_penalty", "0.0", "a number above 0"),
        ("transcript.guidance", "-2.0", "a number of at least 0"),
        ("image.image_guidance", "-0.5", "a number of at least 0"),
        ("text_budget", "0", "a whole number from 1 to 1000000"),
        ("speech_budget_frames", "99999999999", "a whole number from 1 to 1000000"),
    ],
)
def test_an_impossible_number_is_named_by_its_key(key, value, allowed):
    with pytest.raises(ValueError, match=f"config key '{key}': .* is not allowed; give {allowed}"):
        shipped("", f"--config.{key}={value}")
