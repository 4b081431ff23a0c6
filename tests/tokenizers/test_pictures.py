"""Input rules of pictures: what the published tokenizers do with good ones, and a defined answer to every bad one."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from aromni_jax.tokenizers.pictures import prepare_image


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(path: Path, width: int, height: int, rows: bytes, *, depth: int = 8, colour: int = 0) -> Path:
    """A PNG written by hand: the header says what the test wants, whatever the rows hold."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


def test_alpha_lies_on_white_and_the_centre_is_kept():
    clear = PIL.Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    np.testing.assert_array_equal(prepare_image(clear, 16), np.full((16, 16, 3), 255, np.uint8))
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    assert prepare_image(wide, 20).min() == 255
    grey_16_bit = PIL.Image.fromarray(np.full((20, 20), 0x8000, np.uint16))
    assert np.unique(prepare_image(grey_16_bit, 16)).tolist() == [0x80]
    assert prepare_image(PIL.Image.new("L", (1, 1), 7), 16).shape == (16, 16, 3)


def test_short_side_is_resized_with_both_sides_rounded():
    source = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 47, 3), np.uint8))
    resized = source.resize((round(47 * 16 / 33), 16), PIL.Image.Resampling.LANCZOS)
    left = (resized.size[0] - 16) // 2
    np.testing.assert_array_equal(prepare_image(source, 16), np.asarray(resized)[:, left : left + 16])


def test_bad_pictures_are_named(tmp_path):
    good = tmp_path / "good.png"
    PIL.Image.fromarray(noise(16, 16)).save(good)
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:60])
    fake = tmp_path / "fake.png"
    fake.write_bytes(b"GIF? no.")
    for path in (cut, fake):
        with pytest.raises(ValueError, match=path.name):
            prepare_image(path, 16)
    with pytest.raises(FileNotFoundError):
        prepare_image(tmp_path / "none.png", 16)
    with pytest.raises(ValueError, match="at most 50 times"):
        prepare_image(np.zeros((2, 400, 3), np.uint8), 16)
    with pytest.raises(ValueError, match="4x0 pixels"):
        prepare_image(np.zeros((0, 4, 3), np.uint8), 16)
    with pytest.raises(ValueError, match="cannot be read"):
        prepare_image(np.zeros((4, 4, 7), np.uint8), 16)


@pytest.mark.parametrize("limit", [100, 200])
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, limit):
    path = tmp_path / "bomb.png"
    PIL.Image.new("RGB", (16, 16)).save(path)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)  # Pillow warns above it, and fails above twice of it
    with pytest.raises(ValueError, match="bomb.png"):
        prepare_image(path, 16)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "bmp", "tiff", "ppm"])
def test_files_cut_short_are_refused_in_every_format(tmp_path, kind):
    path = tmp_path / f"whole.{kind}"
    PIL.Image.fromarray(noise(64, 64)).save(path)
    assert prepare_image(path, 16).shape == (16, 16, 3)
    content = path.read_bytes()
    for share in (0, 0.02, 0.3, 0.6):
        cut = tmp_path / f"cut.{kind}"
        cut.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ValueError, match=f"cut.{kind} cannot be read as a picture"):
            prepare_image(cut, 16)


def test_the_name_of_a_file_does_not_matter_and_its_content_does(tmp_path):
    picture = PIL.Image.fromarray(noise(16, 16))
    picture.save(tmp_path / "a.png")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.png").read_bytes())
    np.testing.assert_array_equal(prepare_image(tmp_path / "a.jpg", 16), noise(16, 16))
    (tmp_path / "b.png").write_bytes(b"RIFF\x24\x00\x00\x00WAVEfmt ")
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    # PostScript would be handed to another program.
    (tmp_path / "d.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nquit\n")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("b.png", "c.png", "d.png", "empty.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as a picture"):
            prepare_image(tmp_path / name, 16)
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        prepare_image(tmp_path, 16)


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_of_an_animation_the_first_frame_counts(tmp_path, kind):
    frames = [PIL.Image.new("RGB", (20, 20), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / f"a.{kind}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "webp" else {}))
    with PIL.Image.open(path) as opened:
        assert opened.n_frames == 3
    assert np.unique(prepare_image(path, 16).reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]


def test_sixteen_bits_keep_the_upper_eight(tmp_path):
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    expected = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    for name in ("grey.png", "grey.tiff"):
        PIL.Image.fromarray(values).save(tmp_path / name)
        np.testing.assert_array_equal(prepare_image(tmp_path / name, 16), expected)
    np.testing.assert_array_equal(prepare_image(values, 16), expected)
    wide = np.repeat(values[..., None], 3, axis=2).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    np.testing.assert_array_equal(
        prepare_image(png(tmp_path / "c.png", 16, 16, rows, depth=16, colour=2), 16), expected
    )
    # 16-bit grey with alpha, all of it clear.
    clear = b"".join(b"\0" + np.stack([row, 0 * row], -1).astype(">u2").tobytes() for row in values)
    path = png(tmp_path / "clear.png", 16, 16, clear, depth=16, colour=4)
    assert prepare_image(path, 16).min() == 255
    for kind in (np.int32, np.float32):
        with pytest.raises(ValueError, match="no defined range"):
            prepare_image(values.astype(kind), 16)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_colour_space_becomes_rgb(mode):
    white = PIL.Image.new("RGB", (8, 8), "white")
    picture = PIL.Image.new("LAB", (8, 8), (255, 128, 128)) if mode == "LAB" else white.convert(mode)
    assert prepare_image(picture, 16).min() >= 250


def test_transparency_of_a_palette_lies_on_white(tmp_path):
    picture = PIL.Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 200, 10, 10])
    picture.save(tmp_path / "a.png", transparency=1)
    assert prepare_image(tmp_path / "a.png", 8).min() == 255
    half = PIL.Image.new("RGBA", (8, 8), (0, 0, 0, 51))
    assert np.unique(prepare_image(half, 8)).tolist() == [204]


def test_sizes_at_both_ends(tmp_path):
    assert np.unique(prepare_image(np.full((1, 1, 3), 9, np.uint8), 64)).tolist() == [9]
    assert prepare_image(np.zeros((1, 50, 3), np.uint8), 64).shape == (64, 64, 3)
    long = PIL.Image.new("L", (20_000, 400), 77)
    long.save(tmp_path / "long.png")
    assert np.unique(prepare_image(tmp_path / "long.png", 64)).tolist() == [77]
    PIL.Image.new("1", (20_000, 399)).save(tmp_path / "longer.png")
    with pytest.raises(ValueError, match="20000x399 pixels; one side may be at most 50 times"):
        prepare_image(tmp_path / "longer.png", 64)


@pytest.mark.parametrize("side", [13_500, 20_000, 65_535])
def test_bombs_are_refused_by_their_header(tmp_path, side):
    """A hundred bytes that unfold to gigabytes: the answer comes before anything is unfolded."""
    path = png(tmp_path / "bomb.png", side, side, b"")
    with pytest.raises(ValueError, match="bomb.png cannot be read as a picture"):
        prepare_image(path, 64)


def test_a_bomb_in_the_text_of_a_picture_is_refused(tmp_path):
    path = png(tmp_path / "text.png", 4, 4, b"\0\0\0\0\0" * 4)
    body = b"Comment\0\0" + zlib.compress(b"\0" * 50_000_000, 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    content = path.read_bytes()
    path.write_bytes(content[:33] + chunk + content[33:])
    with pytest.raises(ValueError, match="text.png cannot be read as a picture"):
        prepare_image(path, 16)
