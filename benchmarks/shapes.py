"""Named shapes: every benchmark takes its sizes from here, so that a name means the same everywhere.

A sequence is 226 text tokens, then the target's tokens, then those of each condition; an image of h x w pixels has
(h / 16) x (w / 16) tokens (the VAE divides by 8, the patch by 2). S = 2926 is one condition at 480x720, S = 8418 at 1024x1024.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rgkernels import SegmentLayout


@dataclass(frozen=True)
class Shape:
    """One workload.

    Args:
        name: How results refer to it.
        heads: Attention heads.
        head_dim: Size of one head; channels are heads x head_dim.
        text: Text tokens.
        image: Tokens of the target.
        conditions: Condition images, each of the target's size.
        batch: Samples.
        blocked: Whether text and condition do not see each other (RealGeneral), else everything sees everything.
    """

    name: str
    heads: int
    head_dim: int
    text: int
    image: int
    conditions: int = 1
    batch: int = 1
    blocked: bool = True

    @property
    def channels(self) -> int:
        """Hidden size."""
        return self.heads * self.head_dim

    @property
    def layout(self) -> SegmentLayout:
        """text, target, and one segment per condition."""
        names = [f"condition{i}" for i in range(self.conditions)]
        pairs = [(a, b) for name in names for a, b in (("text", name), (name, "text"))] if self.blocked else []
        lengths = {"text": self.text, "target": self.image, **dict.fromkeys(names, self.image)}
        return SegmentLayout.of(blocked=pairs, **lengths)

    @property
    def seq_len(self) -> int:
        """S: tokens of the joint sequence."""
        return self.layout.seq_len


_MODELS = {"2b": 30, "5b": 48, "1.5-5b": 48}  # heads of 64
_IMAGES = {"480x720": 30 * 45, "512x512": 32 * 32, "768x1360": 48 * 85, "1024x1024": 64 * 64}

SHAPES = {
    shape.name: shape
    for shape in [
        Shape("nano", heads=4, head_dim=64, text=16, image=64),
        *(
            Shape(f"{model}-{size}-b{batch}", heads, 64, 226, image, batch=batch)
            for model, heads in _MODELS.items()
            for size, image in _IMAGES.items()
            for batch in (1, 4)
        ),
        Shape("5b-480x720-3conditions-b1", 48, 64, 226, _IMAGES["480x720"], conditions=3),
        # a 13-frame clip after a clip of the same length: the longest masked sequence
        Shape("5b-video-condition-b1", 48, 64, 226, 13 * _IMAGES["480x720"]),
        # stock CogVideoX, 49 frames: 13 latent frames in one segment, nothing blocked
        Shape("2b-video-b1", 30, 64, 226, 13 * _IMAGES["480x720"], conditions=0, blocked=False),
        Shape("5b-video-b1", 48, 64, 226, 13 * _IMAGES["480x720"], conditions=0, blocked=False),
    ]
}

# the acceptance sizes of the norm-site and query-key kernels: S = 2926 and 8418, C = 1920 and 3072, batch 1 and 4
ACCEPTANCE = [f"{model}-{size}-b{batch}" for size in ("480x720", "1024x1024") for model in ("2b", "5b") for batch in (1, 4)]
CPU = ["nano"]


def default_names(device: torch.device) -> list[str]:
    """What a benchmark runs where: the acceptance sizes on CUDA, the smallest shape elsewhere."""
    return ACCEPTANCE if device.type == "cuda" else CPU
