"""The RealGeneral block as one writes it on stock diffusers: the baseline of the model-level benchmarks.

Streams stay apart and are joined for attention and feed-forward in each block, norms and gates are separate eager operations,
the mask is dense, and the last block computes all tokens. It takes the place of `rgkernels.cogvideox.block_forward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from benchmarks.harness.attention import masked_sdpa
from rgkernels import SegmentLayout
from rgkernels.cogvideox import KeyValue, Modulation, Rotary

Streams = Tensor | tuple[Tensor, ...]


def stock_block(
    block: Any,
    residual: Streams,
    branch: Streams | None,
    gate: Tensor | None,
    norm1: Modulation,
    norm2: Modulation,
    rows: SegmentLayout,
    joint: SegmentLayout,
    rotary: Rotary,
    *,
    cached: KeyValue | None = None,
    keep: Sequence[str] | None = None,
    impl: str = "reference",
) -> tuple[Streams, Streams, KeyValue]:
    """As `block_forward`, with one tensor per segment between blocks, and joint tensors for the kept segment at the end."""
    if cached is not None:
        raise NotImplementedError("stock blocks know no cached condition")
    streams = _split(residual, rows)
    if branch is not None and gate is not None:
        streams = _gated(streams, _split(branch, rows), gate)
    attended, kv = _attention(block.attn1, _modulated(block.norm1.norm, streams, norm1), rows, rotary)
    streams = _gated(streams, _split(attended, rows), norm1.gate)
    fed = _split(block.ff(_modulated(block.norm2.norm, streams, norm2)), rows)
    if keep is None:
        return streams, fed, kv
    index = [rows.index(name) for name in keep]
    return torch.cat([streams[i] for i in index], 1), torch.cat([fed[i] for i in index], 1), kv


def _split(x: Streams, rows: SegmentLayout) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else x.split(rows.lengths, dim=1)


def _gated(streams: tuple[Tensor, ...], branches: tuple[Tensor, ...], gate: Tensor) -> tuple[Tensor, ...]:
    return tuple(x + gate[:, g : g + 1] * f for g, (x, f) in enumerate(zip(streams, branches, strict=True)))


def _modulated(norm: Any, streams: tuple[Tensor, ...], modulation: Modulation) -> Tensor:
    shift, scale, _ = modulation
    normed = [norm(x) * (1 + scale[:, g : g + 1]) + shift[:, g : g + 1] for g, x in enumerate(streams)]
    return torch.cat(normed, dim=1)


def _attention(attn: Any, x: Tensor, rows: SegmentLayout, rotary: Rotary) -> tuple[Tensor, KeyValue]:
    q, k, v = (linear(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for linear in (attn.to_q, attn.to_k, attn.to_v))
    q, k = attn.norm_q(q), attn.norm_k(k)
    if rotary.cos is not None:
        for head in (q, k):
            head[:, :, rotary.start :] = apply_rotary_emb(head[:, :, rotary.start :], (rotary.cos, rotary.sin))
    o = masked_sdpa(q, k, v, rows).transpose(1, 2).flatten(2)
    for module in attn.to_out:
        o = module(o)
    return o, KeyValue(k, v)
