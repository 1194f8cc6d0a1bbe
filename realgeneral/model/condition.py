"""What the condition brings along: its modulation branch in each block, and its cached keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rgkernels.cogvideox import KeyValue, Modulation, stack_modulation

Site = tuple[Modulation, Modulation]


class ConditionAdaLN(nn.Module):
    """The condition's modulation branch of one block: two Linear(time_embed_dim, 3d) for shift, scale, gate.

    It starts as a copy of the video rows of the stock linears (Separated Condition AdaLN; arrow "copy" in the paper's figure).
    """

    def __init__(self, time_embed_dim: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.Linear(time_embed_dim, 3 * dim)
        self.norm2 = nn.Linear(time_embed_dim, 3 * dim)

    @torch.no_grad()
    def copy_from(self, block: Any) -> None:
        """Copy rows 0:3d, the video branch, of a stock block's modulation linears."""
        for own, stock in ((self.norm1, block.norm1.linear), (self.norm2, block.norm2.linear)):
            rows = own.out_features
            own.weight.copy_(stock.weight[:rows])
            own.bias.copy_(stock.bias[:rows])


def norm_sites(block: Any, own: ConditionAdaLN, temb: Tensor | None, condition_temb: Tensor | None, conditions: int) -> Site:
    """Modulation of both norm sites of a block, segments in the joint order.

    Args:
        block: diffusers' `CogVideoXBlock`: text uses rows 3d:6d of its linears, the target rows 0:3d.
        own: The condition's branch.
        temb: Time embedding [B, time_embed_dim] of text and target; None without them.
        condition_temb: That of the conditions; None without them.
        conditions: Number of condition images.
    """
    sites = []
    for norm, linear in ((block.norm1, own.norm1), (block.norm2, own.norm2)):
        rows: list[Any] = []
        if temb is not None:
            parts = norm.linear(norm.silu(temb)).chunk(6, dim=1)
            rows += [parts[3:], parts[:3]]
        if condition_temb is not None:
            rows += [linear(norm.silu(condition_temb)).chunk(3, dim=1)] * conditions
        sites.append(stack_modulation(rows))
    return sites[0], sites[1]


class ConditionCache:
    """Keys and values of the condition segments in every block, exact for each step, prompt, seed and guidance branch.

    Made by `RealGeneralTransformer3DModel.encode_condition` in a cacheable preset.
    """

    def __init__(self, blocks: list[KeyValue], frames: tuple[int, ...], grid: tuple[int, int]) -> None:
        self.blocks = blocks
        self.frames = frames
        self.grid = grid

    def __repr__(self) -> str:
        rows, columns = self.grid
        return (
            f"ConditionCache({self.conditions} of {rows} x {columns} tokens, batch {self.batch}, {len(self.blocks)} blocks, "
            f"{self.nbytes / 2**20:.1f} MiB on {self.blocks[0].k.device})"
        )

    @property
    def conditions(self) -> int:
        """Number of condition images in it."""
        return len(self.frames)

    @property
    def batch(self) -> int:
        """Number of samples in it; sample i of a pass uses sample i % batch."""
        return int(self.blocks[0].k.shape[0])

    @property
    def nbytes(self) -> int:
        """Memory that the cache holds, in bytes."""
        return sum(x.numel() * x.element_size() for pair in self.blocks for x in pair)

    def to(self, device: torch.device | str) -> ConditionCache:
        """The cache on another device; on the CPU it costs no GPU memory, and each step copies one block's share at a time.

        Coming from a GPU to the CPU it is pinned, so that these copies do not block.
        """

        def moved(x: Tensor) -> Tensor:
            y = x.to(device)
            return y.pin_memory() if x.is_cuda and not y.is_cuda else y

        return ConditionCache([KeyValue(moved(k), moved(v)) for k, v in self.blocks], self.frames, self.grid)

    @classmethod
    def stack(cls, caches: Sequence[ConditionCache], batch: int) -> ConditionCache:
        """Caches after each other along the batch, each of 1 or `batch` samples, as the passes of a guided step take them.

        Raises:
            ValueError: Sizes or frame positions differ.
        """
        if len({(cache.grid, cache.frames) for cache in caches}) != 1:
            raise ValueError(
                f"condition caches must be of one size and position, got {[(cache.grid, cache.frames) for cache in caches]}"
            )
        blocks = [
            KeyValue(*(torch.cat([x.expand(batch, -1, -1, -1) for x in parts]) for parts in zip(*pairs, strict=True)))
            for pairs in zip(*(cache.blocks for cache in caches), strict=True)
        ]
        return cls(blocks, caches[0].frames, caches[0].grid)

    @classmethod
    def join(cls, caches: Sequence[ConditionCache]) -> ConditionCache:
        """Several images cached each on its own as the conditions of one call: exact, since they do not see each other.

        Raises:
            ValueError: Sizes differ, or the frame positions are not 0, 1, ... in order.
        """
        frames = tuple(frame for cache in caches for frame in cache.frames)
        if frames != tuple(range(len(frames))) or not frames:
            raise ValueError(f"condition caches must have the positions 0, 1, ... in order, got {frames}")
        if len({cache.grid for cache in caches}) != 1:
            raise ValueError(f"condition caches must be of one size, got token grids {[cache.grid for cache in caches]}")
        blocks = [
            KeyValue(torch.cat([pair.k for pair in pairs], dim=2), torch.cat([pair.v for pair in pairs], dim=2))
            for pairs in zip(*(cache.blocks for cache in caches), strict=True)
        ]
        return cls(blocks, frames, caches[0].grid)
