"""The recipe of the nano base: how its transformer starts."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import apply_rotary_emb

from realgeneral.nano.base import make_transformer, rotary

TOKENS = 64


def test_a_head_of_each_block_starts_looking_back() -> None:
    """Nearly all that a token of the second frame gets in head 0 comes from its own place in the first; other heads spread."""
    torch.manual_seed(0)
    x = torch.randn(4, 2 * TOKENS, 256)
    place = torch.arange(TOKENS)
    for block in make_transformer(2).transformer_blocks:
        attn = block.attn1
        q, k = (
            norm(linear(x).unflatten(-1, (4, 64)).transpose(1, 2))
            for linear, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k))
        )
        q, k = (apply_rotary_emb(t, rotary(2)) for t in (q, k))
        weights = (q @ k.transpose(-1, -2) / 8).softmax(-1)
        back = weights[:, :, TOKENS + place, place].mean((0, 2))
        assert back[0] > 0.9
        assert (back[1:] < 0.1).all()
        # and the patterns are no content: projections still differ from token to token
        assert attn.to_q(x)[..., :64].std(1).min() > 0
