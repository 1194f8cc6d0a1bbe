"""Picture files: safe reading, fitting to a size, and pixels."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageOps, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from realgeneral.errors import Failure
from realgeneral.files import replacing


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] -> PIL RGB."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


MAX_PIXELS = 100_000_000
MAX_BYTES = 2**30


@contextlib.contextmanager
def _opened(source: str | os.PathLike[str] | bytes, name: str | None) -> Iterator[Image.Image]:
    """A picture whose header is read; whatever goes wrong inside is a Failure that names it."""
    name = name or (f"picture of {len(source)} bytes" if isinstance(source, bytes) else str(source))
    try:
        _check_file(source, name)
        with warnings.catch_warnings():
            # Pillow warns of bad EXIF, and of large pictures at its own limit (ours is checked below, before decoding)
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise Failure(f"{name} must have at most {MAX_PIXELS} pixels, got {picture.width} x {picture.height}")
                yield picture
    except FileNotFoundError:
        raise Failure(f"{name} must be a picture file, got no such file") from None
    except IsADirectoryError:
        raise Failure(f"{name} must be a picture file, got a folder") from None
    except Image.DecompressionBombError as error:
        raise Failure(f"{name} must have at most {MAX_PIXELS} pixels, got: {error}") from None
    except UnidentifiedImageError:
        raise Failure(f"{name} must be a picture file, got something that is not an image") from None
    except (Failure, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever they meet in damaged data
        raise Failure(f"{name} must be a complete picture file, got: {str(error) or type(error).__name__}") from None


def _check_file(source: str | os.PathLike[str] | bytes, name: str) -> None:
    """Failure for what must not be opened at all: a pipe never ends to wait, a device never ends to be read."""
    if not isinstance(source, bytes):
        status = os.stat(source)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise Failure(f"{name} must be a picture file, got a pipe or a device")
        if status.st_size > MAX_BYTES:
            raise Failure(f"{name} must be a picture file of at most {MAX_BYTES} bytes, got {status.st_size}")


def load_picture(source: str | os.PathLike[str] | bytes, name: str | None = None) -> Image.Image:
    """Read an RGB picture from a file or bytes, upright as its EXIF says, transparency on white.

    Raises:
        Failure: Missing, truncated, not an image, or more than MAX_PIXELS pixels (checked before decoding).
    """
    with _opened(source, name) as picture:
        return to_rgb(ImageOps.exif_transpose(picture))


def picture_size(source: str | os.PathLike[str] | bytes, name: str | None = None) -> tuple[int, int]:
    """(width, height) of a picture as `load_picture` would give it, from its header alone.

    Raises:
        Failure: Missing, not an image, or more than MAX_PIXELS pixels. A truncated one may still have its header.
    """
    with _opened(source, name) as picture:
        return picture.size[::-1] if _orientation(picture) in (5, 6, 7, 8) else picture.size


def _orientation(picture: Image.Image) -> object:
    """What `ImageOps.exif_transpose` will find: EXIF, the same as ImageMagick's text, or XMP."""
    if isinstance(picture, TiffImagePlugin.TiffImageFile) and ExifTags.Base.Orientation in picture.tag_v2:
        return 1  # its size is that of the turned picture already
    if isinstance(picture, PngImagePlugin.PngImageFile) and picture.fp is not None and _described_late(picture.fp):
        picture.load()
    # not the PNG's own method, which decodes every PNG without an eXIf chunk to look behind its pixels
    return Image.Image.getexif(picture).get(ExifTags.Base.Orientation)


def _described_late(file: IO[bytes]) -> bool:
    """Whether a PNG has EXIF or text behind its pixels; the file stays where it is."""
    place, pixels = file.tell(), False
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            if pixels and head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            pixels |= head[4:] == b"IDAT"
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
        return False
    finally:
        file.seek(place)


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB of a picture in any mode: 16-bit grey, and fractions in float32, scaled to 8 bits, transparency on white."""
    if picture.mode == "F":
        # a depth map as a TIFF, in [0, 1] or as 8-bit values: Pillow would cut fractions to black
        values = np.nan_to_num(np.asarray(picture))
        picture = Image.fromarray((values * (255 if values.max(initial=0) <= 1 else 1)).round().clip(0, 255).astype(np.uint8))
    if picture.mode.startswith("I"):
        # 16-bit grey, as depth maps are stored: Pillow would clip it to white
        grey = np.asarray(picture).astype(np.int64).clip(0, 65535)
        picture = Image.fromarray((grey // (257 if picture.mode != "I" or grey.max(initial=0) > 255 else 1)).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def fit_picture(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Scale to cover width x height and crop the centre; the aspect ratio of the content is kept."""
    picture = to_rgb(picture)
    return picture if picture.size == (width, height) else ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def to_pixels(picture: Image.Image) -> Tensor:
    """PIL -> RGB [3, H, W] float32 in [-1, 1]."""
    array = np.asarray(to_rgb(picture), dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1).contiguous()


def save_picture(picture: Image.Image, path: str | os.PathLike[str], **options: object) -> None:
    """Write a PNG whole or not at all; OSError names it."""
    try:
        with replacing(path) as partial:
            picture.save(partial, format="PNG", **options)
    except OSError as error:
        error.filename = str(path)  # a full disk names none, other errors the temporary one
        raise


def picture_grid(
    rows: Sequence[Sequence[Image.Image]], header: Sequence[str], labels: Sequence[str], zoom: int = 2
) -> Image.Image:
    """A contact sheet: a header above the columns, a label left of each row, pictures scaled by an integer factor."""
    width, height = rows[0][0].width * zoom, rows[0][0].height * zoom
    left, top, gap = 170, 26, 6
    sheet = Image.new("RGB", (left + len(header) * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(header):
        draw.text((left + column * (width + gap) + 2, 8), text, fill="black")
    for r, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y = top + r * (height + gap)
        lines = [line for paragraph in label.splitlines() for line in textwrap.wrap(paragraph, 26) or [""]]
        draw.multiline_text((6, y + 4), "\n".join(lines), fill="black")
        for c, picture in enumerate(row):
            sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left + c * (width + gap), y))
    return sheet
