"""The stages of `aromni quickstart`: corpus, tokenizers, pretokenize, train, export, evaluate, report.

DIR/corpus  DIR/tokenizers  DIR/data/train  DIR/run (a workdir of `aromni train`)  DIR/export  DIR/samples
DIR/results.json  DIR/report.html  DIR/stages (what is done)
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import sys
from typing import Any, Literal

from aromni_jax.config import TrainConfig, to_json
from data_pipelines.corpus import CorpusSizes, build_corpus
from launch.codec_worker import CodecJob, run_codec_jobs
from launch.evaluate import REPORT_FILE, RESULTS_FILE, SAMPLES, EvaluationSizes
from launch.stages import Report, Stage, write_atomically

TEMPLATES = "quickstart"
MODALITIES = ("text", "image", "speech")


class Interrupted(Exception):
    """Training was told to stop; it has saved where it stands."""


@dataclasses.dataclass(frozen=True)
class TokenizersConfig:
    """Pieces of text, and where the codecs of pictures and speech come from.

    `codecs`: `shipped` are those of the package, which were trained on the corpus of seed 0 for longer; `train` trains
    the same nets here, for the numbers of steps given.
    """

    codecs: Literal["shipped", "train"]
    text_vocab_size: int
    image_steps: int
    speech_steps: int


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """Everything about one quickstart; `expected_seconds` is what each stage takes on two cores, for the time left;
    that of `codecs` is added to the tokenizers' where codecs are trained."""

    seed: int
    corpus: CorpusSizes
    tokenizers: TokenizersConfig
    train: TrainConfig
    evaluate: EvaluationSizes
    expected_seconds: dict[str, float]


class QuickstartJob:
    """The stages of one quickstart in one directory."""

    def __init__(self, config: QuickstartConfig, workdir: pathlib.Path) -> None:
        self.workdir = workdir
        self.corpus = workdir / "corpus"
        self.tokenizers = workdir / "tokenizers"
        self.dataset = workdir / "data" / "train"
        self.run = workdir / "run"
        self.export = workdir / "export"
        mixture = {"corpus": {"path": str(self.dataset), "weight": 1.0}}
        data = dataclasses.replace(config.train.data, mixture=mixture)
        self.config = dataclasses.replace(config, train=dataclasses.replace(config.train, data=data))

    def stages(self) -> list[Stage]:
        """All stages in order."""
        config = self.config
        settings = json.loads(to_json(config))
        for name in ("log_every_steps", "eval_every_steps", "checkpoint", "mesh"):
            del settings["train"][name]
        del settings["train"]["data"]["mixture"]

        expected = dict(config.expected_seconds)
        if config.tokenizers.codecs == "train":
            expected["tokenizers"] += expected["codecs"]

        def stage(name: str, work: Any, inputs: dict[str, Any], replaceable: bool = False) -> Stage:
            return Stage(name, expected[name], inputs, work, replaceable)

        return [
            stage("corpus", self._make_corpus, {"seed": config.seed, "corpus": settings["corpus"]}),
            stage("tokenizers", self._make_tokenizers, {"tokenizers": settings["tokenizers"]}),
            stage("pretokenize", self._pretokenize, {"templates": TEMPLATES}),
            stage("train", self._train, {"train": settings["train"]}),
            stage("export", self._export, {}, replaceable=True),
            stage("evaluate", self._evaluate, {"evaluate": settings["evaluate"]}, replaceable=True),
            stage("report", self._report, {}, replaceable=True),
        ]

    def _make_corpus(self, report: Report) -> dict[str, Any]:
        finished: dict[str, float] = {}

        def progress(event: dict[str, Any]) -> None:
            # Speech takes most of the time, pictures some; the manifest is the end.
            finished[event["part"]] = event["done"] / max(event["total"], 1)
            shares = {"digits": 0.05, "scenes": 0.2, "speech": 0.7, "manifest": 0.05}
            done = sum(share * finished.get(part, 0.0) for part, share in shares.items())
            report(done, f"{event['part']} {event['done']:,} of {event['total']:,}")

        build_corpus(self.corpus, seed=self.config.seed, sizes=self.config.corpus, progress=progress)
        summary = json.loads((self.corpus / "corpus.json").read_text())
        return {"conversations": summary["conversations"]}

    def _make_tokenizers(self, report: Report) -> dict[str, Any]:
        from aromni_jax.tokenizers.bundle import TokenizerBundle
        from aromni_jax.tokenizers.image import ImageTokenizer
        from aromni_jax.tokenizers.prompts import load_templates
        from aromni_jax.tokenizers.speech import SpeechTokenizer
        from aromni_jax.tokenizers.text import SentencePieceText
        from data_pipelines.sources import ManifestSource

        shipped = self.config.tokenizers.codecs == "shipped"
        directories, quality = _shipped_codecs() if shipped else self._train_codecs(report)
        templates = load_templates(TEMPLATES)
        instructions = [template.instruction for template in templates.tasks.values() if template.instruction]
        texts = [*instructions, *ManifestSource(self.corpus / "manifest.jsonl", split="train").texts()]
        text = SentencePieceText.train(texts, self.config.tokenizers.text_vocab_size, self.config.seed)
        pictures, sounds = ImageTokenizer.load(directories["image"]), SpeechTokenizer.load(directories["speech"])
        bundle = TokenizerBundle(text, pictures, sounds)
        partial = self.workdir / "tokenizers.partial"
        for leftover in (partial, self.tokenizers):
            shutil.rmtree(leftover, ignore_errors=True)
        bundle.save(partial)
        os.replace(partial, self.tokenizers)
        return {"fingerprints": bundle.fingerprints, "vocabulary_rows": bundle.vocab().size, "quality": quality}

    def _train_codecs(self, report: Report) -> tuple[dict[str, pathlib.Path], dict[str, str]]:
        """Trains both at the same time; (kind -> directory, kind -> words on how well it ended)."""
        parts = self.workdir / "tokenizer_parts"
        parts.mkdir(exist_ok=True)
        steps = {"image": self.config.tokenizers.image_steps, "speech": self.config.tokenizers.speech_steps}
        directories = {kind: parts / kind for kind in steps}
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        jobs = [
            CodecJob(
                kind=kind,
                manifest=str(self.corpus / "manifest.jsonl"),
                steps=steps[kind],
                seed=self.config.seed,
                workdir=str(parts / f"{kind}_training"),
                output=str(directories[kind]),
                # With one core to share, or many, the system knows better than we do.
                core=cores[index] if len(cores) == len(steps) else None,
            )
            for index, kind in enumerate(steps)
            if not directories[kind].exists()
        ]
        fractions = {kind: float(directories[kind].exists()) for kind in steps}
        quality: dict[str, str] = {}

        def progress(kind: str, metrics: dict[str, Any]) -> None:
            fractions[kind] = metrics["step"] / metrics["total_steps"]
            quality[kind] = f"{metrics['psnr']:.1f} dB" if "psnr" in metrics else f"mel {metrics['mel_distance']:.2f}"
            words = (f"{kind} {fractions[kind]:.0%} {quality[kind]}" for kind in sorted(quality))
            report(min(fractions.values()), ", ".join(words))

        run_codec_jobs(jobs, progress)
        return directories, {kind: f"trained here, {words} on its last batch" for kind, words in quality.items()}

    def _pretokenize(self, report: Report) -> dict[str, Any]:
        from data_pipelines.pretokenize import PretokenizeConfig, pretokenize

        config = PretokenizeConfig(
            source=str(self.corpus / "manifest.jsonl"),
            split="train",
            tokenizers=str(self.tokenizers),
            templates=TEMPLATES,
            records_per_shard=2048,
        )
        pretokenize(
            config,
            self.dataset,
            progress=lambda e: report(e["done"] / e["total"], f"{e['done']:,} of {e['total']:,} conversations"),
        )
        described = json.loads((self.dataset / "dataset.json").read_text())["statistics"]
        return {name: described[name] for name in ("records", "tokens", "quarantined", "target_tokens")}

    def _train(self, report: Report) -> dict[str, Any]:
        from aromni_jax.models.config import num_parameters
        from aromni_jax.train.observe import Hook
        from launch.train import run_training

        class OnTheLine(Hook):
            """Hands steps to the one progress line."""

            words = "compiling"
            total = 1

            def on_start(self, step: int, total_steps: int) -> None:
                self.total = total_steps

            def on_step(self, step: int, line: dict[str, Any] | None) -> None:
                if line:
                    parts = [f"{m} {line[f'loss/{m}']:.2f}" for m in MODALITIES if line.get(f"loss/{m}") is not None]
                    speed = line.get("tokens_per_second")
                    self.words = f"loss {', '.join(parts)}" + (f", {speed:,.0f} tokens/s" if speed else "")
                report(step / self.total, self.words)

        result = run_training(self.config.train, self.run, [OnTheLine()], with_progress=False)
        if result.is_interrupted:
            raise Interrupted
        lines = _json_lines(self.run / "metrics.jsonl")
        speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
        fill = [line["useful_token_fraction"] for line in lines if line.get("useful_token_fraction") is not None]
        return {
            "step": result.step,
            "parameters": num_parameters(result.model),
            "tokens_per_second": statistics.median(speeds) if speeds else None,
            "fill": statistics.fmean(fill) if fill else None,
            "tokens_seen": lines[-1].get("tokens_seen") if lines else None,
        }

    def _export(self, report: Report) -> dict[str, Any]:
        from launch.export import export_workdir

        files = export_workdir(
            self.run,
            self.export,
            ema=self.config.train.optimizer.ema_decay > 0,
            dtype="float32",
            overwrite=True,
            progress=lambda name: report(0.5, name),
        )
        return {"bytes": sum(file.stat().st_size for file in files)}

    def _evaluate(self, report: Report) -> dict[str, Any]:
        """Measures the export: what a reader of the page can load is what the numbers are about."""
        from data_pipelines.records import TokenDataset
        from launch.evaluate import evaluate_model
        from launch.loading import load_model

        partial = self.workdir / f"{SAMPLES}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        results = evaluate_model(
            load_model(self.export),
            self.corpus,
            partial,
            self.config.evaluate,
            seed=self.config.seed,
            unigram_V=TokenDataset(self.dataset).unigram_V,
            progress=lambda what, fraction: report(fraction, what),
        )
        shutil.rmtree(self.workdir / SAMPLES, ignore_errors=True)
        os.replace(partial, self.workdir / SAMPLES)
        write_atomically(self.workdir / RESULTS_FILE, json.dumps(results, indent=1) + "\n")
        return {"cases": sum(score["n"] for score in results["scores"])}

    def _report(self, report: Report) -> dict[str, Any]:
        from aromni_jax.evaluation.report import render_report

        results = json.loads((self.workdir / RESULTS_FILE).read_text())
        markers = {path.stem: json.loads(path.read_text()) for path in (self.workdir / "stages").glob("*.json")}
        train, data = markers["train"]["facts"], markers["pretokenize"]["facts"]
        results |= {
            "title": "AR-Omni quickstart",
            "summary": (
                f"One decoder of {train['parameters'] / 1e6:.1f} million parameters, trained from nothing on "
                f"{data['records']:,} conversations of text, pictures and speech, then asked to draw, to speak, to "
                "listen and to describe. All of it was made by the exported model on data it has not seen."
            ),
            "curves": _curves(_json_lines(self.run / "metrics.jsonl")),
            "stages": [
                {"name": stage.name, "seconds": markers[stage.name]["seconds"]}
                for stage in self.stages()
                if stage.name in markers and stage.name != "report"
            ],
            "facts": _facts(train, data, markers["tokenizers"]["facts"]),
            "export_path": str(self.export),
            "config": json.loads(to_json(self.config)),
        }
        write_atomically(self.workdir / REPORT_FILE, render_report(results, self.workdir / SAMPLES))
        return {"bytes": (self.workdir / REPORT_FILE).stat().st_size}


def _shipped_codecs() -> tuple[dict[str, pathlib.Path], dict[str, str]]:
    """(kind -> directory, kind -> words on its quality) of the codecs that come with the package."""
    from aromni_jax.tokenizers.shipped import KINDS, shipped_card, shipped_directory

    heldout = {kind: shipped_card(kind)["heldout"] for kind in KINDS}
    quality = {
        "image": f"shipped, PSNR {heldout['image']['psnr_db']:.1f} dB on held-out pictures",
        "speech": f"shipped, STOI {heldout['speech']['stoi']:.2f} on held-out speech",
    }
    return {kind: shipped_directory(kind) for kind in KINDS}, quality


def _facts(train: dict[str, Any], data: dict[str, Any], tokenizers: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of the page's last table: name, value."""
    peak = _peak_memory_bytes()
    facts = [
        ("parameters", f"{train['parameters']:,}"),
        ("rows of the vocabulary", f"{tokenizers['vocabulary_rows']:,}"),
        ("conversations, tokens of the data set", f"{data['records']:,}, {data['tokens']:,}"),
        ("training steps", f"{train['step']:,}"),
    ]
    if train.get("tokens_seen"):
        facts.append(("tokens trained on", f"{train['tokens_seen']:,.0f}"))
    if train.get("fill") is not None:
        facts.append(("packed rows, share filled with documents", f"{100 * train['fill']:.1f} %"))
    if train.get("tokens_per_second"):
        facts.append(("training speed, median", f"{train['tokens_per_second']:,.0f} tokens/s"))
    for kind, words in sorted(tokenizers.get("quality", {}).items()):
        facts.append((f"{kind} tokenizer", words))
    if peak:
        facts.append(("peak memory of one process of the last start", f"{peak / 2**30:.1f} GiB"))
    return facts


def _peak_memory_bytes() -> int | None:
    """Largest resident size of this process or of one of its children; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    from aromni_jax.train.workdir import read_json_lines

    return read_json_lines(path)


def _curves(lines: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Loss by modality and by task over steps, from the lines of `metrics.jsonl`."""
    from aromni_jax.structs import Task

    def points(name: str) -> list[tuple[int, float]]:
        key = f"loss/{name}"
        return [(line["step"], line[key]) for line in lines if line.get(key) is not None]

    by_task = {task.label: points(task.label) for task in Task}
    return {
        "modality": {name: points(name) for name in MODALITIES},
        "task": {name: found for name, found in by_task.items() if found},
    }
