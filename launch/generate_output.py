"""What `aromni generate` leaves in its folder: pictures, sound, text, and `result.json`, which tells of all of them."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import TYPE_CHECKING, Any

from launch.generate_requests import TASKS, Refused, Request

if TYPE_CHECKING:
    from aromni_jax.structs import Part
    from launch.loading import LoadedModel

RESULT_FILE = "result.json"


def check_folder(path: str) -> None:
    """ValueError where `--output=path` cannot be a folder to write to; nothing is made, whatever else may be wrong."""
    output = pathlib.Path(path)
    lowest = next(place for place in (output, *output.absolute().parents) if os.path.lexists(place))
    if not lowest.is_dir():
        raise ValueError(f"--output={path}: {lowest} is no folder; give another one, or remove it")
    if not os.access(lowest, os.W_OK | os.X_OK):
        raise ValueError(f"--output={path}: {lowest} cannot be written; give a folder that can")


def earlier_files(path: str, *, overwrite: bool) -> list[pathlib.Path]:
    """What an earlier command left in the folder `path`: the files of the answers that its result tells of, begun ones
    too, and the result, which comes last.

    Raises:
      ValueError: there is a result and `overwrite` is false, or `aromni generate` has not written it.
    """
    result = pathlib.Path(path) / RESULT_FILE
    if not result.exists():
        return []
    if not overwrite:
        raise ValueError(
            f"--output={path} holds the answers of an earlier command ({RESULT_FILE}); give another folder, or "
            "--overwrite to remove them"
        )
    try:
        tasks = [line["task"] for line in json.loads(result.read_text(encoding="utf-8"))["answers"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--overwrite: {result} is not of `aromni generate`; give another --output, or remove it"
        ) from error
    # A line that was refused may name anything for its task, and no file is called that.
    stems = [_stem(index, task) for index, task in enumerate(tasks) if task in TASKS]
    names = [f"{stem}{ending}" for stem in stems for ending in (".png", ".wav", ".txt")]
    return [file for name in names if (file := result.with_name(name)).exists()] + [result]


def stem_of(index: int, request: Request | Refused) -> str:
    """What the files of an answer are called, without their ending."""
    return _stem(index, request.task)


def _stem(index: int, task: str) -> str:
    return f"{index:04d}_{task.replace('-', '_')}"


def unanswered(request: Request | Refused, error: str) -> dict[str, Any]:
    """The line of `result.json` of a request without an answer."""
    asked = request.request if isinstance(request, Refused) else dataclasses.asdict(request)
    return {"task": request.task, "request": asked, "text": [], "files": [], "error": error}


def answered(
    parts: tuple[Part, ...],
    request: Request | Refused,
    output: pathlib.Path,
    index: int,
    loaded: LoadedModel,
    *,
    sound_is_written: bool,
) -> dict[str, Any]:
    """Writes one answer's files and returns its line of `result.json`, also where a part of it cannot be written."""
    assert isinstance(request, Request)
    line = {"task": request.task, "request": dataclasses.asdict(request), "text": [], "files": []}
    try:
        line["text"], line["files"] = _write(parts, output, stem_of(index, request), loaded, sound_is_written)
    except ValueError as error:
        line["text"] = [part.text for part in parts if hasattr(part, "text")]
        line["error"] = str(error)
    return line


def _write(
    parts: tuple[Part, ...], output: pathlib.Path, stem: str, loaded: LoadedModel, sound_is_written: bool
) -> tuple[list[str], list[str]]:
    """Writes one answer's files; returns its texts and the names of its pictures and sounds."""
    import soundfile
    from PIL import Image as PilImage

    from aromni_jax.structs import Image, Speech, Text

    files: list[str] = []
    texts = [part.text for part in parts if isinstance(part, Text)]
    for part in parts:
        path = output / f"{stem}.png"
        if isinstance(part, Image):
            assert loaded.bundle.image is not None and part.codes_P is not None
            PilImage.fromarray(loaded.bundle.image.decode(part.codes_P[None])[0]).save(path)
        elif isinstance(part, Speech):
            assert loaded.bundle.speech is not None and part.codes_KU is not None
            path = path.with_suffix(".wav")
            if not sound_is_written:
                waveform = loaded.bundle.speech.decode([part.codes_KU])[0]
                soundfile.write(path, waveform, loaded.bundle.speech.sample_rate_hz, subtype="PCM_16")
        else:
            continue
        files.append(path.name)
    if texts:
        (output / f"{stem}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return texts, files
