"""Masked attention with what PyTorch has: one call with a dense mask, or compiled FlexAttention with a block mask.

Masks are built outside the timed region.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rgkernels import SegmentLayout


@functools.lru_cache(maxsize=1)
def dense_mask(layout: SegmentLayout, device: torch.device) -> Tensor:
    """The mask that stock code passes."""
    return layout.mask(device)


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout) -> Tensor:
    """One call with a dense mask, on whatever backend PyTorch picks."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(layout, q.device))


def block_mask_of(layout: SegmentLayout, queries: tuple[str, ...], device: torch.device) -> Any:
    """FlexAttention's plan for the rows of some segments over all keys."""
    from torch.nn.attention.flex_attention import create_block_mask

    index = [layout.index(name) for name in queries]
    rows = torch.repeat_interleave(torch.tensor(index), torch.tensor([layout.lengths[i] for i in index])).to(device)
    keys = torch.repeat_interleave(torch.arange(layout.num_segments), torch.tensor(layout.lengths)).to(device)
    visible = torch.tensor([[layout.visible(a, b) for b in layout.names] for a in layout.names], device=device)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return visible[rows[i], keys[j]]

    return create_block_mask(mask_mod, None, None, len(rows), len(keys), device=device)


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    """FlexAttention under torch.compile, with graphs that `gradient_run` may run backward more than once."""
    from torch._functorch import config
    from torch.nn.attention.flex_attention import flex_attention

    config.donated_buffer = False
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
