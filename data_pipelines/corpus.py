"""The embedded corpus: real input made without a download, written to disk as any corpus would be.

Handwritten digits that ship with scikit-learn (1,797 real scans), rendered scenes, and speech by espeak-ng become PNG
and WAV files and a JSONL manifest of conversations, and then take the same road as a user's own data. One picture or
utterance serves several conversations by path.

    DIR/digits/*.png  DIR/scenes/*.png  DIR/speech_000/*.wav ...   each with part.jsonl: a line of facts per file
    DIR/manifest.jsonl                                             one conversation per line
    DIR/corpus.json                                                sizes, seed and counts; written last

Everything is a function of (sizes, seed). A part is written in a temporary directory and renamed when complete, so an
interrupted build goes on with the first unfinished part.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image as PilImage

from data_pipelines import espeak, scenes
from data_pipelines.espeak import Utterance

VERSION = 4
"""Raised whenever the same (sizes, seed) would give other files."""

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAIN_VOICES = (
    "en-us",
    "en-us+m3",
    "en-us+m7",
    "en-us+f2",
    "en-us+f4",
    "en-gb-x-rp",
    "en-gb-x-rp+f3",
    "en-gb-scotland+m2",
)
HELD_OUT_VOICES = ("en-us+f1", "en-gb-x-rp+m5")
"""Never heard in training; numbers for them are reported beside those for heard voices."""

MANIFEST = "manifest.jsonl"
_UTTERANCES_PER_PART = 900
_PICTURES_PER_REQUEST = 2
"""In training a spoken request is answered by this many pictures, and a scan asked for by as many utterances."""
_DIGIT_CAPTIONS = (
    "a handwritten {}",
    "the digit {}",
    "a picture of the number {}",
    "the number {}",
    "a white {} on black",
)
_DIGIT_QUESTIONS = ("which digit is this?", "what number is shown?", "what does it say?")

Progress = Callable[[dict[str, Any]], None]
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CorpusSizes:
    """How many pictures and utterances; conversations follow from them."""

    train_scenes: int = 6000
    heldout_scenes: int = 120
    heldout_scans: int = 297
    digit_utterances_per_voice: int = 120
    phrase_utterances: int = 2000
    heldout_digit_utterances_per_voice: int = 20
    heldout_phrases_per_voice: int = 30


def build_corpus(
    output_dir: str | os.PathLike[str],
    *,
    seed: int = 0,
    sizes: CorpusSizes | None = None,
    progress: Progress | None = None,
) -> pathlib.Path:
    """Writes the embedded corpus under `output_dir` and returns the path of its manifest.

    Finished parts are kept, so the call also resumes an interrupted build; a complete corpus returns at once.
    `progress` is called with {"part", "done", "total"}.

    Raises:
      ValueError: the directory holds a corpus of another version, seed or other sizes.
    """
    root = pathlib.Path(output_dir)
    sizes = sizes or CorpusSizes()
    wanted = {"version": VERSION, "seed": seed, "sizes": dataclasses.asdict(sizes)}
    root.mkdir(parents=True, exist_ok=True)
    _check_same_corpus(root, wanted)
    if (root / "corpus.json").exists():
        return root / MANIFEST

    report = progress or (lambda event: None)
    for leftover in root.glob(".tmp-*"):
        shutil.rmtree(leftover)
    pictures = _scene_list(sizes, seed)
    utterances = _utterance_list(sizes, seed, pictures)
    digits = _write_part(root, "digits", lambda path: _write_digits(path, sizes, seed), report)
    scene_records = _write_part(root, "scenes", lambda path: _write_scenes(path, pictures), report)
    speech_records = _write_speech(root, utterances, report)
    conversations = [
        conversation
        for split in ("train", "heldout")
        for conversation in _conversations(split, seed, digits, scene_records, pictures, speech_records)
    ]
    _write_atomically(root / MANIFEST, "".join(json.dumps(line) + "\n" for line in conversations))
    counts = Counter(f"{line['split']}/{line['task']}" for line in conversations)
    summary = wanted | {"conversations": dict(sorted(counts.items()))}
    _write_atomically(root / "corpus.json", json.dumps(summary, indent=2) + "\n")
    report({"part": "manifest", "done": len(conversations), "total": len(conversations)})
    return root / MANIFEST


def _check_same_corpus(root: pathlib.Path, wanted: Record) -> None:
    started = root / "corpus.started.json"
    if started.exists():
        found = json.loads(started.read_text())
        if found != wanted:
            raise ValueError(
                f"{root} holds the embedded corpus with {found}, this run asks for {wanted}; "
                "choose another directory or delete that one"
            )
    else:
        _write_atomically(started, json.dumps(wanted) + "\n")


def _write_atomically(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _write_part(
    root: pathlib.Path, name: str, write: Callable[[pathlib.Path], list[Record]], report: Progress
) -> list[Record]:
    """Runs `write` in a temporary directory and renames it to `name`; reads the facts back when the part exists."""
    if not (root / name).exists():
        temporary = root / f".tmp-{name}"
        temporary.mkdir()
        records = write(temporary)
        (temporary / "part.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        os.replace(temporary, root / name)
    records = [json.loads(line) for line in (root / name / "part.jsonl").read_text().splitlines()]
    report({"part": name, "done": len(records), "total": len(records)})
    return [record | {"path": f"{name}/{record['name']}"} for record in records]


def _rng(seed: int, *key: str | int) -> np.random.Generator:
    """A generator of its own for every (seed, key): nothing depends on what was drawn before."""
    return np.random.default_rng(
        [seed, *(part if isinstance(part, int) else zlib.crc32(part.encode()) for part in key)]
    )


def digit_picture(scan_88: np.ndarray) -> np.ndarray:
    """An 8x8 scan with values 0..16 as a white stroke on black, uint8 [64, 64, 3], smooth at the edges."""
    # A dark border of one scan pixel keeps strokes from ending at the edge of the picture.
    grey = PilImage.fromarray(np.pad(np.clip(scan_88 * (255 / 16), 0, 255).astype(np.uint8), 1))
    large = np.asarray(grey.resize((scenes.IMAGE_SIZE,) * 2, PilImage.Resampling.BICUBIC), np.float32) / 255
    canvas = np.round(np.clip((large - 0.2) / 0.5, 0, 1) * 255).astype(np.uint8)
    return np.repeat(canvas[:, :, None], 3, axis=2)


def _write_digits(path: pathlib.Path, sizes: CorpusSizes, seed: int) -> list[Record]:
    from sklearn.datasets import load_digits

    data = load_digits()
    heldout = set(_rng(seed, "scans").permutation(len(data.images))[: sizes.heldout_scans].tolist())
    records = []
    for index, (scan_88, label) in enumerate(zip(data.images, data.target, strict=True)):
        name = f"{index:04d}.png"
        PilImage.fromarray(digit_picture(scan_88)).save(path / name, compress_level=1)
        split, holdout = ("heldout", "scan") if index in heldout else ("train", "")
        facts = {"kind": "digit", "label": str(label)}
        records.append({"name": name, "split": split, "holdout": holdout, "facts": facts})
    return records


@dataclasses.dataclass(frozen=True)
class _Picture:
    """A scene and the split it belongs to."""

    name: str
    scene: scenes.Scene
    split: str
    holdout: str


def _scene_list(sizes: CorpusSizes, seed: int) -> list[_Picture]:
    groups = (
        ("train", "", sizes.train_scenes),
        ("heldout", "combination", sizes.heldout_scenes),
        ("heldout", "sample", sizes.heldout_scenes),
    )
    pictures = []
    for split, holdout, count in groups:
        for index in range(count):
            rng = _rng(seed, "scene", split, holdout, index)
            scene = scenes.random_scene(rng, held_out=holdout == "combination", index=index)
            pictures.append(_Picture(f"{holdout or split}_{index:05d}.png", scene, split, holdout))
    return pictures


def _write_scenes(path: pathlib.Path, pictures: list[_Picture]) -> list[Record]:
    for picture in pictures:
        PilImage.fromarray(scenes.render(picture.scene)).save(path / picture.name, compress_level=1)
    return [
        {
            "name": p.name,
            "split": p.split,
            "holdout": p.holdout,
            "facts": p.scene.facts,
            "scene": dataclasses.asdict(p.scene),
        }
        for p in pictures
    ]


@dataclasses.dataclass(frozen=True)
class _Planned:
    """An utterance to be spoken, what it names, and the split it belongs to. `scene` is "" for digits."""

    utterance: Utterance
    split: str
    holdout: str
    label: str
    scene: str


def _utterance_list(sizes: CorpusSizes, seed: int, pictures: list[_Picture]) -> list[_Planned]:
    by_group = {
        key: [p for p in pictures if (p.split, p.holdout) == key] for key in {(p.split, p.holdout) for p in pictures}
    }
    planned: list[_Planned] = []

    def plan(split: str, holdout: str, voice: str, text: str, label: str, scene: str) -> None:
        rng = _rng(seed, "utterance", len(planned))
        rate, pitch = int(rng.integers(155, 215)), int(rng.integers(35, 66))
        name = f"utterance_{len(planned):05d}"
        planned.append(_Planned(Utterance(name, text, voice, rate, pitch), split, holdout, label, scene))

    def plan_digits(split: str, holdout: str, voices: tuple[str, ...], per_voice: int) -> None:
        for index in range(per_voice):
            for voice in voices:
                digit = index % 10
                plan(split, holdout, voice, DIGIT_WORDS[digit], str(digit), "")

    def plan_phrases(split: str, holdout: str, voices: tuple[str, ...], source: list[_Picture], count: int) -> None:
        for index in range(count if source else 0):
            picture = source[index % len(source)]
            text = scenes.short_phrase(picture.scene, _rng(seed, "phrase", len(planned)))
            plan(split, holdout, voices[index % len(voices)], text, picture.scene.facts["label"], picture.name)

    seen = by_group.get(("heldout", "sample"), [])
    unseen = by_group.get(("heldout", "combination"), [])
    per_voice, num_phrases = sizes.heldout_digit_utterances_per_voice, sizes.heldout_phrases_per_voice
    plan_digits("train", "", TRAIN_VOICES, sizes.digit_utterances_per_voice)
    plan_phrases("train", "", TRAIN_VOICES, by_group.get(("train", ""), []), sizes.phrase_utterances)
    # The same number of held-out utterances in heard and in unheard voices, so their numbers can stand side by side.
    plan_digits("heldout", "voice", HELD_OUT_VOICES, per_voice)
    plan_digits("heldout", "sample", TRAIN_VOICES, -(-per_voice * len(HELD_OUT_VOICES) // len(TRAIN_VOICES)))
    plan_phrases("heldout", "voice", HELD_OUT_VOICES, seen, num_phrases * len(HELD_OUT_VOICES))
    plan_phrases("heldout", "sample", TRAIN_VOICES, seen, num_phrases * len(HELD_OUT_VOICES))
    plan_phrases("heldout", "combination", TRAIN_VOICES, unseen, num_phrases)
    return planned


def _write_speech(root: pathlib.Path, planned: list[_Planned], report: Progress) -> list[Record]:
    """Speaks fixed-size parts, each in a process of its own (see `espeak`), as many at once as there are processors."""
    parts = {
        f"speech_{start // _UTTERANCES_PER_PART:03d}": planned[start : start + _UTTERANCES_PER_PART]
        for start in range(0, len(planned), _UTTERANCES_PER_PART)
    }
    missing = [name for name in parts if not (root / name).exists()]
    width = max(1, min(os.cpu_count() or 1, 8))
    for start in range(0, len(missing), width):
        running = []
        for name in missing[start : start + width]:
            temporary = root / f".tmp-{name}"
            temporary.mkdir()
            running.append((name, temporary, espeak.start_speaking([p.utterance for p in parts[name]], temporary)))
        for name, temporary, process in running:
            espeak.finish_speaking(process)
            lines = [_speech_record(p, temporary) for p in parts[name]]
            (temporary / "part.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            os.replace(temporary, root / name)
            report({"part": "speech", "done": sum((root / part).exists() for part in parts), "total": len(parts)})
    records = []
    for name in parts:
        for line in (root / name / "part.jsonl").read_text().splitlines():
            record = json.loads(line)
            records.append(record | {"path": f"{name}/{record['name']}"})
    return records


def _speech_record(planned: _Planned, path: pathlib.Path) -> Record:
    name = f"{planned.utterance.name}.wav"
    num_samples = ((path / name).stat().st_size - 44) // 2
    facts = {
        "kind": "digit" if not planned.scene else "scene",
        "label": planned.label,
        "voice": planned.utterance.voice,
        "words": planned.utterance.text,
        "seconds": round(num_samples / espeak.SAMPLE_RATE_HZ, 3),
    }
    return {"name": name, "split": planned.split, "holdout": planned.holdout, "facts": facts, "scene": planned.scene}


def _conversations(
    split: str,
    seed: int,
    digits: list[Record],
    scene_records: list[Record],
    pictures: list[_Picture],
    speech: list[Record],
) -> Iterator[Record]:
    """Every conversation of `split`, picture tasks first. Keys name the task and the media, so they stay the same."""
    scene_of = {picture.name: picture.scene for picture in pictures}
    scene_record_of = {record["name"]: record for record in scene_records}
    digit_records = [record for record in digits if record["split"] == split]
    spoken = [record for record in speech if record["split"] == split]

    def conversation(
        task: str, media: Record, user: list[Any], answer: list[Any], extra: Record | None = None
    ) -> Record:
        stem = pathlib.PurePosixPath(media["path"]).with_suffix("")
        messages = [{"role": "user", "parts": user}] if user else []
        return {
            "key": f"{task}/{stem}" + (f"/{extra['tag']}" if extra and "tag" in extra else ""),
            "task": task,
            "split": split,
            "group": str(stem),
            "messages": [*messages, {"role": "assistant", "parts": answer}],
            "facts": media["facts"] | {"holdout": media["holdout"]} | (extra or {}),
        }

    def takes_turn(index: int, turn: int, turns: int) -> bool:
        """In training a picture is read for one purpose of several: tokens are better spent on drawing."""
        return split != "train" or index % turns == turn

    for index, record in enumerate(digit_records):
        rng = _rng(seed, "digit text", record["name"])
        word, image = DIGIT_WORDS[int(record["facts"]["label"])], {"image": record["path"]}
        *wordings, told = (_DIGIT_CAPTIONS[int(i)].format(word) for i in rng.integers(len(_DIGIT_CAPTIONS), size=3))
        # There are few scans, so in training each is asked for in two wordings.
        for tag, text in zip("ab", wordings if split == "train" else wordings[:1]):
            yield conversation("text_to_image", record, [{"text": text}], [image], {"tag": tag})
        yield conversation("caption", record, [image], [{"text": told}], {"words": word})
        question = _DIGIT_QUESTIONS[int(rng.integers(len(_DIGIT_QUESTIONS)))]
        if takes_turn(index, 0, 2):
            yield conversation("question", record, [image, {"text": question}], [{"text": word}], {"words": word})

    for index, record in enumerate(record for record in scene_records if record["split"] == split):
        rng, scene, image = (
            _rng(seed, "scene text", record["name"]),
            scene_of[record["name"]],
            {"image": record["path"]},
        )
        captions = [scenes.caption(scene, rng) for _ in range(4)]
        # In training every second picture is asked for in few words, as it is aloud.
        asked = scenes.short_phrase(scene, rng) if split == "train" and index % 2 else captions[0]
        yield conversation("text_to_image", record, [{"text": asked}], [image])
        if takes_turn(index, 0, 4):
            yield conversation("caption", record, [image], [{"text": captions[1]}], {"words": captions[1]})
        question, answer = scenes.question(scene, rng)
        if takes_turn(index, 1, 4):
            yield conversation(
                "question", record, [image, {"text": question}], [{"text": answer}], {"tag": "seen", "words": answer}
            )
        question, answer = scenes.question(scene, rng)
        read = [{"text": f"{captions[2]}. {question}"}]
        if takes_turn(index, 2, 4):
            yield conversation("question", record, read, [{"text": answer}], {"tag": "read", "words": answer})
        if takes_turn(index, 3, 4):
            yield conversation("text", record, [], [{"text": captions[3]}])

    for record in spoken:
        words, sound = record["facts"]["words"], {"speech": record["path"]}
        yield conversation("speech_to_text", record, [sound], [{"text": words}])
        # Text does not say whose voice is wanted, so an unheard one cannot be asked for.
        if record["holdout"] != "voice":
            yield conversation("text_to_speech", record, [{"text": words}], [sound])

    pictures_each = _PICTURES_PER_REQUEST if split == "train" else 1
    by_digit = {str(d): [r for r in spoken if not r["scene"] and r["facts"]["label"] == str(d)] for d in range(10)}
    for record in digit_records:
        heard = by_digit[record["facts"]["label"]]
        if heard:
            chosen = _rng(seed, "spoken digit", record["name"]).permutation(len(heard))[:pictures_each]
            yield from (conversation(*_speech_to_image(heard[int(i)], record)) for i in chosen)
    # A phrase says no more than these, so it asks for any picture that shares them.
    said = [name for name in scene_record_of if scene_record_of[name]["split"] == split]
    alike: dict[tuple[str, ...], list[Record]] = {}
    for name in said:
        alike.setdefault(_all_a_phrase_says(scene_of[name]), []).append(scene_record_of[name])
    for sound in (record for record in spoken if record["scene"]):
        own = scene_record_of[sound["scene"]]
        others = [r for r in alike[_all_a_phrase_says(scene_of[sound["scene"]])] if r is not own]
        order = _rng(seed, "spoken phrase", sound["name"]).permutation(len(others))[: pictures_each - 1]
        yield from (
            conversation(*_speech_to_image(sound, record)) for record in [own, *(others[int(i)] for i in order)]
        )


def _all_a_phrase_says(scene: scenes.Scene) -> tuple[str, ...]:
    return scene.colour, scene.shape, scene.size, scene.place


def _speech_to_image(sound: Record, picture: Record) -> tuple[str, Record, list[Any], list[Any], Record]:
    """A picture asked for aloud. The hold-out is the voice's where the voice is unheard, else the picture's."""
    facts = {key: sound["facts"][key] for key in ("voice", "words", "seconds")}
    facts["holdout"] = "voice" if sound["holdout"] == "voice" else picture["holdout"]
    facts["tag"] = pathlib.PurePosixPath(sound["path"]).stem
    return "speech_to_image", picture, [{"speech": sound["path"]}], [{"image": picture["path"]}], facts
