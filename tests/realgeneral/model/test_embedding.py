"""Unified Condition Embedding: zero start, subject span, pooling."""

from __future__ import annotations

import pytest
import torch

from realgeneral.model.embedding import UnifiedConditionEmbedding
from realgeneral.prompts import pool_subject, subject_span_mask
from tests.realgeneral.helpers.checkpoints import TEXT_WINDOW, tiny_tokenizer


def words(prompt: str, subject: str | None, window: int = TEXT_WINDOW) -> list[str]:
    """The tokens that the mask selects."""
    tokenizer = tiny_tokenizer()
    mask = subject_span_mask(tokenizer, [prompt], [subject], window)
    tokens = tokenizer.convert_ids_to_tokens(
        tokenizer(prompt, padding="max_length", max_length=window, truncation=True).input_ids
    )
    return [token for token, value in zip(tokens, mask[0].tolist(), strict=True) if value]


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


@pytest.mark.parametrize(
    ("prompt", "subject", "tokens"),
    [
        ("a red pot on the table", "pot", ["▁pot"]),
        ("a red pot on the table", "red pot", ["▁red", "▁pot"]),
        ("a Red POT on the table", "red Pot", None),
        ("pot", "pot", ["▁pot"]),
        ("a red pot", None, []),
        ("a red pot", "", []),
    ],
)
def test_span_is_the_subject_words(prompt: str, subject: str | None, tokens: list[str] | None) -> None:
    """The mask holds the tokens of the subject and no neighbour, whatever the case."""
    found = words(prompt, subject)
    if tokens is None:
        assert "".join(found).replace("▁", "").lower().replace("<unk>", "") in "redpot"
        assert found
        assert "▁on" not in found
        assert "▁a" not in found
    else:
        assert found == tokens


def test_span_prefers_the_whole_word() -> None:
    """The pot of "a potion in a pot" is the pot, not the start of the potion."""
    prompt = "a potion in a pot"
    tokenizer = tiny_tokenizer()
    encoded = tokenizer(prompt, padding="max_length", max_length=TEXT_WINDOW, return_offsets_mapping=True)
    mask = subject_span_mask(tokenizer, [prompt], ["pot"], TEXT_WINDOW)[0]
    chosen = [span for span, value in zip(encoded["offset_mapping"], mask.tolist(), strict=True) if value]
    assert chosen
    assert all(start >= prompt.rindex("pot") - 1 for start, _ in chosen)


def test_span_survives_letters_that_change_length_in_lower_case() -> None:
    """Characters such as İ, two characters in lower case, do not shift the span."""
    assert words("İİİ a red pot", "pot") == ["▁pot"]


def test_rows_are_independent() -> None:
    """Each prompt has its own span, and a prompt without subject none."""
    mask = subject_span_mask(tiny_tokenizer(), ["a red pot", "a fox", "a cat"], ["pot", None, "cat"], TEXT_WINDOW)
    assert mask.sum(1).tolist() == [1, 0, 1]
    assert mask.shape == (3, TEXT_WINDOW)


def test_subject_must_occur() -> None:
    """A subject that the prompt lacks is named with the prompt."""
    with pytest.raises(ValueError, match="subject must occur in the prompt 'a red pot', got 'fox'"):
        subject_span_mask(tiny_tokenizer(), ["a red pot"], ["fox"], TEXT_WINDOW)


def test_subject_past_the_window() -> None:
    """A subject that truncation cuts off is an error, not an empty span."""
    with pytest.raises(ValueError, match="within the first 4 tokens of the prompt, got 'fox'"):
        subject_span_mask(tiny_tokenizer(), ["a red pot plant on the table fox"], ["fox"], 4)


def test_slow_tokenizer_is_refused_only_with_a_subject() -> None:
    """A tokenizer without offsets serves prompts without subject and is named otherwise."""

    class Slow:
        is_fast = False

    assert not subject_span_mask(Slow(), ["a"], [None], 4).any()
    with pytest.raises(ValueError, match="is_fast"):
        subject_span_mask(Slow(), ["a"], ["a"], 4)


def test_pooling_is_the_mean_over_the_span() -> None:
    """Mean over the span's features; zeros, not NaN, where there is no span."""
    features = torch.randn(2, 4, 3)
    mask = torch.tensor([[0.0, 1, 1, 0], [0, 0, 0, 0]])
    pooled = pool_subject(features, mask)
    torch.testing.assert_close(pooled[0], features[0, 1:3].mean(0))
    assert not pooled[1].any()
