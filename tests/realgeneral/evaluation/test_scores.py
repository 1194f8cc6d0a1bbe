"""What a protocol measures, on pictures whose scores are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from realgeneral.evaluation.cases import Case
from realgeneral.evaluation.encoders import ClipEncoder, ImageEncoder
from realgeneral.evaluation.metrics import frechet_distance
from realgeneral.evaluation.scores import SpatialScorer, SubjectEncoders, SubjectScorer, summary
from realgeneral.tasks import get_task
from tests.realgeneral.helpers.pictures import make_photo

CPU = torch.device("cpu")


def test_spatial_scores_of_known_pictures(encoders: Path) -> None:
    """The truth itself: distance 0, SSIM 1, F1 1; another method starts from nothing."""
    photos = [make_photo(64, 64, i) for i in range(4)]
    cases = [Case(str(i), "", make_photo, str(i)) for i in range(4)]
    distance = frechet_distance(str(encoders / "dino"), CPU)
    worse = SpatialScorer(get_task("canny"), distance)
    worse.update(cases, [Image.new("RGB", (64, 64))] * 4, photos)
    bad = summary(worse, ["0", "1", "2", "3"])
    same = SpatialScorer(get_task("canny"), distance)
    for i in (0, 2):
        same.update(cases[i : i + 2], photos[i : i + 2], photos[i : i + 2])
    good = summary(same, ["0", "1", "2", "3"])
    name = distance[0]
    assert abs(good[name].mean) < 1e-3 * bad[name].mean
    assert good["SSIM"].mean == pytest.approx(1, abs=1e-4)
    assert good["edge F1, exact"].mean == 1
    assert bad["edge F1, 1 px"].mean == 0


def test_subject_scores_of_known_pictures(encoders: Path, tmp_path: Path) -> None:
    """Mean cosine over all references, cosine with the first, cosine with the prompt: the encoders' own numbers."""
    photos = [make_photo(40, 40, i) for i in range(3)]
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for photo, path in zip(photos, paths, strict=True):
        photo.save(path)
    clip, dino = ClipEncoder(str(encoders / "clip"), CPU), ImageEncoder(str(encoders / "dino"), CPU, "dino")
    scorer = SubjectScorer(SubjectEncoders(clip, dino))
    case = Case("a", "a cat", make_photo, "a", "cat", tuple(paths))
    scorer.update([case], [photos[1]], [photos[0]])
    values = {name: x.item() for name, x in scorer.values().items()}
    cosines = clip.images(photos) @ clip.images([photos[1]])[0]
    assert values["CLIP-I (clip)"] == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert values["CLIP-I to the condition (clip)"] == pytest.approx(cosines[0].item(), abs=1e-5)
    assert values["CLIP-T (clip)"] == pytest.approx((clip.texts(["a cat"])[0] @ clip.images([photos[1]])[0]).item(), abs=1e-5)
    features = torch.nn.functional.normalize(dino.encode(photos), dim=1)
    assert values["DINO (dino)"] == pytest.approx((features @ features[1]).mean().item(), abs=1e-5)
