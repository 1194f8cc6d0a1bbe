"""Settings of `evaluate`, and which of them a protocol has."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from realgeneral.errors import UsageError
from realgeneral.settings.data import COLUMNS_HELP, OUTSIDE_HELP
from realgeneral.settings.options import TRUNCATE_HELP, Settings, check_at_least_one, given, option
from realgeneral.settings.sampling import GUIDANCE, GUIDANCE_HELP, IMAGE_GUIDANCE, IMAGE_GUIDANCE_HELP, STEPS_HELP

_SPATIAL = ("canny", "depth")
_FOLDERS = ("customization", *_SPATIAL)
# options of evaluate without effect in other protocols
ONLY_FOR = {
    **dict.fromkeys(("tasks", "concepts", "split"), ("nano",)),
    **dict.fromkeys("data images_per_prompt limit truncate_prompts height width dtype offload".split(), _FOLDERS),
    **dict.fromkeys(("columns", "allow_outside", "fid_features"), _SPATIAL),
    **dict.fromkeys(("clip", "dino"), ("customization",)),
    "depth_model": ("depth",),
}


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """Scores of an adapter: the table of nano, or one of the paper's protocols on a folder (docs/evaluation.md)."""

    protocol: Literal["nano", "customization", "canny", "depth"] = option("protocol to run", "nano", group="what is scored")
    adapter: str = option('adapter folder, or "nano"', "nano")
    base: str = option('CogVideoX checkpoint (folder or hub id), or "nano"', "nano")
    output: str = option(
        "folder for tables and pictures; a continued run keeps the pictures of its protocol", "outputs/evaluate"
    )
    tasks: list[str] = option("nano: task names; default: all of the adapter's", many=())
    concepts: int = option("nano: concepts per task", 150)
    split: Literal["held_out", "train"] = option(
        "nano: split of the concepts; choose settings on train, report held_out", "held_out"
    )
    data: str = option(
        "DreamBench-shaped folder (customization), COCO-shaped folder or training data (canny, depth)",
        "",
        group="data and encoders of a protocol",
    )
    columns: list[str] = option(f"canny, depth: as in training, {COLUMNS_HELP}", many=())
    allow_outside: bool = option(f"canny, depth: {OUTSIDE_HELP}", False)
    clip: str = option("customization: CLIP model (folder or hub id) of CLIP-I and CLIP-T", "")
    dino: str = option("customization: image model (folder or hub id) of the DINO score", "")
    depth_model: str = option("depth: transformers depth model (folder or hub id) of the condition and of the MSE", "")
    fid_features: str = option(
        'canny, depth: "inception", its .pth file, "efficientnet-lite0", an image model (folder or hub id), or "none"',
        "inception",
    )
    images_per_prompt: int = option("number of pictures per case of a protocol", 1)
    limit: int = option("number of pictures of a protocol, chosen at random once; 0: all", 0)
    truncate_prompts: bool = option(f"protocols: {TRUNCATE_HELP}", False)
    height: int = option("height in pixels of a protocol's pictures; 0: the base's own", 0)
    width: int = option("width in pixels; 0: the base's own", 0)
    steps: int | None = option(STEPS_HELP, group="sampling")
    guidance_scale: float | None = option(f"{GUIDANCE_HELP}; {GUIDANCE} for other bases")
    image_guidance_scale: float | None = option(f"{IMAGE_GUIDANCE_HELP}; {IMAGE_GUIDANCE} for other bases")
    batch_size: int = option("number of images per batch", 25)
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "dtype of the models of a protocol", "float32", group="memory and speed"
    )
    offload: bool = option("keep on the GPU only the model that runs (protocols)", False)
    seed: int = option("random seed", 0, group="run")
    debug: bool = option("show the traceback of an error", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.adapter:
            raise UsageError(f'adapter must be a folder or "nano", got {self.adapter!r}')
        check_at_least_one(self, "concepts", "steps", "batch_size", "images_per_prompt", "image_guidance_scale")
        if self.limit < 0:
            raise UsageError(f"limit must not be negative, got {self.limit}")
        for item in fields(self):
            protocols = ONLY_FOR.get(item.name, (self.protocol,))
            if self.protocol not in protocols and given(self, item):
                option = f"--{item.name.replace('_', '-')}"
                raise UsageError(f"{option} must come with --protocol {' or '.join(protocols)}, got --protocol {self.protocol}")
