"""Prompts: the subject's tokens, pooling over them, and cutting to the text window."""

from __future__ import annotations

import pytest
import torch

from realgeneral.errors import UsageError
from realgeneral.generation.bases import load_for_data
from realgeneral.prompts import cut_prompt, pool_subject, subject_span_mask
from tests.realgeneral.helpers.checkpoints import TEXT_WINDOW, tiny_tokenizer


def words(prompt: str, subject: str | None, window: int = TEXT_WINDOW) -> list[str]:
    """The tokens that the mask selects."""
    tokenizer = tiny_tokenizer()
    mask = subject_span_mask(tokenizer, [prompt], [subject], window)
    tokens = tokenizer.convert_ids_to_tokens(
        tokenizer(prompt, padding="max_length", max_length=window, truncation=True).input_ids
    )
    return [token for token, value in zip(tokens, mask[0].tolist(), strict=True) if value]


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


def test_cut_prompts_are_those_of_the_stock_pipeline() -> None:
    """The tokens that truncation keeps, whatever the words; what fits is left alone."""
    tokenizer = load_for_data("nano").tokenizer
    for prompt in (
        "a photograph of a small red pot with a wooden lid on a table in the sun",
        "naïve Früchte 水果 🦊 " * 9,
        "x" * 400,
        "   a  " * 40,
    ):
        for window in (4, 16, 30):
            cut = cut_prompt(tokenizer, prompt, window)
            assert prompt.startswith(cut)
            assert tokenizer(cut).input_ids == tokenizer(prompt, truncation=True, max_length=window).input_ids
    assert cut_prompt(tokenizer, "red fox ", 16) == "red fox "
    with pytest.raises(UsageError, match="truncate_prompts needs a tokenizer that reports character offsets"):
        cut_prompt(object(), "red fox", 16)
