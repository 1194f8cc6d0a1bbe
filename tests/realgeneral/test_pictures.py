"""Picture files as users have them: every mode, every defect."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from realgeneral.data.rows import Picture
from realgeneral.errors import Failure
from realgeneral.pictures import MAX_PIXELS, fit_picture, load_picture, picture_grid, picture_size, save_picture, to_pixels
from tests.realgeneral.helpers.pictures import bomb, encoded, make_photo


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_reads_the_usual_formats(tmp_path: Path, photo: Image.Image, kind: str) -> None:
    """A file and its bytes give the same RGB picture."""
    path = tmp_path / "picture"
    path.write_bytes(encoded(photo, kind))
    picture = load_picture(path)
    assert (picture.mode, picture.size) == ("RGB", photo.size)
    assert picture.tobytes() == load_picture(path.read_bytes()).tobytes() == load_picture(str(path)).tobytes()
    if kind in ("PNG", "BMP"):
        assert picture.tobytes() == photo.tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_becomes_the_same_grey(mode: str) -> None:
    """A mid-grey picture is mid-grey RGB whatever it was stored as; nothing saturates."""
    grey = 255 if mode == "1" else 128
    if mode == "I;16":
        picture = Image.fromarray(np.full((4, 6), grey * 257, np.uint16))
    elif mode == "I":
        picture = Image.fromarray(np.full((4, 6), grey * 257, np.int32))
    elif mode == "F":
        picture = Image.fromarray(np.full((4, 6), float(grey), np.float32))
    elif mode == "P":
        picture = Image.new("RGB", (6, 4), (grey,) * 3).quantize(4)
    else:
        picture = Image.new("RGB", (6, 4), (grey,) * 3).convert(mode)
    kind = "TIFF" if mode in ("CMYK", "I", "F") else "PNG"
    got = np.asarray(load_picture(encoded(picture, kind)))
    assert got.shape == (4, 6, 3)
    assert abs(got.astype(int) - grey).max() <= 2, got[0, 0]


def test_sixteen_bit_keeps_its_gradient() -> None:
    """A 16-bit ramp stays a ramp: it is scaled to 8 bits, not clipped."""
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(8, 0)
    got = np.asarray(load_picture(encoded(Image.fromarray(ramp))))[0, :, 0].astype(int)
    wanted = np.linspace(0, 255, 64)
    assert np.abs(got - wanted).max() <= 1


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_float_depth_maps(top: float) -> None:
    """A float32 TIFF of fractions, or of 8-bit values, is that ramp; what is no number is black."""
    ramp = np.linspace(0, top, 64, dtype=np.float32)[None].repeat(8, 0)
    ramp[0] = np.nan
    got = np.asarray(load_picture(encoded(Image.fromarray(ramp), "TIFF")))[:, :, 0].astype(int)
    assert np.abs(got[1:] - np.linspace(0, 255, 64)).max() <= 1
    assert not got[0].any()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(mode: str) -> None:
    """Transparent pixels are white, not the colour that happens to be stored under them."""
    if mode == "P":
        picture = Image.new("P", (4, 4), 0)
        picture.putpalette([200, 0, 0, 0, 0, 200])
        picture.info["transparency"] = 0
        data = encoded(picture, transparency=0)
    else:
        data = encoded(Image.new("RGBA", (4, 4), (200, 0, 0, 0)).convert(mode))
    assert load_picture(data).getpixel((1, 1)) == (255, 255, 255)


def test_exif_rotation_is_applied() -> None:
    """A portrait photo stored sideways is upright."""
    picture = Image.new("RGB", (8, 4), "red")
    picture.paste("blue", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90 degrees clockwise to show
    got = load_picture(encoded(picture, "JPEG", exif=exif, quality=100))
    assert got.size == (4, 8)
    top, bottom = got.getpixel((2, 1)), got.getpixel((2, 6))
    assert top[2] > top[0]
    assert bottom[0] > bottom[2]


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def turned(kind: str, written: str) -> bytes:
    """A picture of 24 x 16 to be shown turned by 90 degrees, as each program writes that down."""
    picture, exif = make_photo(24, 16), Image.Exif()
    exif[0x0112] = 6
    if written == "exif":
        return encoded(picture, kind, exif=exif)
    if written == "xmp" and kind != "PNG":
        return encoded(picture, kind, **({"tiffinfo": {700: XMP}} if kind == "TIFF" else {"xmp": XMP}))
    text = PngInfo()
    if written == "imagemagick":
        body = exif.tobytes()
        body = body if body.startswith(b"Exif") else b"Exif\0\0" + body
        text.add_text("Raw profile type exif", f"\nexif\n{len(body):8d}\n{body.hex()}\n")
    else:
        text.add_itxt("XML:com.adobe.xmp", XMP.decode())
    data = encoded(picture, kind, pnginfo=text)
    if written.endswith("late"):
        chunk = data.index(b"iTXt") - 4
        end = chunk + 12 + int.from_bytes(data[chunk : chunk + 4], "big")
        data = data[:chunk] + data[end:-12] + data[chunk:end] + data[-12:]
    return data


@pytest.mark.parametrize(
    ("kind", "written"),
    [(kind, written) for kind in ("JPEG", "WEBP", "TIFF", "PNG") for written in ("exif", "xmp")]
    + [("PNG", "imagemagick"), ("PNG", "xmp late")],
)
def test_size_is_that_of_the_upright_picture(kind: str, written: str) -> None:
    """The header's size is turned for every way to write an orientation that turns the pixels."""
    data = turned(kind, written)
    assert picture_size(data) == load_picture(data).size == (16, 24)


def test_only_regular_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe without a writer would wait for ever, a device never ends, and a file of gigabytes is no picture."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):
        for read in (load_picture, picture_size, lambda path: Picture(path).digest()):
            with pytest.raises(Failure, match=f"{name} must be a picture file, got a pipe or a device"):
                read(tmp_path / name)
    (tmp_path / "large.png").write_bytes(encoded(make_photo()))
    monkeypatch.setattr("realgeneral.pictures.MAX_BYTES", 100)
    with pytest.raises(Failure, match=r"large.png must be a picture file of at most 100 bytes, got"):
        Picture(tmp_path / "large.png").digest()


def test_first_frame_of_an_animation() -> None:
    """An animation gives its first frame."""
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_picture(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("width", "height"), [(10_001, 10_000), (13_000, 13_000), (30_000, 30_000), (65_535, 65_535), (2_000_000_000, 1)]
)
def test_bombs_are_refused_before_decoding(width: int, height: int) -> None:
    """More than MAX_PIXELS is an error from the header alone."""
    with pytest.raises(Failure, match=f"bad.png must have at most {MAX_PIXELS} pixels, got"):
        load_picture(bomb(width, height), "bad.png")


def test_missing_and_folder(tmp_path: Path) -> None:
    """A missing file and a folder are named as such."""
    with pytest.raises(Failure, match=r"nothing.png must be a picture file, got no such file"):
        load_picture(tmp_path / "nothing.png")
    with pytest.raises(Failure, match="must be a picture file, got a folder"):
        load_picture(tmp_path)
    with pytest.raises(Failure, match="must be a picture file, got no such file"):
        load_picture(tmp_path / "file.txt" / "nested.png")


def test_file_as_folder(tmp_path: Path) -> None:
    """A path through a file is an error in one line."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(Failure, match="must be a"):
        load_picture(tmp_path / "file" / "nested.png")
    with pytest.raises(Failure, match="must be a"):
        load_picture("bad\0name.png")
    with pytest.raises(Failure, match="must be a"):
        load_picture("x" * 5000 + ".png")


@pytest.mark.parametrize("data", [b"", b"just some text, renamed to .png\n" * 40, b"<html>404</html>", b"\x89PNG\r\n\x1a\n"])
def test_not_a_picture(tmp_path: Path, data: bytes) -> None:
    """A text file renamed .png, an empty file, a bare signature: each names the file and says that it is no picture."""
    path = tmp_path / "fake.png"
    path.write_bytes(data)
    with pytest.raises(Failure, match=r"fake.png must be a (complete )?picture file, got"):
        load_picture(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("kept", [0.5, 0.9, 0.99])
def test_truncated(photo: Image.Image, kind: str, kept: float) -> None:
    """A truncated download is an error, never a half-grey picture."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(Failure, match="must be a"):
        load_picture(data[: int(len(data) * kept)])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_damaged_bytes_give_a_picture_or_a_failure(photo: Image.Image, kind: str) -> None:
    """Whatever bytes are flipped, the reader answers with a picture or with a one-line Failure, nothing else."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo.resize((24, 16)), kind, **({"exif": exif} if kind in ("JPEG", "WEBP", "PNG", "TIFF") else {}))
    rng = random.Random(0)
    messages = []
    for _ in range(400):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 6)):
            broken[rng.randrange(len(broken) if rng.random() < 0.5 else min(120, len(broken)))] = rng.randrange(256)
        try:
            assert load_picture(bytes(broken)).mode == "RGB"
        except Failure as error:
            messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize("error", [IndexError("out of range"), RuntimeError("Not implemented"), KeyError("x"), EOFError()])
def test_whatever_a_decoder_raises_names_the_picture(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Decoders raise more than Pillow documents: QOI an IndexError, AVIF a RuntimeError."""

    def fail(self: Image.Image, mode: str) -> None:
        raise error

    data = encoded(photo, "PNG")
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(Failure, match=r"^x.png must be a complete picture file, got: \S"):
        load_picture(data, "x.png")


def test_fit_covers_and_keeps_the_aspect() -> None:
    """A wide picture is scaled to the height and cropped at both sides, not squeezed."""
    picture = Image.new("RGB", (300, 100), "red")
    picture.paste("blue", (100, 0, 200, 100))
    got = fit_picture(picture, 50, 50)
    assert got.size == (50, 50)
    assert got.getpixel((25, 25)) == got.getpixel((3, 25)) == (0, 0, 255)
    same = Image.new("RGB", (50, 50), "red")
    assert fit_picture(same, 50, 50).tobytes() == same.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1)])
def test_fit_survives_extreme_shapes(size: tuple[int, int]) -> None:
    """One-pixel lines are pictures too."""
    assert fit_picture(Image.new("RGB", size, "red"), 32, 16).size == (32, 16)


def test_pixels_are_exact() -> None:
    """0 is -1, 255 is 1, channels first, float32."""
    picture = Image.new("RGB", (2, 1))
    picture.putpixel((1, 0), (255, 0, 51))
    pixels = to_pixels(picture)
    assert (pixels.dtype, pixels.shape) == (torch.float32, (3, 1, 2))
    torch.testing.assert_close(pixels[:, 0, 1], torch.tensor([1.0, -1.0, -0.6]))
    assert (pixels[:, 0, 0] == -1).all()


def test_save_is_atomic(tmp_path: Path, photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails leaves the old file and no half of a new one."""
    path = tmp_path / "new" / "out.png"
    save_picture(photo, path)
    before = path.read_bytes()
    assert load_picture(path).tobytes() == photo.tobytes()

    def fail(self: Image.Image, target: Path, **_: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*out.png'$"):
        save_picture(photo.rotate(90), path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["out.png"]


def test_grid_places_rows_and_columns(photo: Image.Image) -> None:
    """Every picture is on the sheet, scaled by whole pixels."""
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    sheet = picture_grid([[red, blue], [blue, red]], ["a", "b"], ["first", "second"], zoom=3)
    colors = {color for _, color in sheet.getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 0, 255)} <= colors
    assert sum(n for n, color in sheet.getcolors(1 << 20) if color == (255, 0, 0)) == 2 * 24 * 24
