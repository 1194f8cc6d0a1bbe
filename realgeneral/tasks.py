"""The tasks: how a (condition, target) pair is made from a picture, or that the user supplies the condition.

Adding a task is one small frozen dataclass with a `name` under `@register`; its fields are options that a spec can set, as in
"deblurring:radius=2". Pictures are PIL RGB images; every draw comes from the seed that is passed in.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch.utils.data import get_worker_info

from realgeneral.errors import UsageError

# OpenCV's thread pool does not survive a fork: Canny in a data loader's worker could wait for ever for threads of its parent
cv2.setNumThreads(0)

TASKS: dict[str, type[Task]] = {}


@dataclass(frozen=True)
class Task:
    """A task that needs the user's condition image; tasks that derive it override `condition`."""

    name: ClassVar[str]
    derives: ClassVar[bool] = False
    # whether another picture of the same subject can be the condition
    of_subject: ClassVar[bool] = False
    # whether the images depend on the seed; False lets `realgeneral precompute` keep one instead of several draws
    seeded: ClassVar[bool] = True

    def condition(self, picture: Image.Image, seed: int) -> Image.Image:
        """The condition image of a picture."""
        raise ValueError(f"task {self.name!r} needs a condition image for each target, got none")

    def target(self, picture: Image.Image, seed: int) -> Image.Image:
        """The image to be made; the picture itself but for analysis tasks."""
        return picture

    def odd(self, condition: Image.Image) -> str:
        """What is wrong with a condition image that somebody made otherwise, in a sentence; empty if nothing shows."""
        return ""

    @property
    def spec(self) -> str:
        """The task and its non-default options as a string that `get_task` reads."""
        options = ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default)
        return f"{self.name}:{options}" if options else self.name


def register(cls: type[Task]) -> type[Task]:
    """Class decorator: make a task known by its name."""
    TASKS[cls.name] = cls
    return cls


_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def get_task(spec: str) -> Task:
    """Build a task from "name" or "name:option=value,...".

    Raises:
        ValueError: Unknown task or option, or a value of the wrong type or out of range.
    """
    name, _, rest = spec.partition(":")
    if name not in TASKS:
        raise ValueError(f"task must be one of {sorted(TASKS)}, got {name!r}")
    known = {f.name: f for f in fields(TASKS[name])}
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in known:
            raise ValueError(f"option of task {name!r} must be one of {sorted(known)}, got {key!r}")
        kind: Any = type(known[key].default)
        try:
            options[key] = _BOOLEANS[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise ValueError(f"option {key} of task {name!r} must be of type {kind.__name__}, got {value!r}") from None
    return TASKS[name](**options)


@register
@dataclass(frozen=True)
class Customization(Task):
    """Subject-driven generation: the condition shows the subject, the prompt says what to do with it."""

    name = "customization"
    of_subject = True


@register
@dataclass(frozen=True)
class Canny(Task):
    """Edges (white on black) to image; OpenCV's Canny with the paper's peers' thresholds."""

    name = "canny"
    derives = True
    seeded = False
    low: int = 100
    high: int = 200

    def condition(self, picture: Image.Image, seed: int) -> Image.Image:
        """White edges on black."""
        edges = cv2.Canny(np.asarray(picture.convert("RGB")), self.low, self.high)
        return Image.fromarray(edges).convert("RGB")

    def odd(self, condition: Image.Image) -> str:
        """Edges are white lines on black: few tones between, and more black than white."""
        grey = np.asarray(condition.convert("L"))
        between, white = ((grey > 64) & (grey < 192)).mean(), (grey >= 192).mean()
        if between > 0.25:
            return f"a condition of canny must be white edges on black, got {between:.0%} of tones between: a photograph?"
        if white > 0.6:
            return f"a condition of canny must be white edges on black, got {white:.0%} of white: black on white?"
        return ""


@dataclass(frozen=True)
class DepthTask(Task):
    """Shared by both depth directions: a transformers depth-estimation pipeline that the user names."""

    seeded = False
    model: str = ""

    @property
    def derives(self) -> bool:  # type: ignore[override]
        """Whether a model is named; without one the user supplies the depth map."""
        return bool(self.model)

    def depth(self, picture: Image.Image) -> Image.Image:
        """Depth map as a grey RGB image, near = bright, of the picture's size."""
        if not self.model:
            raise ValueError(
                f"task {self.name!r} needs a depth model or a supplied image, as in '{self.name}:model=HUB_ID_OR_FOLDER'"
            )
        return _depth_estimator(self.model, estimator_device())(picture)["depth"].convert("RGB").resize(picture.size)


@register
@dataclass(frozen=True)
class Depth(DepthTask):
    """Depth map to image."""

    name = "depth"

    def condition(self, picture: Image.Image, seed: int) -> Image.Image:
        """The picture's depth map."""
        return self.depth(picture)


@register
@dataclass(frozen=True)
class ImageToDepth(DepthTask):
    """Image to depth map."""

    name = "image-to-depth"

    def condition(self, picture: Image.Image, seed: int) -> Image.Image:
        """The picture itself."""
        return picture

    def target(self, picture: Image.Image, seed: int) -> Image.Image:
        """The picture's depth map."""
        return self.depth(picture)


@register
@dataclass(frozen=True)
class Inpainting(Task):
    """Fill a black rectangle (or, half of the time, everything but it), as in OminiControl's recipe."""

    name = "inpainting"
    derives = True

    def condition(self, picture: Image.Image, seed: int) -> Image.Image:
        """The picture with a random rectangle or its complement in black."""
        rng = random.Random(seed)
        width, height = picture.size
        w, h = (int(size * rng.uniform(0.35, 0.65)) for size in (width, height))
        x, y = rng.randint(0, width - w), rng.randint(0, height - h)
        mask = Image.new("L", picture.size, 0)
        ImageDraw.Draw(mask).rectangle((x, y, x + w, y + h), fill=255)
        if rng.random() < 0.5:
            mask = ImageOps.invert(mask)
        return mask_out(picture, mask)


@register
@dataclass(frozen=True)
class Colouring(Task):
    """Grey picture to colour."""

    name = "colouring"
    derives = True
    seeded = False

    def condition(self, picture: Image.Image, seed: int) -> Image.Image:
        """Luma, repeated over the channels."""
        return picture.convert("L").convert("RGB")


@register
@dataclass(frozen=True)
class Deblurring(Task):
    """Blurred picture to sharp.

    Args:
        radius: Gaussian blur radius in pixels at a short side of 512; it scales with the picture.
    """

    name = "deblurring"
    derives = True
    seeded = False
    radius: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.radius < math.inf:
            raise ValueError(f"radius of task 'deblurring' must be a number of pixels from 0, got {self.radius}")
        if self.radius > 512:  # Pillow crashes far beyond it
            raise ValueError(f"radius of task 'deblurring' must be at most the short side's 512 pixels, got {self.radius}")

    def condition(self, picture: Image.Image, seed: int) -> Image.Image:
        """Gaussian blur."""
        return picture.filter(ImageFilter.GaussianBlur(self.radius * min(picture.size) / 512))


@register
@dataclass(frozen=True)
class ImageToSketch(Task):
    """Image to line drawing (black edges on white); the nano model's stand-in for image-to-depth."""

    name = "image-to-sketch"
    derives = True
    seeded = False
    low: int = 100
    high: int = 200

    def condition(self, picture: Image.Image, seed: int) -> Image.Image:
        """The picture itself."""
        return picture

    def target(self, picture: Image.Image, seed: int) -> Image.Image:
        """Black edges on white."""
        return ImageOps.invert(Canny(self.low, self.high).condition(picture, seed))


DEFAULT_TASKS = ("customization", "canny", "depth", "inpainting", "colouring", "deblurring", "image-to-depth")


def mask_out(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """Paint the white part of a mask black: the condition of inpainting."""
    if mask.size != picture.size:
        raise ValueError(f"mask must have the picture's size {picture.size}, got {mask.size}")
    return Image.composite(Image.new("RGB", picture.size), picture.convert("RGB"), mask.convert("L"))


def estimator_device() -> torch.device:
    """Where this process runs depth models: on its own GPU, in a data-loading process on the CPU.

    A worker that was forked cannot use CUDA once its parent has.
    """
    if get_worker_info() is not None or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@cache
def depth_revision(model: str) -> str | None:
    """The commit of a depth model on the hub, as cached here or, with a network, as the newest; None for a folder.

    Raises:
        UsageError: It can be neither reached nor found in the cache, or the folder is not one of a model.
    """
    if Path(model).is_dir():
        from transformers import AutoConfig

        try:
            AutoConfig.from_pretrained(model)
        except (OSError, ValueError) as error:
            told = " ".join(str(error).split())
            raise UsageError(f"depth model must be the folder of a model, got {model}: {told}") from None
        return None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json")).parent.name
    except (OSError, ValueError) as error:  # its own errors derive from these
        told = " ".join(str(error).split())
        raise UsageError(f"depth model must be a folder or a hub id that can be had, got {model}: {told}") from None


@cache
def _depth_estimator(model: str, device: torch.device) -> Any:
    from transformers import pipeline

    # of the very commit that keys of stored pictures name
    return pipeline("depth-estimation", model=model, revision=depth_revision(model), device=device)
