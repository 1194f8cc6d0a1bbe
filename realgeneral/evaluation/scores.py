"""What a protocol measures: values per picture, and a Fréchet distance of the whole set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from realgeneral.errors import UsageError
from realgeneral.evaluation.cases import Case
from realgeneral.evaluation.encoders import ClipEncoder, ImageEncoder, to_uint8
from realgeneral.evaluation.metrics import Score, bootstrap, depth_mse, edge_f1, ssim
from realgeneral.pictures import load_picture
from realgeneral.settings.evaluate import EvaluateConfig
from realgeneral.tasks import Canny, Depth, Task

Encode = Callable[[list[Image.Image]], Tensor]


class Scorer(Protocol):
    """Collects batches of one method's pictures; a fresh one for each method."""

    def update(self, cases: Sequence[Case], results: list[Image.Image], pictures: list[Image.Image]) -> None:
        """Take a batch: results, and the pictures that their conditions were made from."""

    def values(self) -> dict[str, Tensor]:
        """Values by metric, one per case."""

    def whole(self) -> dict[str, Score]:
        """Metrics that only the whole set has."""


def summary(scorer: Scorer, groups: list[str]) -> dict[str, Score]:
    """Metrics of the whole set, then the means with their intervals over groups."""
    return {**scorer.whole(), **{name: bootstrap(values, groups) for name, values in scorer.values().items()}}


@dataclass(frozen=True)
class SubjectEncoders:
    """Encoders of the customization protocol; either may be left out, and its metrics with it."""

    clip: ClipEncoder | None
    dino: ImageEncoder | None

    @classmethod
    def load(cls, config: EvaluateConfig, device: torch.device) -> SubjectEncoders:
        """Load what the settings name; UsageError if they name none."""
        if not config.clip and not config.dino:
            raise UsageError("--clip or --dino must name an encoder for the customization protocol, got neither")
        return cls(
            ClipEncoder(config.clip, device) if config.clip else None,
            ImageEncoder(config.dino, device, "dino") if config.dino else None,
        )


class SubjectScorer:
    """CLIP-I, DINO, CLIP-T of DreamBooth (arXiv 2208.12242, section 4.1).

    CLIP-I, DINO: cosine of a generated picture and a real one of its subject, mean over all real ones; and over the condition
    alone, which published zero-shot tables do not tell apart. CLIP-T: cosine of picture and prompt.
    """

    def __init__(self, encoders: SubjectEncoders) -> None:
        self.encoders = encoders
        self._references: dict[tuple[str, Path], Tensor] = {}
        self._values: dict[str, list[float]] = {}

    def update(self, cases: Sequence[Case], results: list[Image.Image], pictures: list[Image.Image]) -> None:
        """Take a batch; the real pictures are read from the cases, unscaled."""
        clip, dino = self.encoders.clip, self.encoders.dino
        if clip is not None:
            features = clip.images(results)
            self._similarities("CLIP-I", clip.label, cases, features, clip.images)
            cosine = (features * clip.texts([case.prompt for case in cases])).sum(1)
            self._add(f"CLIP-T ({clip.label})", cosine)
        if dino is not None:
            self._similarities("DINO", dino.label, cases, _unit(dino.encode(results)), lambda x: _unit(dino.encode(x)))

    def values(self) -> dict[str, Tensor]:
        """Values by metric, one per case."""
        return {name: torch.tensor(values) for name, values in self._values.items()}

    def whole(self) -> dict[str, Score]:
        """None."""
        return {}

    def _similarities(self, metric: str, label: str, cases: Sequence[Case], features: Tensor, encode: Encode) -> None:
        every, first = [], []
        for case, feature in zip(cases, features, strict=True):
            cosines = torch.stack([self._reference(metric, path, encode) for path in case.references]) @ feature
            every.append(cosines.mean())
            first.append(cosines[0])
        self._add(f"{metric} ({label})", torch.stack(every))
        self._add(f"{metric} to the condition ({label})", torch.stack(first))

    def _reference(self, metric: str, path: Path, encode: Encode) -> Tensor:
        if (metric, path) not in self._references:
            self._references[metric, path] = encode([load_picture(path)])[0]
        return self._references[metric, path]

    def _add(self, name: str, values: Tensor) -> None:
        self._values.setdefault(name, []).extend(values.tolist())


class SpatialScorer:
    """FID and SSIM against the true pictures, and how well the condition is met: F1 of edges, or MSE of depth.

    Args:
        task: Canny, whose thresholds the edges are found with, or Depth, whose model measures depth.
        distance: Name and metric from `frechet_distance`, which starts anew here; None leaves it out.
    """

    def __init__(self, task: Task, distance: tuple[str, FrechetInceptionDistance] | None) -> None:
        self.task, self.distance = task, distance
        if distance is not None:
            distance[1].reset()
        self._values: dict[str, list[float]] = {}
        self._count = 0

    def update(self, cases: Sequence[Case], results: list[Image.Image], pictures: list[Image.Image]) -> None:
        """Take a batch of results and the true pictures of the same size."""
        made, truth = to_uint8(results), to_uint8(pictures)
        self._count += len(results)
        if self.distance is not None:
            metric = self.distance[1]
            metric.update(truth.to(metric.device), real=True)
            metric.update(made.to(metric.device), real=False)
        images, wanted = made.float() / 255, truth.float() / 255
        self._add("SSIM", ssim(images, wanted))
        if isinstance(self.task, Canny):
            for name, tolerance in (("edge F1, exact", 0), ("edge F1, 1 px", 1)):
                self._add(name, edge_f1(images, wanted, self.task.low, self.task.high, tolerance))
        if isinstance(self.task, Depth):
            self._add("depth MSE", depth_mse(results, pictures, self.task.depth))

    def values(self) -> dict[str, Tensor]:
        """Values by metric, one per case."""
        return {name: torch.tensor(values) for name, values in self._values.items()}

    def whole(self) -> dict[str, Score]:
        """The Fréchet distance; nothing for fewer than two pictures, which have no covariance."""
        if self.distance is None or self._count < 2:
            return {}
        name, metric = self.distance
        return {name: Score(metric.compute().item())}

    def _add(self, name: str, values: Tensor) -> None:
        self._values.setdefault(name, []).extend(values.tolist())


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=1)
