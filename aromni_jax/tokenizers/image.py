"""The image tokenizer: a VQGAN and its codebook. Pictures to a fixed number of codes in raster order, and back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from aromni_jax import config as config_lib
from aromni_jax.arrays import FloatArray, IntArray, PyTree
from aromni_jax.tokenizers import storage
from aromni_jax.tokenizers.adversarial import AdaptiveCriterion, AdversarialRecipe, Adversary
from aromni_jax.tokenizers.nets import quantize
from aromni_jax.tokenizers.nets.patchgan import PatchGAN, PatchGANConfig
from aromni_jax.tokenizers.nets.vqgan import VQGAN, VQGANConfig
from aromni_jax.tokenizers.pictures import prepare_image
from aromni_jax.tokenizers.replicas import Batch, Replicas, ReplicatedFunction
from aromni_jax.tokenizers.training import CodecNet, CodecRecipe, Progress, train_codec

_PIXELS_PER_DEVICE = 16 * 64 * 64
"""In a compiled call every device has up to 16 pictures, fewer when they are large. The number depends on the size of a
picture and on nothing else, so no result can depend on what stands beside it, or on how many devices there are."""


@dataclasses.dataclass(frozen=True)
class ImageTokenizerConfig:
    """Net, codebook size, and how it is trained; `gradient_weight` is on differences between neighbouring pixels.

    `normalize_latents` is what training here does; the published nets compare raw latents with their codes.
    `encoder_only` is a published net whose decoder is kept elsewhere: it makes codes, and pictures of none.
    `discriminator` and `adversarial`, both or neither, make a VQGAN of the VQ-VAE.
    """

    net: VQGANConfig
    num_codes: int
    l1_weight: float
    l2_weight: float
    gradient_weight: float
    recipe: CodecRecipe
    normalize_latents: bool = True
    encoder_only: bool = False
    discriminator: PatchGANConfig | None = None
    adversarial: AdversarialRecipe | None = None

    def __post_init__(self) -> None:
        if (self.discriminator is None) != (self.adversarial is None):
            raise ValueError("discriminator and adversarial belong together: set both, or neither")


QUICKSTART = ImageTokenizerConfig(
    net=VQGANConfig(
        image_size=64,
        patch_size=8,
        channels=64,
        multipliers=(1,),
        num_res_blocks=1,
        latent_channels=64,
        code_dim=64,
        groups=8,
        linear_path=True,
    ),
    num_codes=512,
    l1_weight=1.0,
    l2_weight=2.0,
    gradient_weight=0.5,
    recipe=CodecRecipe(
        total_steps=1500,
        batch_size=8,
        learning_rate=8e-3,
        warmup_fraction=0.03,
        continuous_fraction=0.12,
        commitment_weight=0.25,
        codebook_decay=0.98,
        revive_every_steps=25,
        revive_below=0.05,
        clip_norm=1.0,
        log_every_steps=25,
    ),
)
"""64x64 pictures, 8x8 codes of 512: about two minutes on one CPU core."""

CHAMELEON = ImageTokenizerConfig(
    net=VQGANConfig(
        image_size=512,
        patch_size=1,
        channels=128,
        multipliers=(1, 1, 2, 2, 4),
        num_res_blocks=2,
        latent_channels=256,
        code_dim=256,
        groups=32,
    ),
    num_codes=8192,
    l1_weight=1.0,
    l2_weight=0.0,
    gradient_weight=0.5,
    normalize_latents=False,
    discriminator=PatchGANConfig(channels=64, num_layers=3),
    adversarial=AdversarialRecipe(start_fraction=0.25, weight=0.8, learning_rate=7e-5),
    recipe=CodecRecipe(
        total_steps=1_000_000,
        batch_size=16,
        learning_rate=7e-5,
        warmup_fraction=0.005,
        continuous_fraction=0.0,
        commitment_weight=0.25,
        codebook_decay=0.99,
        revive_every_steps=500,
        revive_below=0.05,
        clip_norm=1.0,
        log_every_steps=100,
        codebook_update="gradient",
    ),
)
"""The published shape: 512x512 pictures, 32x32 codes of 8192, 68.7 million values. Its recipe was not run here."""


class ImageTokenizer:
    """Pictures to codes and back, in batches of any size, on all local devices or those given.

    Codes and pictures of an item depend on nothing but the item: neither on its neighbours nor on the devices' number.
    """

    def __init__(
        self,
        config: ImageTokenizerConfig,
        params: PyTree,
        codebook_CE: np.ndarray,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        self.config = config
        self.params = params
        self.codebook_CE = np.asarray(codebook_CE, np.float32)
        net: CodecNet = VQGAN(config.net)
        grid, width = config.net.grid_size, config.net.code_dim

        def encode(weights: PyTree, pixels_BHWC: IntArray) -> IntArray:
            # Codes made on one kind of device are read on another: no reduced precision, which some have by default.
            with jax.default_matmul_precision("highest"):
                latents = net.apply({"params": weights["params"]}, _to_unit(pixels_BHWC), method="encode")
                if config.normalize_latents:
                    latents = quantize.normalize(latents)
                return quantize.nearest_codes(weights["codebook_CE"], latents).reshape(len(pixels_BHWC), -1)

        def decode(weights: PyTree, codes_BP: IntArray) -> IntArray:
            latents = weights["codebook_CE"][codes_BP].reshape(-1, grid, grid, width)
            return _to_uint8(net.apply({"params": weights["params"]}, latents, method="decode"))

        self._replicas = Replicas(self._tree(), devices)
        self._encode = ReplicatedFunction(encode, self._replicas)
        self._decode = ReplicatedFunction(decode, self._replicas)

    @property
    def num_codes(self) -> int:
        return self.config.num_codes

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.config.net.image_size

    @property
    def tokens_per_image(self) -> int:
        return self.config.net.grid_size**2

    @property
    def num_devices(self) -> int:
        """Devices that work on a batch, each on pictures of its own."""
        return self._replicas.num_devices

    @property
    def fingerprint(self) -> str:
        """Equal exactly when the same codes mean the same pictures."""
        return storage.fingerprint(self._tree(), _net_description(self.config))

    def encode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        """uint8 pictures [B, image_size, image_size, 3] to int32 codes [B, P]; ValueError for another shape or type."""
        pixels_BHWC = _checked_pixels(pixels_BHWC, self.image_size)
        codes = self._encode.in_turn(self._batches(pixels_BHWC))
        return np.concatenate([np.zeros((0, self.tokens_per_image), np.int32), *codes])[: len(pixels_BHWC)]

    def decode(self, codes_BP: np.ndarray) -> np.ndarray:
        """int codes [B, P] to uint8 pictures [B, image_size, image_size, 3]; ValueError for codes out of range."""
        if self.config.encoder_only:
            raise ValueError(
                "this image tokenizer has no decoder (transformers' files of Chameleon leave it out); import the "
                "release's vqgan.ckpt, which has both"
            )
        codes_BP = np.asarray(codes_BP, np.int32)
        if codes_BP.ndim != 2 or codes_BP.shape[1] != self.tokens_per_image:
            raise ValueError(f"image codes have shape {codes_BP.shape}, expected [batch, {self.tokens_per_image}]")
        if codes_BP.size and (codes_BP.min() < 0 or codes_BP.max() >= self.num_codes):
            raise ValueError(
                f"image codes must lie in 0..{self.num_codes - 1}, found {codes_BP.min()}..{codes_BP.max()}"
            )
        pixels = self._decode.in_turn(self._batches(codes_BP))
        empty = np.zeros((0, self.image_size, self.image_size, 3), np.uint8)
        return np.concatenate([empty, *pixels])[: len(codes_BP)]

    def prepare(self, image: PIL.Image.Image | np.ndarray | str | Path) -> np.ndarray:
        """Any picture, or the path of one, as uint8 [image_size, image_size, 3]: see `prepare_image`."""
        return prepare_image(image, self.image_size)

    def save(self, directory: str | Path, dtype: str = "float32") -> None:
        """Writes `config.json` and `params.safetensors`; with `dtype` float16 in half the size, rounded."""
        directory = Path(directory)
        storage.save_tree(
            directory / "params.safetensors", self._tree(), identity=_net_description(self.config), dtype=dtype
        )
        (directory / "config.json").write_text(config_lib.to_json(self.config))

    @classmethod
    def load(cls, directory: str | Path) -> ImageTokenizer:
        """Inverse of `save`; ValueError naming the file and the tensor when they do not fit."""
        values = storage.read_json(Path(directory) / "config.json")
        cfg = config_lib.from_mapping(ImageTokenizerConfig, values)
        path = Path(directory) / "params.safetensors"
        tree = storage.load_tree(path, abstract_tree(cfg), identity=_net_description(cfg))
        return cls(cfg, tree["params"], np.asarray(tree["codebook_CE"]))

    def _tree(self) -> Mapping[str, Any]:
        return {"params": self.params, "codebook_CE": self.codebook_CE}

    def _batches(self, items: np.ndarray) -> Iterator[Batch]:
        size = min(16, max(1, _PIXELS_PER_DEVICE // self.image_size**2)) * self._replicas.num_devices
        for start in range(0, len(items), size):
            part = items[start : start + size]
            yield (np.pad(part, [(0, size - len(part)), *[(0, 0)] * (items.ndim - 1)]),), len(part)


def abstract_tree(config: ImageTokenizerConfig) -> dict[str, Any]:
    """{"params", "codebook_CE"} of a tokenizer as ShapeDtypeStructs; of a missing decoder only `post_quant_conv`."""
    pixels = jax.ShapeDtypeStruct((1, config.net.image_size, config.net.image_size, 3), jnp.float32)
    params = jax.eval_shape(VQGAN(config.net).init, jax.random.key(0), pixels)["params"]
    if config.encoder_only:
        params = {**params, "decoder": {"post_quant_conv": params["decoder"]["post_quant_conv"]}}
    codebook_CE = jax.ShapeDtypeStruct((config.num_codes, config.net.code_dim), jnp.float32)
    return {"params": params, "codebook_CE": codebook_CE}


def train_image_tokenizer(
    pixels_NHWC: np.ndarray,
    config: ImageTokenizerConfig,
    seed: int,
    workdir: str | Path,
    progress: Progress = lambda metrics: None,
) -> ImageTokenizer:
    """Trains on uint8 pictures [N, image_size, image_size, 3]; goes on where an interrupted call stopped.

    `progress` receives step, total_steps, loss, psnr (dB on the training batch), perplexity and codes_used (the share
    of the codebook that is alive), and once a discriminator is at work its loss and scores, the generator's loss and
    its weight. Equal arguments give an equal tokenizer on the same kind of device.

    Raises:
      ValueError: pictures of another shape, none at all, or a `workdir` used with other settings or pictures.
    """
    pixels_NHWC = _checked_pixels(pixels_NHWC, config.net.image_size)
    if not len(pixels_NHWC):
        raise ValueError("cannot train an image tokenizer on no pictures")
    patches_per_batch = config.recipe.batch_size * config.net.grid_size**2
    if 8 * patches_per_batch < config.num_codes:
        raise ValueError(f"{config.num_codes} codes need batches of more than {patches_per_batch} patches")

    def batch_at(generator: np.random.Generator) -> np.ndarray:
        chosen = generator.integers(0, len(pixels_NHWC), config.recipe.batch_size)
        return pixels_NHWC[chosen].astype(np.float32) / 127.5 - 1

    def loss(decoded: FloatArray, target: FloatArray) -> tuple[FloatArray, dict[str, FloatArray]]:
        error = decoded - target
        squared = jnp.mean(jnp.square(error))
        gradient = jnp.mean(jnp.abs(jnp.diff(error, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error, axis=2)))
        total = config.l1_weight * jnp.mean(jnp.abs(error)) + config.l2_weight * squared
        psnr = 10 * jnp.log10(4 / jnp.maximum(squared, 1e-10))
        return total + config.gradient_weight * gradient, {"psnr": psnr}

    adversary = None
    if config.discriminator and config.adversarial:
        adversary = Adversary(PatchGAN(config.discriminator), config.adversarial, ("decoder", "conv_out", "kernel"))
    data = hashlib.sha256(np.ascontiguousarray(pixels_NHWC).tobytes()).hexdigest()[:16]
    identity = json.dumps({"config": storage.describe(config), "seed": seed, "pictures": data}, sort_keys=True)
    params, codebook_CE = train_codec(
        VQGAN(config.net),
        batch_at,
        AdaptiveCriterion(loss, adversary),
        config.recipe,
        quantizer=quantize.OneCodebook(config.num_codes, config.net.code_dim),
        seed=seed,
        workdir=workdir,
        identity=identity,
        progress=progress,
        normalize_latents=config.normalize_latents,
    )
    return ImageTokenizer(config, params, codebook_CE)


def _net_description(config: ImageTokenizerConfig) -> str:
    description = {"net": storage.describe(config.net), "num_codes": config.num_codes}
    if not config.normalize_latents:
        description |= {"normalize_latents": False}
    if config.encoder_only:
        description |= {"encoder_only": True}
    return json.dumps(description, sort_keys=True)


def _to_unit(pixels: IntArray) -> FloatArray:
    return pixels.astype(jnp.float32) / 127.5 - 1


def _to_uint8(unit: FloatArray) -> IntArray:
    return jnp.clip(jnp.round((unit + 1) * 127.5), 0, 255).astype(jnp.uint8)


def _checked_pixels(pixels: np.ndarray, size: int) -> np.ndarray:
    pixels = np.asarray(pixels)
    if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3) or pixels.dtype != np.uint8:
        raise ValueError(
            f"pictures are {pixels.dtype}{list(pixels.shape)}, expected uint8[N, {size}, {size}, 3]: use prepare"
        )
    return pixels
