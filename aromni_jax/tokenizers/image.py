"""The image tokenizer: a VQGAN and its codebook. Pictures to a fixed number of codes in raster order, and back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from aromni_jax import config as config_lib
from aromni_jax.arrays import FloatArray, IntArray, PyTree
from aromni_jax.tokenizers import storage
from aromni_jax.tokenizers.nets import quantize
from aromni_jax.tokenizers.nets.vqgan import VQGAN, VQGANConfig
from aromni_jax.tokenizers.training import CodecNet, CodecRecipe, Progress, train_codec

_MAX_ASPECT_RATIO = 50
_BATCH = 16
"""Pictures per compiled call. One shape for any number of pictures: no result can depend on what stands beside it."""


@dataclasses.dataclass(frozen=True)
class ImageTokenizerConfig:
    """Net, codebook size, and how it is trained; `gradient_weight` is on differences between neighbouring pixels."""

    net: VQGANConfig
    num_codes: int
    l1_weight: float
    l2_weight: float
    gradient_weight: float
    recipe: CodecRecipe


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


class ImageTokenizer:
    """Pictures to codes and back, in batches of any size."""

    def __init__(self, config: ImageTokenizerConfig, params: PyTree, codebook_CE: np.ndarray) -> None:
        self.config = config
        self.params = params
        self.codebook_CE = np.asarray(codebook_CE, np.float32)
        net: CodecNet = VQGAN(config.net)
        grid, width = config.net.grid_size, config.net.code_dim

        @jax.jit
        def encode(params: PyTree, codebook_CE: FloatArray, pixels_BHWC: IntArray) -> IntArray:
            latents = net.apply({"params": params}, _to_unit(pixels_BHWC), method="encode")
            return quantize.nearest_codes(codebook_CE, quantize.normalize(latents)).reshape(len(pixels_BHWC), -1)

        @jax.jit
        def decode(params: PyTree, codebook_CE: FloatArray, codes_BP: IntArray) -> IntArray:
            latents = codebook_CE[codes_BP].reshape(-1, grid, grid, width)
            return _to_uint8(net.apply({"params": params}, latents, method="decode"))

        self._encode, self._decode = encode, decode

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
    def fingerprint(self) -> str:
        """Equal exactly when the same codes mean the same pictures."""
        return storage.fingerprint(self._tree(), _net_description(self.config))

    def encode(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        """uint8 pictures [B, image_size, image_size, 3] to int32 codes [B, P]; ValueError for another shape or type."""
        pixels_BHWC = _checked_pixels(pixels_BHWC, self.image_size)
        codes = [np.asarray(self._encode(self.params, self.codebook_CE, part)) for part in _batches(pixels_BHWC)]
        return np.concatenate([np.zeros((0, self.tokens_per_image), np.int32), *codes])[: len(pixels_BHWC)]

    def decode(self, codes_BP: np.ndarray) -> np.ndarray:
        """int codes [B, P] to uint8 pictures [B, image_size, image_size, 3]; ValueError for codes out of range."""
        codes_BP = np.asarray(codes_BP, np.int32)
        if codes_BP.ndim != 2 or codes_BP.shape[1] != self.tokens_per_image:
            raise ValueError(f"image codes have shape {codes_BP.shape}, expected [batch, {self.tokens_per_image}]")
        if codes_BP.size and (codes_BP.min() < 0 or codes_BP.max() >= self.num_codes):
            raise ValueError(
                f"image codes must lie in 0..{self.num_codes - 1}, found {codes_BP.min()}..{codes_BP.max()}"
            )
        pixels = [np.asarray(self._decode(self.params, self.codebook_CE, part)) for part in _batches(codes_BP)]
        empty = np.zeros((0, self.image_size, self.image_size, 3), np.uint8)
        return np.concatenate([empty, *pixels])[: len(codes_BP)]

    def prepare(self, image: PIL.Image.Image | np.ndarray | str | Path) -> np.ndarray:
        """Any picture, or the path of one, as uint8 [image_size, image_size, 3]: see `prepare_image`."""
        return prepare_image(image, self.image_size)

    def save(self, directory: str | Path) -> None:
        """Writes `config.json` and `params.safetensors`."""
        directory = Path(directory)
        storage.save_tree(directory / "params.safetensors", self._tree(), identity=_net_description(self.config))
        (directory / "config.json").write_text(config_lib.to_json(self.config))

    @classmethod
    def load(cls, directory: str | Path) -> ImageTokenizer:
        """Inverse of `save`; ValueError naming the file and the tensor when they do not fit."""
        values = storage.read_json(Path(directory) / "config.json")
        cfg = config_lib.from_mapping(ImageTokenizerConfig, values)
        net = VQGAN(cfg.net)
        pixels = jax.ShapeDtypeStruct((1, cfg.net.image_size, cfg.net.image_size, 3), jnp.float32)
        like = {
            "params": jax.eval_shape(net.init, jax.random.key(0), pixels)["params"],
            "codebook_CE": jax.ShapeDtypeStruct((cfg.num_codes, cfg.net.code_dim), jnp.float32),
        }
        path = Path(directory) / "params.safetensors"
        tree = storage.load_tree(path, like, identity=_net_description(cfg))
        return cls(cfg, tree["params"], np.asarray(tree["codebook_CE"]))

    def _tree(self) -> Mapping[str, Any]:
        return {"params": self.params, "codebook_CE": self.codebook_CE}


def prepare_image(image: PIL.Image.Image | np.ndarray | str | Path, size: int) -> np.ndarray:
    """A picture as uint8 [size, size, 3]: alpha on white, short side to `size` (LANCZOS), centre crop.

    The rules of Chameleon's tokenizer. 16-bit pictures keep their upper 8 bits; of an animation the first frame counts.

    Raises:
      ValueError: not a picture, damaged, too large to open safely, or more than 50 times longer than wide.
    """
    name = str(image) if isinstance(image, (str, Path)) else "image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            if isinstance(image, (str, Path)):
                with PIL.Image.open(image) as opened:
                    picture = _to_rgb(opened)
            else:
                picture = _to_rgb(PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, TypeError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error
    except PIL.Image.DecompressionBombWarning as error:
        raise ValueError(f"{name} is too large to open safely: {error}; shrink it first") from error
    width, height = picture.size
    short = min(width, height)
    if short == 0 or max(width, height) > _MAX_ASPECT_RATIO * short:
        raise ValueError(
            f"{name} is {width}x{height} pixels; one side may be at most {_MAX_ASPECT_RATIO} times the other"
        )
    resized = (round(width * size / short), round(height * size / short))
    picture = picture.resize(resized, PIL.Image.Resampling.LANCZOS)
    left, top = (resized[0] - size) // 2, (resized[1] - size) // 2
    return np.array(picture.crop((left, top, left + size, top + size)), np.uint8)


def train_image_tokenizer(
    pixels_NHWC: np.ndarray,
    config: ImageTokenizerConfig,
    seed: int,
    workdir: str | Path,
    progress: Progress = lambda metrics: None,
) -> ImageTokenizer:
    """Trains on uint8 pictures [N, image_size, image_size, 3]; goes on where an interrupted call stopped.

    `progress` receives step, total_steps, loss, psnr (dB on the training batch) and perplexity. Equal arguments give an
    equal tokenizer on the same kind of device.

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

    data = hashlib.sha256(np.ascontiguousarray(pixels_NHWC).tobytes()).hexdigest()[:16]
    identity = json.dumps({"config": dataclasses.asdict(config), "seed": seed, "pictures": data}, sort_keys=True)
    params, codebook_CE = train_codec(
        VQGAN(config.net),
        batch_at,
        loss,
        config.recipe,
        num_codes=config.num_codes,
        code_dim=config.net.code_dim,
        seed=seed,
        workdir=workdir,
        identity=identity,
        progress=progress,
    )
    return ImageTokenizer(config, params, codebook_CE)


def _net_description(config: ImageTokenizerConfig) -> str:
    return json.dumps({"net": dataclasses.asdict(config.net), "num_codes": config.num_codes}, sort_keys=True)


def _to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    if picture.mode.startswith("I;16"):
        picture = PIL.Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"pixel format {picture.mode!r} has no defined range; convert it to 8 or 16 bits")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


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


def _batches(items: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(items), _BATCH):
        part = items[start : start + _BATCH]
        yield np.pad(part, [(0, _BATCH - len(part)), *[(0, 0)] * (items.ndim - 1)])
