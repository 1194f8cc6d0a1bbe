"""Prompts as tokens: their length, where the subject stands, and cutting to the text window."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from realgeneral.errors import UsageError


def subject_span_mask(tokenizer: Any, prompts: Sequence[str], subjects: Sequence[str | None], max_length: int) -> Tensor:
    """Which text tokens belong to each prompt's subject.

    Args:
        tokenizer: The pipeline's tokenizer; it must report character offsets (a "fast" tokenizer).
        prompts: B prompts.
        subjects: For each prompt the words in it that name the subject, or None.
        max_length: Length of the text window.

    Returns:
        [B, max_length] float32, 1 on the subject's tokens.

    Raises:
        ValueError: A subject does not occur in its prompt, or lies past the text window.
    """
    mask = torch.zeros(len(prompts), max_length)
    if not any(subjects):
        return mask
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("subject needs a tokenizer that reports character offsets (is_fast), got a slow one")
    encoded = tokenizer(
        list(prompts), padding="max_length", max_length=max_length, truncation=True, return_offsets_mapping=True
    )
    for row, (prompt, subject) in enumerate(zip(prompts, subjects, strict=True)):
        if not subject or not subject.strip():
            continue
        # whole words first ("pot" is not the start of "potion"); never through lower(), which can change the length
        words = re.escape(subject.strip())
        found = re.search(rf"(?<!\w){words}(?!\w)", prompt, re.IGNORECASE) or re.search(words, prompt, re.IGNORECASE)
        if found is None:
            raise ValueError(f"subject must occur in the prompt {prompt!r}, got {subject!r}")
        start, stop = found.span()
        for column, (first, last) in enumerate(encoded["offset_mapping"][row]):
            if first < stop and last > start and last > first:
                mask[row, column] = 1.0
        if not mask[row].any():
            raise ValueError(f"subject must lie within the first {max_length} tokens of the prompt, got {subject!r}")
    return mask


def token_count(tokenizer: Any, prompt: str) -> int:
    """Length of a prompt, end token included; without the tokenizer's own warning about long ones."""
    return len(tokenizer(prompt, verbose=False).input_ids)


def cut_prompt(tokenizer: Any, prompt: str, window: int) -> str:
    """The start of a prompt that fills the text window: the tokens that stock CogVideoX pipelines, which cut silently, keep.

    Args:
        tokenizer: A "fast" one, as for `subject_span_mask`.
        prompt: Any length.
        window: Length of the text window, end token included.

    Raises:
        UsageError: A slow tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError("truncate_prompts needs a tokenizer that reports character offsets (is_fast), got a slow one")
    if token_count(tokenizer, prompt) <= window:
        return prompt
    offsets = tokenizer(prompt, truncation=True, max_length=window, return_offsets_mapping=True)["offset_mapping"]
    return prompt[: max(stop for _, stop in offsets)]


def pool_subject(text_embeds: Tensor, mask: Tensor) -> Tensor:
    """Mean of the text features over the subject's tokens, [B, L, E] x [B, L] -> [B, E]; zeros where there is no subject."""
    weights = mask.to(text_embeds)
    return (weights[:, None] @ text_embeds)[:, 0] / weights.sum(1, keepdim=True).clamp(min=1)
