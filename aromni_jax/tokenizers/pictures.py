"""Any picture as the uint8 square a tokenizer takes: the published input rules, and a defined answer to bad input."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import PIL.Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is read, whatever a file is called. Pillow knows more; some of it (EPS) starts other programs."""
_MAX_ASPECT_RATIO = 50


def prepare_image(image: PIL.Image.Image | np.ndarray | str | Path, size: int) -> np.ndarray:
    """A picture as uint8 [size, size, 3]: alpha on white, short side to `size` (LANCZOS), centre crop.

    The rules of Chameleon's tokenizer, which do not look at a camera's note on rotation. 16-bit pictures keep their
    upper 8 bits; of an animation the first frame counts. A small picture is enlarged.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a picture of `FORMATS`, damaged or cut short, more pixels than Pillow opens without doubts (179
        million), or more than 50 times longer than wide.
    """
    name = str(image) if isinstance(image, (str, Path)) else "image"
    try:
        if isinstance(image, (str, Path)):
            with PIL.Image.open(image, formats=FORMATS) as opened:
                # The size is read from the header: nothing has been decompressed yet.
                if opened.width * opened.height > (PIL.Image.MAX_IMAGE_PIXELS or math.inf):
                    raise ValueError(f"{opened.width}x{opened.height} pixels are too many to open safely; shrink it")
                picture = _to_rgb(opened)
        else:
            picture = _to_rgb(PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, TypeError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error
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


def _to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    if picture.mode.startswith("I;16"):
        picture = PIL.Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"pixel format {picture.mode!r} has no defined range; convert it to 8 or 16 bits")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")
