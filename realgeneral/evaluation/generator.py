"""Resumable generation: each picture is a file that carries the settings it was made with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn
from tqdm.auto import tqdm

from realgeneral.errors import Failure
from realgeneral.evaluation.cases import Case
from realgeneral.generation.pipeline import RealGeneralPipeline
from realgeneral.pictures import fit_picture, load_picture, save_picture
from realgeneral.settings.evaluate import EvaluateConfig
from realgeneral.settings.sampling import sampling
from realgeneral.tasks import Task
from rgkernels import __version__

KEY = "realgeneral"
SAMPLES_PER_TENSOR = 256


@dataclass(frozen=True)
class CaseGenerator:
    """Makes the pictures of cases with one adapter and one sampler setting.

    Args:
        pipe: The pipeline, with its adapter.
        task: How a condition is made from a picture; a task that derives none takes the picture itself.
        config: Sampler settings.
        size: (width, height) in pixels.
        folder: Results go to FOLDER/NAME.png.
    """

    pipe: RealGeneralPipeline
    task: Task
    config: EvaluateConfig
    size: tuple[int, int]
    folder: Path

    def picture(self, case: Case) -> Image.Image:
        """The true picture, or the subject's reference, in the size of the result."""
        return fit_picture(case.picture(), *self.size)

    def condition(self, picture: Image.Image) -> Image.Image:
        """The condition image of a picture."""
        return self.task.condition(picture, self.config.seed) if self.task.derives else picture

    def path(self, case: Case) -> Path:
        """Where the result of a case is."""
        return self.folder / f"{case.name}.png"

    def result(self, case: Case) -> Image.Image:
        """A generated picture, from its file."""
        return load_picture(self.path(case))

    def run(self, cases: Sequence[Case]) -> int:
        """Generate what is not there yet; returns how many pictures were made.

        A picture is kept if its file is whole and its settings are those of this run. A batch with any picture missing is
        generated as a whole, so that a continued run gives the very pictures of an uninterrupted one.
        """
        weights, made = weights_fingerprint(self.pipe), 0
        for start in tqdm(range(0, len(cases), self.config.batch_size), desc="generating", unit="batch"):
            part = list(cases[start : start + self.config.batch_size])
            pictures = [self.picture(case) for case in part]
            settings = [self._settings(c, p, weights) for c, p in zip(part, pictures, strict=True)]
            wanted = [read_settings(self.path(c)) != s for c, s in zip(part, settings, strict=True)]
            if not any(wanted):
                continue
            results = self._generate(part, pictures)
            for case, result, setting, missing in zip(part, results, settings, wanted, strict=True):
                if missing:
                    info = PngInfo()
                    info.add_text(KEY, json.dumps(setting, sort_keys=True))
                    _save(result, self.path(case), info)
                    made += 1
        return made

    def _generate(self, cases: list[Case], pictures: list[Image.Image]) -> list[Image.Image]:
        width, height = self.size
        subjects = [case.subject for case in cases]
        steps, text, image = sampling(self.config, self.task.name)
        images: list[Image.Image] = self.pipe(
            [case.prompt for case in cases],
            [[self.condition(picture)] for picture in pictures],
            task=self.task.name,
            subject=subjects if any(subjects) else None,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=text,
            image_guidance_scale=image,
            generator=[torch.Generator().manual_seed(self._seed(case)) for case in cases],
        ).images
        return images

    def _seed(self, case: Case) -> int:
        # noise belongs to the case, not to its place in the list or in a batch
        return int.from_bytes(hashlib.sha256(f"{self.config.seed}/{case.name}".encode()).digest()[:6], "big")

    def _settings(self, case: Case, picture: Image.Image, weights: str) -> dict[str, Any]:
        """Everything that the picture depends on."""
        steps, *scales = sampling(self.config, self.task.name)
        return {
            "case": case.name,
            "prompt": case.prompt,
            "subject": case.subject,
            "picture": hashlib.sha256(picture.tobytes()).hexdigest(),
            "task": self.task.spec,
            "size": list(self.size),
            "steps": steps,
            "guidance": scales,
            "seed": self.config.seed,
            "dtype": self.config.dtype,
            "weights": weights,
            "scheduler": type(self.pipe.scheduler).__name__,
            "version": __version__,
        }


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings in a generated picture; None if there is no such file, or it is damaged, or carries none."""
    try:
        with Image.open(path) as image:
            image.load()
            settings = json.loads(image.info.get(KEY, "null"))
    except (OSError, SyntaxError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


@torch.no_grad()
def weights_fingerprint(pipe: RealGeneralPipeline) -> str:
    """SHA-256 of names, shapes and evenly spaced weights of all networks, adapter included.

    A few hundred values of every tensor are read, so that 10 GB of weights take seconds; training moves all of them.
    """
    digest = hashlib.sha256()
    networks: list[nn.Module] = [pipe.transformer, pipe.vae, pipe.text_encoder]
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            flat = tensor.detach().flatten()
            values = flat[:: max(1, flat.numel() // SAMPLES_PER_TENSOR)].to("cpu", torch.float64)
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def _save(picture: Image.Image, path: Path, info: PngInfo) -> None:
    try:
        save_picture(picture, path, pnginfo=info)
    except OSError as error:
        raise Failure(
            f"{path} could not be written: {error.strerror or error}; the same command continues after the last picture"
        ) from None
