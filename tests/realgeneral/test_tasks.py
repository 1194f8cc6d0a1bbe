"""The tasks: what each makes of a picture, specs, and how small a new one is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset

from realgeneral import tasks
from realgeneral.tasks import DEFAULT_TASKS, TASKS, Task, get_task, mask_out, register


@pytest.fixture
def _clean_registry() -> Iterator[None]:
    before = dict(TASKS)
    yield
    TASKS.clear()
    TASKS.update(before)


@pytest.fixture
def estimator(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A depth-estimation pipeline that answers with a ramp; the models that were asked for."""
    asked: list[str] = []

    def pipeline(kind: str, model: str, revision: str | None, device: torch.device) -> Any:
        assert kind == "depth-estimation"
        asked.append(f"{model} {revision}")
        ramp = np.linspace(0, 255, 10, dtype=np.uint8)[None].repeat(5, 0)
        return lambda picture: {"depth": Image.fromarray(ramp)}

    monkeypatch.setattr("transformers.pipeline", pipeline)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: f"/cache/{name}/snapshots/c0ffee/{file}")
    for cached in (tasks._depth_estimator, tasks.depth_revision):
        cached.cache_clear()
    yield asked
    for cached in (tasks._depth_estimator, tasks.depth_revision):
        cached.cache_clear()


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("name", [n for n in TASKS if "depth" not in n and n != "customization"])
def test_conditions_are_rgb_of_the_same_size_and_repeatable(name: str, photo: Image.Image) -> None:
    """A derived condition is RGB, of the target's size, the same for the same seed, and leaves the picture as it is."""
    before = photo.tobytes()
    task = get_task(name)
    assert task.derives
    one, two = task.condition(photo, 3), task.condition(photo, 3)
    assert (one.mode, one.size) == ("RGB", photo.size)
    assert one.tobytes() == two.tobytes()
    assert task.target(photo, 3).size == photo.size
    assert photo.tobytes() == before


def test_canny_is_opencv(photo: Image.Image) -> None:
    """White edges on black, OpenCV's with thresholds 100 and 200."""
    got = pixels(get_task("canny").condition(photo, 0))
    wanted = cv2.Canny(np.asarray(photo), 100, 200)
    assert np.array_equal(got, wanted[..., None].repeat(3, 2))
    assert set(np.unique(got)) == {0, 255}
    assert wanted.any()


def test_colouring_is_luma(photo: Image.Image) -> None:
    """Three equal channels, the luma; the target keeps its colours."""
    got = pixels(get_task("colouring").condition(photo, 0))
    assert (got == got[..., :1]).all()
    assert np.array_equal(got[..., 0], pixels(photo.convert("L")))
    assert get_task("colouring").target(photo, 0).tobytes() == photo.tobytes()


@pytest.mark.parametrize("size", [(96, 64), (512, 512)])
def test_blur_scales_with_the_picture(size: tuple[int, int]) -> None:
    """The radius is given at a short side of 512, so that the same blur looks alike at every size."""
    picture = Image.new("RGB", size)
    picture.paste("white", (0, 0, size[0] // 2, size[1]))
    got = get_task("deblurring:radius=16").condition(picture, 0)
    wanted = picture.filter(ImageFilter.GaussianBlur(16 * min(size) / 512))
    assert got.tobytes() == wanted.tobytes()
    assert got.tobytes() != picture.tobytes()


def test_inpainting_blacks_out_a_rectangle_or_the_rest(photo: Image.Image) -> None:
    """Every pixel is the picture's or black; both kinds of mask occur, and no mask is empty or full."""
    bright = photo.point(lambda value: max(value, 1))
    shares = []
    for seed in range(40):
        got, kept = pixels(get_task("inpainting").condition(bright, seed)), pixels(bright)
        black = (got == 0).all(-1)
        assert np.array_equal(got[~black], kept[~black])
        shares.append(black.mean())
        corners = black[0, 0], black[-1, -1]
        rows = np.flatnonzero(black.any(1) if not all(corners) else (~black).any(1))
        assert len(rows) == rows[-1] - rows[0] + 1
    assert min(shares) > 0.05
    assert max(shares) < 0.95
    assert {share > 0.6 for share in shares} == {True, False}


def test_sketch_is_canny_inverted(photo: Image.Image) -> None:
    """image-to-sketch: the condition is the picture, the target black edges on white."""
    task = get_task("image-to-sketch")
    assert task.condition(photo, 0).tobytes() == photo.tobytes()
    assert np.array_equal(255 - pixels(task.target(photo, 0)), pixels(get_task("canny").condition(photo, 0)))


def test_depth_goes_through_the_named_model(photo: Image.Image, estimator: list[str]) -> None:
    """depth and image-to-depth ask a transformers pipeline once per model, and resize its answer to the picture."""
    depth, back = get_task("depth:model=some/model"), get_task("image-to-depth:model=some/model")
    made = depth.condition(photo, 0)
    assert (made.size, made.mode) == (photo.size, "RGB")
    assert pixels(made)[5, 3, 0] < pixels(made)[5, 90, 0]
    assert back.condition(photo, 0).tobytes() == photo.tobytes()
    assert back.target(photo, 0).tobytes() == made.tobytes()
    assert depth.derives
    assert estimator == ["some/model c0ffee"]


class _Devices(Dataset[str]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> str:
        return str(tasks.estimator_device())


def test_where_depth_models_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the GPU of the process, never on the first one by default; on the CPU in a data loader's process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert [next(iter(DataLoader(_Devices(), None, num_workers=n))) for n in (0, 1)] == ["cuda:3", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _Devices()[0] == "cpu"


@pytest.mark.parametrize("name", ["depth", "image-to-depth"])
def test_depth_without_a_model(name: str, photo: Image.Image) -> None:
    """Without a model the user supplies the map; the error says how to name one."""
    task = get_task(name)
    assert not task.derives
    with pytest.raises(ValueError, match=f"'{name}:model=HUB_ID_OR_FOLDER'"):
        task.depth(photo)  # type: ignore[attr-defined]


def test_customization_needs_the_users_image(photo: Image.Image) -> None:
    """A subject task has no condition of its own."""
    with pytest.raises(ValueError, match="task 'customization' needs a condition image for each target, got none"):
        get_task("customization").condition(photo, 0)


@pytest.mark.parametrize(
    ("spec", "normal"),
    [
        ("canny", "canny"),
        ("canny:", "canny"),
        ("canny:low=100", "canny"),
        ("canny:low=50,high=90", "canny:low=50,high=90"),
        ("deblurring:radius=16", "deblurring:radius=16.0"),
        ("depth:model=a/b-c_d.e", "depth:model=a/b-c_d.e"),
    ],
)
def test_specs_round_trip(spec: str, normal: str) -> None:
    """A spec holds the options that differ from the default, and reads back as the same task."""
    task = get_task(spec)
    assert task.spec == normal
    assert get_task(task.spec) == task


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cany", "task must be one of .*'canny'.*got 'cany'"),
        ("", "task must be one of .* got ''"),
        ("canny:lo=3", r"option of task 'canny' must be one of \['high', 'low'\], got 'lo'"),
        ("canny:low=abc", "option low of task 'canny' must be of type int, got 'abc'"),
        ("deblurring:radius=nan", "radius of task 'deblurring' must be a number of pixels from 0, got nan"),
        ("deblurring:radius=1e30", "radius of task 'deblurring' must be at most the short side's 512 pixels, got 1e"),
        ("deblurring:radius=-1", "radius of task 'deblurring' must be a number of pixels from 0, got -1.0"),
        ("canny:low", "option low of task 'canny' must be of type int, got ''"),
        ("colouring:x=1", "option of task 'colouring' must be one of"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    """The error names the task or option and what would be right."""
    with pytest.raises(ValueError, match=message):
        get_task(spec)


def test_default_tasks_are_the_papers_seven() -> None:
    """Seven tasks, all registered."""
    assert len(set(DEFAULT_TASKS)) == 7
    assert set(DEFAULT_TASKS) <= TASKS.keys()


def test_mask_out(photo: Image.Image) -> None:
    """White of the mask becomes black, the rest stays; another size is an error."""
    mask = Image.new("L", photo.size)
    mask.paste(255, (0, 0, 10, 64))
    got = pixels(mask_out(photo, mask))
    assert not got[:, :10].any()
    assert np.array_equal(got[:, 10:], pixels(photo)[:, 10:])
    with pytest.raises(ValueError, match=r"mask must have the picture's size \(96, 64\), got \(5, 5\)"):
        mask_out(photo, Image.new("L", (5, 5)))


@pytest.mark.usefixtures("_clean_registry")
def test_a_new_task_is_one_small_class(photo: Image.Image) -> None:
    """Five lines make a task with options of every kind, usable by its spec everywhere."""

    @register
    @dataclass(frozen=True)
    class Flip(Task):
        """Mirrored picture to picture."""

        name = "flip"
        derives = True
        vertical: bool = False
        note: str = ""

        def condition(self, picture: Image.Image, seed: int) -> Image.Image:
            return picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM if self.vertical else Image.Transpose.FLIP_LEFT_RIGHT)

    assert get_task("flip").condition(photo, 0).tobytes() != get_task("flip:vertical=True").condition(photo, 0).tobytes()
    for spec in ("flip", "flip:vertical=True", "flip:vertical=False,note=x"):
        assert get_task(get_task(spec).spec) == get_task(spec)
    assert get_task("flip:vertical=False") == get_task("flip")
    with pytest.raises(ValueError, match="option vertical of task 'flip' must be of type bool, got 'perhaps'"):
        get_task("flip:vertical=perhaps")
