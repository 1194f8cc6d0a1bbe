"""Pictures to read: one with edges, colour and no symmetry, in any format, and files whose header lies."""

from __future__ import annotations

import io
import struct
import zlib

import torch
from PIL import Image


def make_photo(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    coarse = (torch.rand(5, 7, 3, generator=generator) * 255).byte().numpy()
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a huge picture."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
