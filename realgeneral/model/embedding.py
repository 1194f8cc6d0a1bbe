"""Unified Condition Embedding: what a condition image is for, added to its tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


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
