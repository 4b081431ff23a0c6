"""The decoding grammar as tables on device: which kinds of token may follow, row by row; no answer is malformed.

A `Policy` says in words what an answer is made of ("an image, then the end"). `compile_grammar` turns the policies of
all tasks into one automaton whose tables are indexed by (state, token class); a class is a kind of token that is always
legal or illegal as a whole, and every control token is a class of its own. The tables are arguments of the compiled
decode step, so rows of different tasks and states decode together in one program.

    text-to-image:  start -begin_image-> image -code x P, end_image-> after image -eos | end_model-> done

Three things make a row well formed by construction: `legal_SC` (what may follow), `budget_S` (an image holds exactly
tokens-per-image codes, other segments at most their budget) and `cost_SC` (a token is legal only if the answer can
still be closed in the tokens that remain, so no answer is cut short). `description` makes a page of it to read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from aromni_jax.arrays import BoolArray, FloatArray, IntArray
from aromni_jax.inference import head
from aromni_jax.inference.policy import GREEDY, Mode, Part, Policy
from aromni_jax.structs import Task
from aromni_jax.vocab import SPECIALS, JointVocab

NEVER = np.iinfo(np.int32).max // 2
"""Cost of a token that can never be afforded."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GrammarTables:
    """The automaton on device; the second index, C, is the token class (not a codebook entry).

    `span_S` numbers the rows of the output head that a state reads (`head.spans_of`); `segment_scope_S` is true where
    the repetition penalty bears on the open segment alone.
    """

    class_V: IntArray
    next_SC: IntArray
    legal_SC: BoolArray
    legal_at_budget_SC: BoolArray
    cost_SC: IntArray
    budget_S: IntArray
    family_S: IntArray
    done_S: BoolArray
    content_C: BoolArray
    temperature_S: FloatArray
    top_k_S: IntArray
    top_p_S: FloatArray
    min_p_S: FloatArray
    repetition_penalty_S: FloatArray
    segment_scope_S: BoolArray
    guidance_S: FloatArray
    image_guidance_S: FloatArray
    span_S: IntArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GrammarState:
    """Where each row is: its state, and how many pieces or codes its open segment holds."""

    state_B: IntArray
    count_B: IntArray


@dataclasses.dataclass(frozen=True, eq=False)
class Grammar:
    """Tables with the names behind their indices; of each task the start state, the shortest answer, and what guidance
    costs without and with a picture in the prompt (`Policy.num_contexts`).

    `kinds` says of each state what is being made there: "text" (also wherever the next segment is chosen),
    "transcript", "speech", "image", or "done".
    """

    tables: GrammarTables
    state_names: tuple[str, ...]
    class_names: tuple[str, ...]
    kinds: tuple[str, ...]
    modes: tuple[Mode, ...]
    start_states: Mapping[Task, int]
    shortest_answers: Mapping[Task, int]
    contexts: Mapping[Task, tuple[int, int]]

    def start_of(self, task: Task) -> int:
        """The state in which answers to `task` begin; ValueError for a task this grammar was compiled without."""
        if task not in self.start_states:
            known = ", ".join(t.command for t in self.start_states)
            raise ValueError(f"task {task.command} is not in this grammar; it was compiled for {known}")
        return self.start_states[task]

    def start(self, tasks: list[Task]) -> GrammarState:
        """State of rows that begin to answer; ValueError for a task this grammar was compiled without."""
        states = np.array([self.start_of(task) for task in tasks], np.int32)
        return GrammarState(jnp.asarray(states), jnp.zeros(len(tasks), jnp.int32))


class _Builder:
    """Collects states and moves by name; `compile_grammar` turns them into arrays."""

    def __init__(self, vocab: JointVocab):
        self.vocab = vocab
        self.classes = ["none", *SPECIALS, "text", "image"] + [f"speech{k}" for k in range(len(vocab.speech))]
        self.states: list[str] = []
        self.moves: list[tuple[int, str, int, bool, bool]] = []
        self.info: list[tuple[int, int, str, Mode]] = []

    def state(self, name: str, family: int, kind: str, mode: Mode = GREEDY, budget: int = NEVER) -> int:
        self.states.append(name)
        self.info.append((budget, family, kind, mode))
        return len(self.states) - 1

    def move(self, state: int, kind: str, target: int, *, before: bool = True, at_budget: bool = True) -> None:
        self.moves.append((state, kind, target, before, at_budget))

    def policy(self, name: str, policy: Policy) -> int:
        """Adds the states of one policy and returns its start state."""
        check_codes(self.vocab, name, policy)
        used = policy.parts
        base = len(self.states)
        num_codebooks = len(self.vocab.speech)
        start = self.state(f"{name}: start", base, "text", policy.text)
        done = self.state(f"{name}: done", base, "done")
        self.move(done, "pad", done)
        entry: dict[str, int] = {}
        loops: list[tuple[int, tuple[Part, ...]]] = [(start, policy.start)]
        if "text" in used:
            entry["text"] = text = self.state(f"{name}: text", base + 1, "text", policy.text, policy.text_budget)
            self.move(text, "text", text, at_budget=False)
            loops.append((text, policy.after["text"]))
        if "transcript" in used:
            entry["transcript"] = said = self.state(
                f"{name}: transcript", base + 2, "transcript", policy.transcript, policy.text_budget
            )
            replying = self.state(f"{name}: after transcript", base, "text", policy.text)
            self.move(said, "text", said, at_budget=False)
            self.move(said, "begin_response", replying)
            loops.append((replying, policy.after["transcript"]))
        if "speech" in used:
            # The first frame has its own state: an utterance holds at least one frame, and may close at any later one.
            entry["speech"] = first = self.state(f"{name}: first frame", base + 3, "speech", policy.speech)
            budget = policy.speech_budget_frames * num_codebooks
            frames = [
                self.state(f"{name}: speech{k}", base + 3, "speech", policy.speech, budget)
                for k in range(num_codebooks)
            ]
            spoken = self.state(f"{name}: after speech", base, "text", policy.text)
            self.move(first, "speech0", frames[1 % num_codebooks])
            for k, state in enumerate(frames):
                self.move(state, f"speech{k}", frames[(k + 1) % num_codebooks], at_budget=k > 0)
            self.move(frames[0], "end_speech", spoken)
            loops.append((spoken, policy.after["speech"]))
        if "image" in used:
            entry["image"] = drawing = self.state(
                f"{name}: image", base + 4, "image", policy.image, self.vocab.tokens_per_image
            )
            drawn = self.state(f"{name}: after image", base, "text", policy.text)
            self.move(drawing, "image", drawing, at_budget=False)
            self.move(drawing, "end_image", drawn, before=False)
            loops.append((drawn, policy.after["image"]))
        opener = {"image": "begin_image", "speech": "begin_speech", "transcript": "begin_transcript", "text": "text"}
        for state, options in loops:
            for option in options:
                if option == "end":
                    # Single answers are closed by eos, turns of a chat by end_model: both end an answer.
                    self.move(state, "eos", done)
                    self.move(state, "end_model", done)
                else:
                    self.move(state, opener[option], entry[option])
        return start


def check_codes(vocab: JointVocab, name: str, policy: Policy) -> None:
    """ValueError when answers of `policy` need images or speech that the vocabulary has no codes for."""
    if "image" in policy.parts and vocab.image is None:
        raise ValueError(f"{name} makes images, but this vocabulary has no image codes")
    if "speech" in policy.parts and not vocab.speech:
        raise ValueError(f"{name} makes speech, but this vocabulary has no speech codes")


def compile_grammar(vocab: JointVocab, policies: Mapping[Task, Policy]) -> Grammar:
    """Compiles the policies of all tasks into one automaton over `vocab`.

    Raises:
      ValueError: a policy asks for images or speech that the vocabulary has no codes for.
    """
    builder = _Builder(vocab)
    starts = {task: builder.policy(task.command, policy) for task, policy in policies.items()}
    kinds = {kind: c for c, kind in enumerate(builder.classes)}
    num_states, num_classes = len(builder.states), len(kinds)
    next_SC = np.tile(np.arange(num_states, dtype=np.int32)[:, None], (1, num_classes))
    legal_SC = np.zeros((num_states, num_classes), bool)
    legal_at_budget_SC = np.zeros_like(legal_SC)
    for state, kind, target, before, at_budget in builder.moves:
        next_SC[state, kinds[kind]] = target
        legal_SC[state, kinds[kind]] |= before
        legal_at_budget_SC[state, kinds[kind]] |= at_budget
    drawing_S = legal_SC[:, kinds["image"]]
    done_S = legal_SC[:, kinds["pad"]]
    cost_S = _tokens_to_close(next_SC, legal_SC | legal_at_budget_SC, drawing_S, done_S, vocab.tokens_per_image)
    # Inside an image every remaining code was paid for on entry; everywhere else a token must leave enough to close.
    cost_SC = np.where(legal_SC | legal_at_budget_SC, cost_S[next_SC], NEVER)
    cost_SC[drawing_S, kinds["image"]] = 0
    cost_SC[done_S, kinds["pad"]] = -NEVER

    class_V = np.zeros(vocab.size, np.int32)
    class_V[vocab.text.start : vocab.text.stop] = kinds["text"]
    if vocab.image:
        class_V[vocab.image.start : vocab.image.stop] = kinds["image"]
    for k, span in enumerate(vocab.speech):
        class_V[span.start : span.stop] = kinds[f"speech{k}"]
    for name, row in vocab.special_ids.items():
        class_V[row] = kinds[name]
    content_C = np.array([kind in ("text", "image") or kind.startswith("speech") for kind in builder.classes])
    budgets, families, segment_kinds, modes = zip(*builder.info, strict=True)
    tables = GrammarTables(
        class_V=jnp.asarray(class_V),
        next_SC=jnp.asarray(next_SC),
        legal_SC=jnp.asarray(legal_SC),
        legal_at_budget_SC=jnp.asarray(legal_at_budget_SC),
        cost_SC=jnp.asarray(cost_SC.astype(np.int32)),
        budget_S=jnp.asarray(budgets, jnp.int32),
        family_S=jnp.asarray(families, jnp.int32),
        done_S=jnp.asarray(done_S),
        content_C=jnp.asarray(content_C),
        temperature_S=jnp.asarray([mode.temperature for mode in modes], jnp.float32),
        top_k_S=jnp.asarray([mode.top_k for mode in modes], jnp.int32),
        top_p_S=jnp.asarray([mode.top_p for mode in modes], jnp.float32),
        min_p_S=jnp.asarray([mode.min_p for mode in modes], jnp.float32),
        repetition_penalty_S=jnp.asarray([mode.repetition_penalty for mode in modes], jnp.float32),
        segment_scope_S=jnp.asarray([mode.repetition_scope == "segment" for mode in modes]),
        guidance_S=jnp.asarray([mode.guidance for mode in modes], jnp.float32),
        image_guidance_S=jnp.asarray([mode.picture_guidance for mode in modes], jnp.float32),
        span_S=jnp.asarray(_spans(vocab, class_V, legal_SC | legal_at_budget_SC), jnp.int32),
    )
    shortest = {task: int(cost_S[state]) for task, state in starts.items()}
    contexts = {
        task: (policy.num_contexts(sees_picture=False), policy.num_contexts(sees_picture=True))
        for task, policy in policies.items()
    }
    return Grammar(
        tables,
        state_names=tuple(builder.states),
        class_names=tuple(builder.classes),
        kinds=segment_kinds,
        modes=modes,
        start_states=starts,
        shortest_answers=shortest,
        contexts=contexts,
    )


def _spans(vocab: JointVocab, class_V: np.ndarray, legal_SC: np.ndarray) -> list[int]:
    """The narrowest part of the output head that holds every legal token of each state."""
    spans, controls = head.spans_of(vocab), np.array(list(vocab.special_ids.values()))
    return [head.span_of_rows(spans, np.flatnonzero(legal_C[class_V]), controls) for legal_C in legal_SC]


def _tokens_to_close(next_SC, legal_SC, drawing_S, done_S, tokens_per_image) -> np.ndarray:
    """Fewest tokens from each state to the end of the answer (Bellman-Ford; an image costs all of its codes)."""
    cost_S = np.where(done_S, 0, NEVER).astype(np.int64)
    for _ in range(len(cost_S)):
        through_SC = np.where(legal_SC, 1 + cost_S[next_SC], NEVER)
        # A drawing state reaches its exit only after all codes; staying in it is never the way out.
        leaves_SC = np.where(next_SC == np.arange(len(cost_S))[:, None], NEVER, through_SC)
        best_S = leaves_SC.min(axis=1) + np.where(drawing_S, tokens_per_image, 0)
        cost_S = np.where(done_S, 0, np.minimum(best_S, NEVER))
    return cost_S


def allowed_classes(tables: GrammarTables, grammar: GrammarState, remaining_B: IntArray) -> BoolArray:
    """Bool [B, C]: the token classes each row may emit now, with `remaining_B` tokens (this one included) to go."""
    at_budget_B = grammar.count_B >= tables.budget_S[grammar.state_B]
    legal_BC = jnp.where(
        at_budget_B[:, None], tables.legal_at_budget_SC[grammar.state_B], tables.legal_SC[grammar.state_B]
    )
    return legal_BC & (tables.cost_SC[grammar.state_B] <= remaining_B[:, None] - 1)


def allowed_tokens(tables: GrammarTables, grammar: GrammarState, remaining_B: IntArray) -> BoolArray:
    """Bool [B, V]: `allowed_classes` spread over the vocabulary."""
    return jnp.take(allowed_classes(tables, grammar, remaining_B), tables.class_V, axis=1)


def advance(tables: GrammarTables, grammar: GrammarState, tokens_B: IntArray) -> GrammarState:
    """State after each row emitted its token; the count starts again when another segment begins."""
    classes_B = tables.class_V[tokens_B]
    state_B = tables.next_SC[grammar.state_B, classes_B]
    same_B = tables.family_S[state_B] == tables.family_S[grammar.state_B]
    count_B = jnp.where(same_B, grammar.count_B, 0) + tables.content_C[classes_B]
    return GrammarState(state_B, count_B)


def repeated(tables: GrammarTables, grammar: GrammarState, seen_BV: IntArray, step_B: IntArray) -> BoolArray:
    """Bool [B, V]: the tokens that each row's repetition penalty bears on, of `step_B` tokens made so far.

    `seen_BV` counts from 1 when a token was last made; 0 is never (`note_seen`).
    """
    # A segment's pieces or codes stand at the end of the answer, and `count_B` is how many there are.
    scope_B = jnp.where(tables.segment_scope_S[grammar.state_B], step_B - grammar.count_B, 0)
    return seen_BV > scope_B[:, None]


def note_seen(tables: GrammarTables, seen_BV: IntArray, tokens_B: IntArray, step_B: IntArray) -> IntArray:
    """`seen_BV` after each row made a token as number `step_B` of its answer, from 0; control tokens are not noted."""
    when_B = jnp.where(tables.content_C[tables.class_V[tokens_B]], step_B + 1, 0)
    return seen_BV.at[jnp.arange(len(tokens_B)), tokens_B].set(when_B)
