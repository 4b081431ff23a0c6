"""From conversations to the documents of a shard: media to codes, codes and text to tokens, and what is drawn for each.

Everything drawn for a record (the wording of its instruction, noise and room of its speech, whether its picture is also
stored without the question) is a function of the seed and the record's key. A document that is not just what the
source says carries `facts["pretokenize"]`, which says what was done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from aromni_jax.structs import Example, Image, Message, Part, Speech, Task, Text
from aromni_jax.tokenizers import joint
from aromni_jax.tokenizers.bundle import TokenizerBundle
from aromni_jax.tokenizers.prompts import Templates
from aromni_jax.vocab import JointVocab
from data_pipelines.augmentation import Augmentation, Treatment, draws
from data_pipelines.length_limits import TRUNCATED
from data_pipelines.pretokenize_config import PretokenizeConfig
from data_pipelines.records import StoredExample
from data_pipelines.released import TokenizedDocument
from data_pipelines.sources import Conversation, MediaFile, RecordError, check_complete

GUIDED_TASKS = (Task.TEXT_TO_IMAGE, Task.SPEECH_TO_IMAGE)
"""Tasks whose documents may be stored without the question as well."""

FACT = "pretokenize"


@dataclasses.dataclass(frozen=True)
class EncodedRecord:
    """What one record became: `documents` in order, and `remarks` on what was left out or cut, if anything."""

    documents: list[StoredExample]
    remarks: list[RecordError]


@dataclasses.dataclass(frozen=True)
class _Medium:
    """A picture or utterance as it is encoded: the file, and what happens to its sound before."""

    file: MediaFile
    treatment: Treatment | None = None
    utterance: int = 0


@dataclasses.dataclass(frozen=True)
class _Version:
    """One way a conversation is stored: parts are text, or what takes a file's place."""

    key: str
    treatment: Treatment | None
    turns: tuple[tuple[str, tuple[Text | _Medium, ...]], ...]

    def media(self) -> Iterator[_Medium]:
        for _, parts in self.turns:
            yield from (part for part in parts if isinstance(part, _Medium))


class _Media:
    """What came of the media of a shard: codes, or the error, and remarks on their sound."""

    def __init__(self) -> None:
        self.codes: dict[_Medium, np.ndarray] = {}
        self.failures: dict[_Medium, RecordError] = {}
        self.heard: dict[_Medium, dict[str, Any]] = {}

    def part(self, part: Text | _Medium) -> Part:
        """The part with its codes; RecordError where there are none."""
        if isinstance(part, Text):
            return part
        if part in self.failures:
            raise self.failures[part]
        codes = self.codes[part]
        return Image(codes_P=codes) if part.file.kind == "image" else Speech(codes_KU=codes)


class ConversationEncoder:
    """Encodes the conversations of one shard after another; what becomes of one depends on no other.

    Raises:
      ValueError: a folder of noises or rooms that is not there.
    """

    def __init__(
        self, config: PretokenizeConfig, bundle: TokenizerBundle, vocab: JointVocab, templates: Templates
    ) -> None:
        self._config, self._bundle, self._vocab, self._templates = config, bundle, vocab, templates
        self._augmentation = Augmentation(config.augmentation, config.seed)

    @property
    def description(self) -> dict[str, Any]:
        """Fingerprints of what `PretokenizeConfig.settings_of_shards` names by path; empty where nothing is."""
        files = self._augmentation.description
        return {"augmentation": files} if files else {}

    def documents(
        self, conversations: Sequence[Conversation], report: Callable[[float, int], None]
    ) -> Iterator[EncodedRecord]:
        """What each conversation becomes, in order.

        `report` is told the share of media that is encoded, and how many conversations lack some that do not decode.
        """
        versions = [self._versions(conversation) for conversation in conversations]
        media = self._encode_media(versions, report)
        for conversation, group in zip(conversations, versions, strict=True):
            try:
                yield self._record(conversation, group, media)
            except RecordError as error:
                yield EncodedRecord([], [error])

    def _versions(self, conversation: Conversation) -> list[_Version]:
        is_heard = any(
            isinstance(part, MediaFile) and part.kind == "speech"
            for message in conversation.messages
            if message.role == "user"
            for part in message.parts
        )
        treatment = self._augmentation.draw(conversation.key) if is_heard else None
        clean, key = _version(conversation, conversation.key, None), conversation.key
        if treatment is None:
            return [clean]
        if self._config.augmentation.copies == "replace":
            return [_version(conversation, key, treatment)]
        return [clean, _version(conversation, f"{key}#augmented", treatment)]

    def _record(self, conversation: Conversation, versions: Sequence[_Version], media: _Media) -> EncodedRecord:
        documents, remarks = [], []
        for number, version in enumerate(versions):
            example, done = self._example(conversation, version, media)
            for kept, cut in self._config.limits.apply(example, self._vocab, self._bundle.text):
                if "truncated_from" in cut:
                    before, now = cut["truncated_from"], len(kept.tokens_L)
                    remarks.append(RecordError(TRUNCATED, f"{version.key} had {before} tokens; it was cut to {now}"))
                documents.append(_stored(kept, conversation, done | cut))
            if number == 0 and self._is_also_unconditional(conversation):
                unasked = joint.unconditional(example, self._vocab, f"{conversation.key}#unconditional")
                if unasked is not None:
                    documents.append(_stored(unasked, conversation, {"unconditional": True}))
        return EncodedRecord(documents, remarks)

    def _is_also_unconditional(self, conversation: Conversation) -> bool:
        if conversation.task not in GUIDED_TASKS:
            return False
        drawn = draws(self._config.seed, "unconditional", conversation.key).uniform()
        return bool(drawn < self._config.unconditional_fraction)

    def _example(self, conversation: Conversation, version: _Version, media: _Media) -> tuple[Example, dict[str, Any]]:
        """A version's tokens, and what of it was drawn."""
        if isinstance(conversation, TokenizedDocument):
            return conversation.example(self._vocab), {}
        done = version.treatment.facts() if version.treatment else {}
        heard = [media.heard[medium] for medium in version.media() if media.heard.get(medium)]
        if heard:
            done["utterances"] = heard
        instruction, chosen = self._instruction(conversation)
        messages = [Message(role, tuple(media.part(part) for part in parts)) for role, parts in version.turns]
        try:
            _check_said(messages)
            example = joint.encode(
                messages,
                conversation.task,
                self._vocab,
                self._bundle.text,
                self._templates,
                key=version.key,
                instruction=instruction,
            )
        except ValueError as error:
            raise RecordError("encode", f"{conversation.key}: {error}") from error
        return example, done | chosen

    def _instruction(self, conversation: Conversation) -> tuple[str | None, dict[str, int]]:
        """The wording drawn for a record and its number; the templates' own where there is but one."""
        template = self._templates.tasks.get(conversation.task)
        if template is None or len(template.instructions) < 2:
            return None, {}
        rng = draws(self._config.seed, "instruction", conversation.key)
        number = int(rng.integers(len(template.instructions)))
        return template.instructions[number], {"instruction": number}

    def _encode_media(self, versions: Sequence[Sequence[_Version]], report: Callable[[float, int], None]) -> _Media:
        """Codes of every medium, each encoded once; what does not decode becomes an error."""
        needed = [{medium for version in group for medium in version.media()} for group in versions]
        everything = list(dict.fromkeys(m for group in versions for version in group for m in version.media()))
        media = _Media()
        for kind in ("image", "speech"):
            wanted = [medium for medium in everything if medium.file.kind == kind]
            tokenizer = self._bundle.image if kind == "image" else self._bundle.speech
            size = self._config.media_batch_size * (tokenizer.num_devices if tokenizer else 1)
            for start in range(0, len(wanted), size):
                prepared: dict[_Medium, np.ndarray] = {}
                for medium in wanted[start : start + size]:
                    try:
                        prepared[medium] = self._prepare(medium.file)
                    except RecordError as error:
                        media.failures[medium] = error
                        continue
                    if medium.treatment:
                        prepared[medium], media.heard[medium] = self._treated(prepared[medium], medium)
                if prepared:
                    media.codes.update(zip(prepared, self._codes_of(kind, list(prepared.values())), strict=True))
                lacking = sum(not media.failures.keys().isdisjoint(group) for group in needed) if media.failures else 0
                report((len(media.codes) + len(media.failures)) / len(everything), lacking)
        return media

    def _prepare(self, file: MediaFile) -> np.ndarray:
        tokenizer = self._bundle.image if file.kind == "image" else self._bundle.speech
        if tokenizer is None:
            raise RecordError("media", f"the tokenizers have none for {file.kind}, which {file} needs")
        try:
            with file.on_disk() as path:
                check_complete(MediaFile(file.kind, path))
                return tokenizer.prepare(path)
        except RecordError:
            raise
        except (ValueError, OSError) as error:
            raise RecordError("media", str(error)) from error

    def _treated(self, waveform_T: np.ndarray, medium: _Medium) -> tuple[np.ndarray, dict[str, Any]]:
        """The sound after its treatment, and what is remarkable about it."""
        assert medium.treatment and self._bundle.speech
        rate_hz = self._bundle.speech.sample_rate_hz
        treated = self._augmentation.apply(waveform_T, rate_hz, medium.treatment, medium.utterance)
        remarkable: dict[str, Any] = {}
        if treated.lowered_db:
            remarkable["lowered_db"] = round(treated.lowered_db, 3)
        if treated.is_silent:
            remarkable["is_silent"] = True
        return treated.waveform_T, {"utterance": medium.utterance, **remarkable} if remarkable else {}

    def _codes_of(self, kind: str, prepared: list[np.ndarray]) -> Sequence[np.ndarray]:
        if kind == "image":
            assert self._bundle.image
            return list(self._bundle.image.encode(np.stack(prepared)))
        assert self._bundle.speech
        return self._bundle.speech.encode(prepared)


def _version(conversation: Conversation, key: str, treatment: Treatment | None) -> _Version:
    """The conversation with its files, and with the speech of user turns treated."""
    turns, utterance = [], 0
    for message in conversation.messages:
        parts: list[Text | _Medium] = []
        for part in message.parts:
            if isinstance(part, Text):
                parts.append(part)
            elif treatment and message.role == "user" and part.kind == "speech":
                parts.append(_Medium(part, treatment, utterance))
                utterance += 1
            else:
                parts.append(_Medium(part))
        turns.append((message.role, tuple(parts)))
    return _Version(key, treatment, tuple(turns))


def _check_said(messages: Sequence[Message]) -> None:
    """ValueError where a turn says nothing: a model may fall silent, but is not taught to."""
    for number, message in enumerate(messages, 1):
        if not message.parts:
            raise ValueError(f"turn {number} ({message.role}) has no parts; leave the record out or give it some")
        if any(isinstance(part, Text) and not part.text.strip() for part in message.parts):
            raise ValueError(f"turn {number} ({message.role}) has an empty text; leave it out or give it words")


def _stored(example: Example, conversation: Conversation, done: dict[str, Any]) -> StoredExample:
    return StoredExample.of(example, conversation.facts | {FACT: done} if done else conversation.facts)
