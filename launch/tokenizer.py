"""`aromni tokenizer`: make, try, measure, import and export the tokenizers by themselves."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch import tokenizer_input, tokenizer_places
from launch.conversions import Conversions

if TYPE_CHECKING:
    from aromni_jax.tokenizers.image import ImageTokenizer
    from aromni_jax.tokenizers.speech import SpeechTokenizer
    from aromni_jax.tokenizers.speech_input import Report
    from data_pipelines.sources import MediaFile

_KINDS = ("text", "image", "speech")
_PICTURES_ON_PAGE, _SOUNDS_ON_PAGE = 48, 12
_TELLTALES = ("a", " a", "A  b\n", "e\u0301", "\ufb01", "\u2581", "\U0001f642")
"""Texts that tokenizers which normalise or add spaces do not give back."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `aromni tokenizer`."""
    parser.add_argument("action", choices=tuple(_ACTIONS))
    parser.add_argument("--kind", required=True, choices=_KINDS)
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR",
        help="the tokenizer: written by train and import, else read; `shipped` is the one that comes with the package",
    )
    tokenizer_input.add_arguments(parser)
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="encode: a .npy of codes; decode: a .png, .wav or .txt; export: a .safetensors, .ckpt or directory",
    )
    parser.add_argument("--vocab_size", type=int, default=1024, help="train --kind=text: number of pieces")
    parser.add_argument(
        "--max_lines",
        type=int,
        default=1_000_000,
        metavar="N",
        help="train --kind=text: learn from N lines of a corpus",
    )
    parser.add_argument(
        "--recipe",
        default="quickstart",
        metavar="NAME|FILE",
        help="train --kind=image|speech: quickstart, chameleon (image), encodec or seanet-small (speech), or a file "
        "like a saved tokenizer's config.json (SEANet: training/recipe.json)",
    )
    parser.add_argument("--total_steps", type=int, help="train --kind=image|speech: overrides the recipe")
    parser.add_argument("--num_codes", type=int, help="train --kind=image|speech: overrides the size of the codebook")
    parser.add_argument("--image_size", type=int, help="import --kind=image: pixels, where the files do not say")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="train --kind=image|speech: precision of the saved file",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="train, import: replace a tokenizer that is already at --tokenizer, and begin anew",
    )
    parser.add_argument("--json", metavar="FILE", help="evaluate: also write the table as JSON")
    parser.add_argument(
        "--report", metavar="FILE", help="evaluate --kind=image|speech: a page of originals beside reconstructions"
    )


def main(args: argparse.Namespace) -> int:
    """Runs one action; ValueError and FileNotFoundError say what to do."""
    run, *needed = _ACTIONS[args.action]
    for flag in needed:
        if not getattr(args, flag):
            raise ValueError(f"aromni tokenizer {args.action} needs --{flag}=PATH")
    if args.tokenizer == "shipped":
        from aromni_jax.tokenizers.shipped import shipped_directory

        if args.action in ("train", "import"):
            raise ValueError(f"--tokenizer=shipped comes with the package; {args.action} needs a directory to write to")
        args.tokenizer = str(shipped_directory(args.kind))
    tokenizer_places.check(args)
    run(args)
    return 0


def _train(args: argparse.Namespace) -> None:
    import dataclasses

    from aromni_jax.tokenizers import image, seanet_training, speech
    from aromni_jax.tokenizers.text import SentencePieceText

    if args.kind == "text":
        text = SentencePieceText.train(
            tokenizer_input.pieces_of_text(args), args.vocab_size, args.seed, args.max_lines, print
        )
        tokenizer_places.clear(args)
        text.save(args.tokenizer)
        print(f"{text.size} pieces, fingerprint {text.fingerprint[:16]}, in {args.tokenizer}")
        return
    workdir, meter = Path(args.tokenizer) / "training", _Meter()
    config = _recipe(args)
    if args.num_codes:
        config = dataclasses.replace(config, num_codes=args.num_codes)
    if args.total_steps:
        config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, total_steps=args.total_steps))
    tokenizer: ImageTokenizer | SpeechTokenizer
    if args.kind == "image":
        size = config.net.image_size
        files = tokenizer_input.media(args)
        pictures = tokenizer_input.prepared(
            files, lambda path, _: image.prepare_image(path, size), max_bad_fraction=args.max_bad_fraction
        )
        pixels = np.stack([*pictures.values()])
        tokenizer_places.clear(args)
        tokenizer = image.train_image_tokenizer(pixels, config, args.seed, workdir, meter)
    else:
        rate_hz = config.net.sample_rate_hz
        conversions = Conversions()
        sounds = tokenizer_input.prepared(
            tokenizer_input.media(args),
            lambda path, report: speech.prepare_sound(path, None, rate_hz, report),
            conversions,
            max_bad_fraction=args.max_bad_fraction,
        )
        conversions.show()
        tokenizer_places.clear(args)
        waveforms = list(sounds.values())
        if isinstance(config, seanet_training.SeanetTraining):
            tokenizer = seanet_training.train_seanet_tokenizer(waveforms, config, args.seed, workdir, meter)
        else:
            tokenizer = speech.train_speech_tokenizer(waveforms, config, args.seed, workdir, meter)
    tokenizer.save(args.tokenizer, args.dtype)
    saved = type(tokenizer).load(args.tokenizer)
    print(f"{saved.num_codes} codes, fingerprint {saved.fingerprint[:16]}, in {args.tokenizer}")


def _recipe(args: argparse.Namespace) -> Any:
    """What --recipe names: a config of this house, or a file like the config.json of a saved tokenizer."""
    from aromni_jax.config import from_mapping
    from aromni_jax.tokenizers import image, seanet_training, speech, storage

    named: dict[str, Any] = {"quickstart": image.QUICKSTART, "chameleon": image.CHAMELEON}
    kind: Any = image.ImageTokenizerConfig
    if args.kind == "speech":
        named, kind = {"quickstart": speech.QUICKSTART, **seanet_training.RECIPES}, speech.SpeechTokenizerConfig
    if args.recipe in named:
        return named[args.recipe]
    if not Path(args.recipe).is_file():
        raise FileNotFoundError(f"--recipe={args.recipe} is neither a file nor one of {', '.join(named)}")
    values = storage.read_json(args.recipe)
    if args.kind == "speech" and "family" in values:
        kind = seanet_training.SeanetTraining
    return from_mapping(kind, values)


def _import(args: argparse.Namespace) -> None:
    if args.input == "shipped":
        _import_shipped(args)
        return
    if args.kind != "image":
        {"text": _import_text, "speech": _import_speech}[args.kind](args)
        return
    from aromni_jax.interop.vqgan_files import PublishedVQGAN

    opened = PublishedVQGAN(args.input, args.image_size)
    tokenizer = opened.tokenizer()
    tokenizer_places.clear(args)
    tokenizer.save(args.tokenizer)
    size = f"{tokenizer.image_size}x{tokenizer.image_size} pixels, {tokenizer.tokens_per_image} codes a picture"
    print(f"{tokenizer.num_codes} codes, {size}, fingerprint {tokenizer.fingerprint[:16]}, in {args.tokenizer}")
    if opened.left_out:
        print(f"left out: {len(opened.left_out)} tensors of the training loss ({opened.left_out[0]}, ...)")
    if opened.config.encoder_only:
        print("the files hold no decoder: pictures become codes, and codes no pictures")


def _import_shipped(args: argparse.Namespace) -> None:
    """The files as they are: what they say of themselves stays true, and they stay small."""
    from aromni_jax.tokenizers.shipped import shipped_directory

    source = shipped_directory(args.kind)
    tokenizer_places.clear(args)
    shutil.copytree(source, args.tokenizer, dirs_exist_ok=True)
    copied = (_image_tokenizer if args.kind == "image" else _speech_tokenizer)(args)
    print(f"{copied.num_codes} codes, fingerprint {copied.fingerprint[:16]}, in {args.tokenizer}")


def _import_text(args: argparse.Namespace) -> None:
    """A tokenizer.json, or the directory that holds one."""
    from aromni_jax.tokenizers.huggingface_text import HuggingFaceText

    tokenizer = HuggingFaceText.from_published(args.input)
    tokenizer_places.clear(args)
    tokenizer.save(args.tokenizer)
    print(f"{tokenizer.size} ids, fingerprint {tokenizer.fingerprint[:16]}, in {args.tokenizer}")
    if tokenizer.text_ids:
        first, last = tokenizer.text_ids[0], tokenizer.text_ids[1] - 1
        print(f"Chameleon's layout: text has the ids {first}..{last}, and keeps them in the released vocabulary")
    changed = [text for text in _TELLTALES if tokenizer.decode(tokenizer.encode(text)) != text]
    if changed:
        print(f"the tokenizer does not give every text back as it was, for example not {changed[0]!r}")


def _import_speech(args: argparse.Namespace) -> None:
    """A directory is an EncodecModel, a file a WavTokenizer."""
    from aromni_jax.interop.encodec_files import load_encodec
    from aromni_jax.interop.wavtokenizer_files import load_wavtokenizer

    tokenizer = load_encodec(args.input) if Path(args.input).is_dir() else load_wavtokenizer(args.input)
    tokenizer_places.clear(args)
    tokenizer.save(args.tokenizer)
    rate = f"{tokenizer.num_codebooks} codebook(s) of {tokenizer.num_codes} at {tokenizer.codes_per_second:g} codes/s"
    print(f"{rate}, {tokenizer.sample_rate_hz} Hz, fingerprint {tokenizer.fingerprint[:16]}, in {args.tokenizer}")


def _export(args: argparse.Namespace) -> None:
    if args.kind == "text":
        raise ValueError("export writes the published files of --kind=image and speech, not of text")
    if args.kind == "image":
        from aromni_jax.interop.vqgan_files import write_vqgan

        write_vqgan(_image_tokenizer(args), args.output)
    else:
        from aromni_jax.interop.encodec_files import save_encodec
        from aromni_jax.interop.wavtokenizer_files import save_wavtokenizer

        save = save_wavtokenizer if Path(args.output).suffix in (".ckpt", ".safetensors") else save_encodec
        save(_speech_tokenizer(args), args.output)
    print(args.output)


def _encode(args: argparse.Namespace) -> None:
    if args.kind == "text":
        from aromni_jax.tokenizers.text import load_text_tokenizer

        (text,) = _only_one(tokenizer_input.texts(args), args)
        codes = np.array(load_text_tokenizer(args.tokenizer).encode(text), np.int32)
    elif args.kind == "image":
        pictures = _image_tokenizer(args)
        files = _only_one(tokenizer_input.media(args), args)
        codes = pictures.encode(np.stack([*_pixels(pictures, files, args).values()]))[0]
    else:
        sounds = _speech_tokenizer(args)
        files = _only_one(tokenizer_input.media(args), args)
        codes = sounds.encode([*_waveforms(sounds, files, print, args).values()])[0]
    np.save(args.output, codes)
    print(f"{codes.size} codes in {args.output}")


def _only_one(found: list[Any], args: argparse.Namespace) -> list[Any]:
    if len(found) != 1:
        raise ValueError(f"--input={args.input} holds {len(found)} files or records; encode takes one")
    return found


def _pixels(
    tokenizer: ImageTokenizer, files: Sequence[MediaFile], args: argparse.Namespace
) -> dict[MediaFile, np.ndarray]:
    return tokenizer_input.prepared(
        files, lambda path, _: tokenizer.prepare(path), max_bad_fraction=args.max_bad_fraction
    )


def _waveforms(
    tokenizer: SpeechTokenizer, files: Sequence[MediaFile], report: Report, args: argparse.Namespace
) -> dict[MediaFile, np.ndarray]:
    return tokenizer_input.prepared(
        files,
        lambda path, told: tokenizer.prepare(path, report=told),
        report,
        max_bad_fraction=args.max_bad_fraction,
    )


def _decode(args: argparse.Namespace) -> None:
    try:
        codes = np.load(args.input, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{args.input} is not a .npy file of codes: {error}") from error
    if not isinstance(codes, np.ndarray) or codes.dtype.kind not in "iu":
        found = codes.dtype if isinstance(codes, np.ndarray) else "an archive of arrays"
        raise ValueError(f"{args.input} holds {found}; codes are one array of integers, as encode writes it")
    if args.kind == "text":
        from aromni_jax.tokenizers.text import load_text_tokenizer

        text = load_text_tokenizer(args.tokenizer).decode(codes.reshape(-1).tolist())
        Path(args.output).write_text(text, encoding="utf-8")
    elif args.kind == "image":
        import PIL.Image

        PIL.Image.fromarray(_image_tokenizer(args).decode(np.atleast_2d(codes))[0]).save(args.output)
    else:
        import soundfile

        sounds = _speech_tokenizer(args)
        soundfile.write(args.output, sounds.decode([np.atleast_2d(codes)])[0], sounds.sample_rate_hz)
    print(args.output)


def _evaluate(args: argparse.Namespace) -> None:
    measure = {"text": _evaluate_text, "image": _evaluate_image, "speech": _evaluate_speech}[args.kind]
    table = measure(args)
    for name, value in table.items():
        print(f"{name:24} {value:.4g}" if isinstance(value, float) else f"{name:24} {value}")
    if args.json:
        Path(args.json).write_text(json.dumps(table, indent=2) + "\n")


def _evaluate_text(args: argparse.Namespace) -> dict[str, Any]:
    from aromni_jax.tokenizers.text import load_text_tokenizer

    tokenizer = load_text_tokenizer(args.tokenizer)
    texts = tokenizer_input.texts(args)
    ids = [tokenizer.encode(text) for text in texts]
    return {
        "texts": len(texts),
        "round_trip": float(np.mean([tokenizer.decode(i) == text for i, text in zip(ids, texts)])),
        "characters_per_token": sum(map(len, texts)) / max(1, sum(map(len, ids))),
        **_code_use(ids, tokenizer.size),
    }


def _evaluate_image(args: argparse.Namespace) -> dict[str, Any]:
    from aromni_jax.evaluation.codec_page import image_codec_page
    from aromni_jax.evaluation.picture_quality import psnr_db, ssim

    tokenizer = _image_tokenizer(args)
    pictures = _pixels(tokenizer, tokenizer_input.media(args), args)
    pixels = np.stack([*pictures.values()])
    codes, encode_seconds = _timed(tokenizer.encode, pixels)
    decoded, decode_seconds = _timed(tokenizer.decode, codes)
    decibels = psnr_db(decoded, pixels)
    numbers = {
        "pictures": len(pixels),
        "pixels": tokenizer.image_size,
        "codes_per_picture": tokenizer.tokens_per_image,
        "psnr_db": float(decibels.mean()),
        "psnr_db_of_mean_error": float(-10 * np.log10(np.mean(10 ** (-decibels / 10)))),
        "ssim": float(ssim(decoded, pixels).mean()),
        **_code_use(codes, tokenizer.num_codes),
        "encode_codes_per_second": codes.size / encode_seconds,
        "decode_codes_per_second": codes.size / decode_seconds,
    }
    if args.report:
        shown = slice(_PICTURES_ON_PAGE)
        names = [tokenizer_input.name(file) for file in [*pictures][shown]]
        page = image_codec_page(numbers, pixels[shown], decoded[shown], names, decibels[shown])
        Path(args.report).write_text(page, encoding="utf-8")
    return numbers


def _timed(function: Callable[[Any], Any], items: Any, first: Any = None) -> tuple[Any, float]:
    """The result, and the seconds it took once compiled, which `first` (else the first item) sees to."""
    function(items[:1] if first is None else first)
    start = time.perf_counter()
    return function(items), time.perf_counter() - start


def _evaluate_speech(args: argparse.Namespace) -> dict[str, Any]:
    from aromni_jax.evaluation.codec_page import speech_codec_page
    from aromni_jax.evaluation.sound_quality import mean_stoi, si_sdr_db
    from aromni_jax.tokenizers.speech import mel_distance

    tokenizer = _speech_tokenizer(args)
    rate_hz, conversions = tokenizer.sample_rate_hz, Conversions()
    sounds = _waveforms(tokenizer, tokenizer_input.media(args), conversions, args)
    conversions.show()
    waveforms = list(sounds.values())
    # Lengths are compiled for in powers of two: one sound of each.
    sizes = [(-(-len(waveform) // tokenizer.hop) - 1).bit_length() for waveform in waveforms]
    firsts = [sizes.index(size) for size in sorted(set(sizes))]
    codes, encode_seconds = _timed(tokenizer.encode, waveforms, [waveforms[i] for i in firsts])
    decoded, decode_seconds = _timed(tokenizer.decode, codes, [codes[i] for i in firsts])
    pairs = [(truth, ours[: len(truth)]) for truth, ours in zip(waveforms, decoded)]
    measures = [
        {"si_sdr_db": si_sdr_db(ours, truth), "mel_distance": mel_distance(ours, truth, rate_hz)}
        for truth, ours in pairs
    ]
    decibels = np.array([measured["si_sdr_db"] for measured in measures])
    if silent := int(np.isnan(decibels).sum()):
        print(f"{silent} of {len(pairs)} utterances are silent: they have no SI-SDR and count for nothing in its mean")
    try:
        intelligibility = mean_stoi(pairs, rate_hz)
    except ValueError as error:
        print(error)
        intelligibility = None
    num_codes = sum(item.size for item in codes)
    numbers = {
        "utterances": len(pairs),
        "seconds": sum(map(len, waveforms)) / rate_hz,
        "codes_per_second": tokenizer.codes_per_second,
        "si_sdr_db": float(np.nanmean(decibels)) if silent < len(pairs) else None,
        "mel_distance": float(np.mean([measured["mel_distance"] for measured in measures])),
        "stoi": intelligibility,
        **_code_use([item.reshape(-1) for item in codes], tokenizer.num_codes),
        "encode_codes_per_second": num_codes / encode_seconds,
        "decode_codes_per_second": num_codes / decode_seconds,
    }
    if args.report:
        shown = slice(_SOUNDS_ON_PAGE)
        originals, ours = ([pair[side] for pair in pairs[shown]] for side in (0, 1))
        names = [tokenizer_input.name(file) for file in [*sounds][shown]]
        page = speech_codec_page(numbers, originals, ours, names, measures[shown], rate_hz)
        Path(args.report).write_text(page, encoding="utf-8")
    return numbers


def _code_use(codes: Iterable[Any], num_codes: int) -> dict[str, Any]:
    counts = np.bincount(np.concatenate([np.asarray(c, np.int64).reshape(-1) for c in codes]), minlength=num_codes)
    share = counts[counts > 0] / max(1, int(counts.sum()))
    return {
        "codes": num_codes,
        "codes_used": int((counts > 0).sum()),
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
    }


def _image_tokenizer(args: argparse.Namespace) -> ImageTokenizer:
    from aromni_jax.tokenizers.image import ImageTokenizer

    return ImageTokenizer.load(args.tokenizer)


def _speech_tokenizer(args: argparse.Namespace) -> SpeechTokenizer:
    from aromni_jax.tokenizers.speech import SpeechTokenizer

    return SpeechTokenizer.load(args.tokenizer)


_ACTIONS: dict[str, tuple[Any, ...]] = {
    "train": (_train, "input"),
    "encode": (_encode, "input", "output"),
    "decode": (_decode, "input", "output"),
    "evaluate": (_evaluate, "input"),
    "import": (_import, "input"),
    "export": (_export, "output"),
}
"""Action -> function, flags it cannot do without."""


class _Meter:
    """Prints training progress with the time left."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def __call__(self, entry: dict[str, Any]) -> None:
        now, step = time.monotonic(), entry["step"]
        self._first = self._first or (now, step)
        pace = (now - self._first[0]) / max(1, step - self._first[1])
        numbers = "  ".join(f"{key} {value:.3f}" for key, value in entry.items() if key not in ("step", "total_steps"))
        left = f"{pace * (entry['total_steps'] - step):.0f} s left" if step > self._first[1] else ""
        print(f"step {step}/{entry['total_steps']}  {numbers}  {left}", flush=True)


if __name__ == "__main__":
    from launch.cli import run_module

    run_module(__file__)
