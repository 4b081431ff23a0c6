"""The tokenizers of a run, kept together: one directory that shards, checkpoints and exports carry."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from aromni_jax.tokenizers import storage
from aromni_jax.tokenizers.image import ImageTokenizer
from aromni_jax.tokenizers.speech import SpeechTokenizer
from aromni_jax.tokenizers.text import TextTokenizer, load_text_tokenizer
from aromni_jax.vocab import JointVocab


@dataclasses.dataclass(frozen=True)
class TokenizerBundle:
    """A text tokenizer and, where the data has pictures or speech, theirs.

    On disk: `text/`, `image/`, `speech/` and `vocab.json`, the joint vocabulary with their fingerprints.
    """

    text: TextTokenizer
    image: ImageTokenizer | None = None
    speech: SpeechTokenizer | None = None

    @property
    def fingerprints(self) -> dict[str, str]:
        """Kind -> fingerprint, for the kinds that are there."""
        return {kind: tokenizer.fingerprint for kind, tokenizer in self._present().items()}

    def vocab(self, pad_to_multiple: int = 128) -> JointVocab:
        """The joint vocabulary of these tokenizers; `pad_to_multiple` rounds its rows up so that they shard."""
        return JointVocab.build(
            text_size=self.text.size,
            image_codes=self.image.num_codes if self.image else 0,
            tokens_per_image=self.image.tokens_per_image if self.image else 0,
            speech_codes=(self.speech.num_codes,) * self.speech.num_codebooks if self.speech else (),
            fingerprints=self.fingerprints,
            pad_to_multiple=pad_to_multiple,
        )

    def save(self, directory: str | Path, vocab: JointVocab | None = None) -> None:
        """Writes the tokenizers, and last `vocab.json`: the given vocabulary, or `self.vocab()`.

        Raises:
          ValueError: `vocab` was built for other tokenizers.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        vocab = vocab or self.vocab()
        self._check(vocab, "the given vocabulary")
        for kind, tokenizer in self._present().items():
            tokenizer.save(directory / kind)
        (directory / "vocab.json").write_text(vocab.to_json())

    @classmethod
    def load(cls, directory: str | Path) -> TokenizerBundle:
        """Reads what `save` wrote.

        Raises:
          FileNotFoundError: no tokenizers in `directory`.
          ValueError: a damaged file, or a tokenizer that is not the one recorded in `vocab.json`.
        """
        directory = Path(directory)
        path = directory / "vocab.json"
        if not path.exists():
            raise FileNotFoundError(f"{directory} holds no tokenizers (vocab.json is missing)")
        vocab = JointVocab.from_json(path.read_text())
        bundle = cls(
            load_text_tokenizer(directory / "text"),
            ImageTokenizer.load(directory / "image") if vocab.image else None,
            SpeechTokenizer.load(directory / "speech") if vocab.speech else None,
        )
        bundle._check(vocab, str(path))
        return bundle

    @classmethod
    def from_parts(cls, directory: str | Path) -> TokenizerBundle:
        """Tokenizers made one by one, `text/` and perhaps `image/` and `speech/`, in a directory without vocabulary.

        Raises:
          FileNotFoundError: no `text/` in `directory`.
          ValueError: a damaged file.
        """
        directory = Path(directory)
        if not (directory / "text").is_dir():
            raise FileNotFoundError(
                f"{directory} holds no tokenizers: neither vocab.json nor text/; make them with "
                f"aromni tokenizer train --kind=text --tokenizer={directory / 'text'} (image and speech alike)"
            )
        return cls(
            load_text_tokenizer(directory / "text"),
            ImageTokenizer.load(directory / "image") if (directory / "image").is_dir() else None,
            SpeechTokenizer.load(directory / "speech") if (directory / "speech").is_dir() else None,
        )

    def _present(self) -> dict[str, TextTokenizer | ImageTokenizer | SpeechTokenizer]:
        parts = {"text": self.text, "image": self.image, "speech": self.speech}
        return {kind: tokenizer for kind, tokenizer in parts.items() if tokenizer is not None}

    def _check(self, vocab: JointVocab, where: str) -> None:
        recorded = dict(vocab.tokenizer_fingerprints)
        for kind in sorted(recorded.keys() | self.fingerprints.keys()):
            if recorded.get(kind) != self.fingerprints.get(kind):
                raise ValueError(
                    f"the {kind} tokenizer does not match {where}: fingerprint {self.fingerprints.get(kind)}, recorded "
                    f"{recorded.get(kind)}; its files were changed or replaced, restore them or make the data again"
                )


def kind_of(directory: str | Path) -> str:
    """`text`, `image` or `speech`: what tokenizer is saved in `directory`, by its `config.json`.

    Raises:
      ValueError: the file is not that of a tokenizer.
    """
    path = Path(directory) / "config.json"
    values = storage.read_json(path)
    net = values.get("net")
    if "kind" in values:
        return "text"
    if "family" in values or (isinstance(net, dict) and "sample_rate_hz" in net):
        return "speech"
    if isinstance(net, dict) and "image_size" in net:
        return "image"
    raise ValueError(f"{path} is not the config.json of a tokenizer; give the directory of one")
