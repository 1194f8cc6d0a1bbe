"""Generated pictures are kept by what made them."""

from __future__ import annotations

import torch

from realgeneral import RealGeneralPipeline
from realgeneral.evaluation.generator import weights_fingerprint


def test_fingerprint() -> None:
    """Any network's weights, the adapter's too, make another fingerprint; reading it twice does not."""
    pipe = RealGeneralPipeline.from_pretrained("nano", adapter="nano")
    seen = {weights_fingerprint(pipe)}
    assert weights_fingerprint(pipe) in seen
    for network in (pipe.transformer.condition_embedding, pipe.transformer, pipe.vae, pipe.text_encoder):
        with torch.no_grad():
            next(network.parameters()).view(-1)[0] += 1
        fingerprint = weights_fingerprint(pipe)
        assert fingerprint not in seen
        seen.add(fingerprint)
