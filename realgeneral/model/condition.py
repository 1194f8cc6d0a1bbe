"""What the condition brings along: its embedding, what enters the blocks, and its cached keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rgkernels.cogvideox import KeyValue, Modulation

# modulation before attention, and before the feed-forward
Site = tuple[Modulation, Modulation]


class UnifiedConditionEmbedding(nn.Module):
    """x_c = patch(z_c) + E_task[task] + W_s pool(T5[subject span]).

    Both terms start at zero, so that a fresh model equals its base.

    Args:
        num_tasks: Number of tasks, rows of E_task.
        dim: Width d of the transformer.
        text_embed_dim: Width of the text encoder's output.

    Source:
        RealGeneral, figure "Unified Stream DiT Block": Condition Embedding and Subject-Specific Embedding.
    """

    def __init__(self, num_tasks: int, dim: int, text_embed_dim: int) -> None:
        super().__init__()
        self.task = nn.Embedding(num_tasks, dim)
        self.subject = nn.Linear(text_embed_dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero both terms."""
        nn.init.zeros_(self.task.weight)
        nn.init.zeros_(self.subject.weight)

    def forward(self, task_ids: Tensor, subject_embeds: Tensor | None) -> Tensor:
        """The vector that is added to every condition token.

        Args:
            task_ids: Index of the task, [B] int64.
            subject_embeds: Mean text feature of the prompt's subject span, [B, text_embed_dim]; zeros or None = no subject.

        Returns:
            [B, d].
        """
        embedding: Tensor = self.task(task_ids)
        if subject_embeds is not None:
            embedding = embedding + self.subject(subject_embeds.to(embedding.dtype))
        return embedding


@dataclass(frozen=True)
class Embedded:
    """What enters the blocks and does not change over the steps of a generation.

    Made by `RealGeneralTransformer3DModel.embed`.

    Args:
        text: Text tokens, [B, T, d].
        condition: Condition tokens, [b, K * N, d], sample i of a pass uses sample i % b; None where a cache stands for them.
        grid: Token grid (rows, columns) of a condition image.
        conditions: Number K of condition images.
    """

    text: Tensor
    condition: Tensor | None = None
    grid: tuple[int, int] | None = None
    conditions: int = 0


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
