"""Named shapes: every benchmark takes its sizes from here, so that a name means the same everywhere.

A sequence is 226 text tokens, then the target's tokens, then those of each condition; an image of h x w pixels has
(h / 16) x (w / 16) tokens (the VAE divides by 8, the patch by 2). S = 2926 is one condition at 480x720, S = 8418 at 1024x1024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
        grid: Tokens per column and row of one image; None where the target is no single image.
    """

    name: str
    heads: int
    head_dim: int
    text: int
    image: int
    conditions: int = 1
    batch: int = 1
    blocked: bool = True
    grid: tuple[int, int] | None = None

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
_IMAGES = {"480x720": (30, 45), "512x512": (32, 32), "768x1360": (48, 85), "1024x1024": (64, 64)}
_CLIP = 13 * 30 * 45  # 49 frames of 480x720: 13 latent frames

SHAPES = {
    shape.name: shape
    for shape in [
        Shape("nano", heads=4, head_dim=64, text=16, image=64, grid=(8, 8)),
        # the largest model whose generation a CPU can repeat in seconds
        Shape("mid", heads=6, head_dim=64, text=32, image=256, grid=(16, 16)),
        *(
            Shape(f"{model}-{size}-b{batch}", heads, 64, 226, math.prod(grid), batch=batch, grid=grid)
            for model, heads in _MODELS.items()
            for size, grid in _IMAGES.items()
            for batch in (1, 4)
        ),
        Shape("5b-480x720-3conditions-b1", 48, 64, 226, 30 * 45, conditions=3, grid=(30, 45)),
        # a 13-frame clip after a clip of the same length: the longest masked sequence
        Shape("5b-video-condition-b1", 48, 64, 226, _CLIP),
        # stock CogVideoX: one segment beside the text, nothing blocked
        Shape("nano-video", heads=4, head_dim=64, text=16, image=4 * 64, conditions=0, blocked=False),
        Shape("2b-video-b1", 30, 64, 226, _CLIP, conditions=0, blocked=False),
        Shape("5b-video-b1", 48, 64, 226, _CLIP, conditions=0, blocked=False),
    ]
}

# the acceptance sizes of the norm-site and query-key kernels: S = 2926 and 8418, C = 1920 and 3072, batch 1 and 4;
# those that matter most come first, because a run may be cut off
ACCEPTANCE = [f"{model}-{size}-b{batch}" for batch in (1, 4) for model in ("5b", "2b") for size in ("480x720", "1024x1024")]
OPS = {"cuda": ACCEPTANCE, "cpu": ["nano"]}
ATTENTION = {"cuda": [*ACCEPTANCE, "5b-video-condition-b1"], "cpu": ["nano"]}
MODELS = {"cuda": ["5b-480x720-b1", "5b-1024x1024-b1"], "cpu": ["nano", "mid"]}
STOCK = {"cuda": ["5b-video-b1"], "cpu": ["nano-video"]}
