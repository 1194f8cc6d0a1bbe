"""Token grids and position tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

from realgeneral.model.geometry import Geometry
from realgeneral.model.presets import get_preset, joint_layout
from tests.realgeneral.helpers.models import SIZES

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("images", [2, 3])
def test_rotary_tables_equal_the_stock_pipeline(bases: dict[str, Path], size: tuple[int, int], images: int) -> None:
    """Frame k's rows are the stock pipeline's rows of frame k of the clip, for 1.0 (linspace) and 1.5 (slice), bit for bit."""
    for name in ("5b", "1.5"):
        pipe = CogVideoXPipeline.from_pretrained(bases[name])
        geometry = Geometry.of(pipe.transformer.config)
        frames = images * geometry.frames_per_image
        wanted = pipe._prepare_rotary_positional_embeddings(size[0] * 8, size[1] * 8, frames, CPU)
        tokens = (size[0] // 2) * (size[1] // 2)
        order = (images - 1, *range(images - 1))  # [target | conditions]
        for table, stock in zip(geometry.rotary_tables(*size, order, CPU), wanted, strict=True):
            parts = [stock[k * tokens : (k + 1) * tokens] for k in order]
            assert table.dtype == torch.float32
            assert torch.equal(table, torch.cat(parts))


def real_geometry(**changes: object) -> Geometry:
    config = {"patch_size": 2, "patch_size_t": None, "head_dim": 64, "dim": 3072, "sample_height": 60, "sample_width": 90}
    config |= {
        "channels": 16,
        "text_dim": 4096,
        "text_window": 226,
        "rotary": True,
        "spatial_interpolation_scale": 1.875,
        "temporal_interpolation_scale": 1.0,
    }
    return Geometry(**{**config, **changes})  # type: ignore[arg-type]


def test_real_5b_positions_are_integers_only_at_480x720() -> None:
    """At 480x720 of CogVideoX-5B the w positions are 0..44; at 512x512 they are the 32 points from 8 on (notes, section 4)."""
    frequency = real_geometry()
    cos, _ = frequency.rotary_tables(60, 90, (0,), CPU)
    # the first w pair has angular frequency 1: its cosine is cos(position)
    first_w = cos.view(30, 45, 64)[0, :, 16 + 24]
    torch.testing.assert_close(first_w, torch.arange(45).float().cos())
    cos, _ = frequency.rotary_tables(64, 64, (0,), CPU)
    positions = torch.linspace(8, 38 * 31 / 32, 32)
    torch.testing.assert_close(cos.view(32, 32, 64)[0, :, 16 + 24], positions.cos())


def test_real_token_counts() -> None:
    """The table of the notes: N tokens per image and S joint tokens for real sizes of 5B and 1.5."""
    for height, width, tokens in ((512, 512, 1024), (480, 720, 1350)):
        rows, columns = real_geometry().grid(height // 8, width // 8)
        assert rows * columns == tokens
        assert joint_layout(get_preset("paper"), 226, tokens, 1).seq_len == 226 + 2 * tokens
    newer = real_geometry(patch_size_t=2, sample_height=300, sample_width=300)
    rows, columns = newer.grid(768 // 8, 768 // 8)
    assert (rows * columns, newer.frames_per_image) == (2304, 2)


@pytest.mark.parametrize("size", SIZES)
def test_sincos_table_equals_the_stock_patch_embedding(bases: dict[str, Path], size: tuple[int, int]) -> None:
    """2B's additive positions of frame k are the stock patch embedding's for frame k of the clip."""
    stock = CogVideoXTransformer3DModel.from_pretrained(bases["2b"], subfolder="transformer")
    geometry = Geometry.of(stock.config)
    embed, text = stock.patch_embed, stock.config.max_text_seq_length
    joint = embed._get_positional_embeddings(*size, (3 - 1) * embed.temporal_compression_ratio + 1)
    tokens = (size[0] // 2) * (size[1] // 2)
    parts = joint[0, text:].split(tokens)
    table = geometry.sincos_table(*size, (2, 0, 1), CPU, torch.float64)
    assert table is not None
    assert torch.equal(table, torch.cat([parts[2], parts[0], parts[1]]))


def test_one_kind_of_positions_per_geometry(bases: dict[str, Path]) -> None:
    """2B has additive positions and no RoPE; 5B and 1.5 the reverse."""
    for name, path in bases.items():
        stock = CogVideoXTransformer3DModel.from_pretrained(path, subfolder="transformer")
        geometry = Geometry.of(stock.config)
        assert (geometry.sincos_table(8, 12, (0,), CPU, torch.float32) is None) == (name != "2b")
        assert (geometry.rotary_tables(8, 12, (0,), CPU)[0] is None) == (name == "2b")


@pytest.mark.parametrize("size", [(0, 4), (7, 12), (8, 11), (-2, 4)])
def test_grid_rejects_sizes_that_the_patch_does_not_divide(size: tuple[int, int]) -> None:
    """A latent size that is no positive multiple of the patch is named."""
    with pytest.raises(ValueError, match=rf"multiples of patch_size 2, got {size[0]} x {size[1]}"):
        real_geometry().grid(*size)


def test_grid_of_1_5_has_a_largest_size() -> None:
    """1.5's positions are slices of a table of the sample size: a larger image is an error, not a wrong table."""
    newer = real_geometry(patch_size_t=2, sample_height=300, sample_width=300)
    assert newer.grid(300, 300) == (150, 150)
    with pytest.raises(ValueError, match="at most 300 x 300, got 302 x 300"):
        newer.grid(302, 300)
