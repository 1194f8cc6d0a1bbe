"""The recipe of the nano base: how its transformer starts."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import apply_rotary_emb

from recipes.base import make_transformer, rotary
from recipes.train_base import attention_mask

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


def test_text_and_first_frame_of_a_blind_clip_do_not_meet() -> None:
    """The mask of the recipe through the stock transformer: no gradient between them after one block, and one elsewhere."""
    torch.manual_seed(0)
    model = make_transformer(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    text = torch.randn(2, 16, 256, requires_grad=True)
    latents = torch.randn(2, 2, 8, 16, 16, requires_grad=True)
    mask = attention_mask(torch.tensor([True, False]), 16, 2)
    out = model(
        latents, text, torch.tensor([300, 300]), image_rotary_emb=rotary(2), return_dict=False,
        attention_kwargs={"attention_mask": mask},
    )[0]  # fmt: skip
    (first,) = torch.autograd.grad(out[:, 0].square().sum(), text, retain_graph=True)
    (last,) = torch.autograd.grad(out[:, 1].square().sum(), text)
    assert first[0].abs().max() == 0
    assert min(first[1].abs().max(), last[0].abs().max(), last[1].abs().max()) > 0
