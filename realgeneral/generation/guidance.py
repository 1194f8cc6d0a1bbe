"""Classifier-free guidance on prompt and condition: the passes of a denoising step, and what becomes of their predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from realgeneral.errors import UsageError


@dataclass(frozen=True)
class Guidance:
    """Guidance by two scales (InstructPix2Pix, arXiv 2211.09800, eq. 3).

    v = v(n, -) + s_c (v(n, c) - v(n, -)) + s_p (v(p, c) - v(n, c))

    for prompt p, negative prompt n and condition c; "-" is the empty condition of condition dropout, latents of zeros. A pass
    whose weight is 0 is not made: v(p, c) alone if both scales are 1, v(n, c) and v(p, c) if only `image` is 1, v(n, -) and
    v(p, c) if the scales are equal.

    Args:
        text: s_p; 1 or less turns guidance on the prompt off.
        image: s_c, at least 1, which turns guidance on the condition off.
    """

    text: float
    image: float = 1.0

    def __post_init__(self) -> None:
        for name, scale in (("guidance_scale", self.text), ("image_guidance_scale", self.image)):
            if isinstance(scale, bool) or not isinstance(scale, int | float):
                raise UsageError(f"{name} must be a number, got {scale!r}")
            if not math.isfinite(scale):
                raise UsageError(f"{name} must be finite, got {scale}")
        if not self.image >= 1:
            raise UsageError(f"image_guidance_scale must be at least 1, got {self.image}")
        object.__setattr__(self, "text", max(self.text, 1.0))

    @property
    def passes(self) -> tuple[tuple[bool, bool], ...]:
        """(has the prompt, has the condition) of each pass, in the order of `combine`."""
        weights = {(False, False): 1 - self.image, (False, True): self.image - self.text, (True, True): self.text}
        return tuple(given for given, weight in weights.items() if weight)

    @property
    def prompts(self) -> tuple[bool, ...]:
        """Which passes have the prompt; the others have the negative one."""
        return tuple(prompt for prompt, _ in self.passes)

    @property
    def conditions(self) -> tuple[bool, ...]:
        """Which passes have the condition; the others have none."""
        return tuple(condition for _, condition in self.passes)

    def combine(self, predictions: Tensor, dim: int) -> Tensor:
        """One prediction from those of the passes along `dim`."""
        result, *others = predictions.unbind(dim)
        scales = (self.image, self.text) if len(others) == 2 else (self.text,)
        before = result
        for scale, after in zip(scales, others, strict=False):
            result, before = result + scale * (after - before), after
        return result
