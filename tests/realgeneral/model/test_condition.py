"""Unified Condition Embedding: zero start, and the sum of task and subject."""

from __future__ import annotations

import torch

from realgeneral.model.condition import UnifiedConditionEmbedding


def test_starts_at_zero() -> None:
    """A fresh embedding adds exactly nothing, with and without a subject."""
    embedding = UnifiedConditionEmbedding(3, 8, 5)
    ids = torch.tensor([0, 2])
    assert not embedding(ids, None).any()
    assert not embedding(ids, torch.randn(2, 5)).any()


def test_sum_of_task_row_and_projected_subject() -> None:
    """E_task[task] + W_s subject; a zero subject equals no subject."""
    embedding = UnifiedConditionEmbedding(3, 8, 5)
    torch.nn.init.normal_(embedding.task.weight)
    torch.nn.init.normal_(embedding.subject.weight)
    ids, subject = torch.tensor([2, 0]), torch.randn(2, 5)
    wanted = embedding.task.weight[ids] + subject @ embedding.subject.weight.T
    torch.testing.assert_close(embedding(ids, subject), wanted)
    assert torch.equal(embedding(ids, torch.zeros(2, 5)), embedding(ids, None))
