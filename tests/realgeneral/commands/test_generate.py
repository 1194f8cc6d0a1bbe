"""`realgeneral generate`: files, their metadata, and where the condition comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from realgeneral import RealGeneralPipeline
from realgeneral.commands.generate import derive_condition, generate
from realgeneral.model.adapter import save_adapter
from realgeneral.model.adapter_info import adapter_info
from realgeneral.pictures import fit_picture, load_picture
from realgeneral.settings.sampling import GenerateConfig
from realgeneral.tasks import get_task
from tests.realgeneral.helpers.models import trained_model
from tests.realgeneral.helpers.pictures import make_photo

SPECS = ("canny:low=20,high=60", "inpainting")


@pytest.fixture(scope="module")
def adapter(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = trained_model(bases["5b"], "cached").float()
    names = tuple(get_task(spec).name for spec in SPECS)
    model.register_to_config(tasks=names)
    save_adapter(model, folder, adapter_info(model, SPECS, "tiny"))
    return folder


@pytest.fixture
def settings(bases: dict[str, Path], adapter: Path, tmp_path: Path) -> dict[str, Any]:
    make_photo(120, 80).save(tmp_path / "photo.png")
    return {
        "prompt": "a red pot", "task": "canny", "picture": str(tmp_path / "photo.png"), "base": str(bases["5b"]),
        "adapter": str(adapter), "output": str(tmp_path / "out" / "image.png"), "height": 32, "width": 48, "steps": 2,
    }  # fmt: skip


def test_metadata_holds_the_settings(settings: dict[str, Any]) -> None:
    """The PNG's text says how it was made, without where files lie; the same settings make the same picture."""
    config = GenerateConfig(**settings, seed=7)
    (path,) = generate(config)
    assert path == Path(settings["output"])
    with Image.open(path) as image:
        image.load()
        told = json.loads(image.text["realgeneral"])
    assert told["version"]
    files = {key: Path(settings[key]).name for key in ("picture", "base", "adapter", "output")}
    assert {key: told[key] for key in settings} == {**settings, **files}
    assert "/" not in json.dumps(told)
    assert (told["seed"], told["guidance_scale"]) == (7, 6.0)
    told.pop("version")
    before = path.read_bytes()
    generate(GenerateConfig(**{**told, **settings}))
    assert path.read_bytes() == before


def test_several_images(settings: dict[str, Any], tmp_path: Path) -> None:
    """-1, -2, ... before the ending; the pictures differ; nothing else is left in the folder."""
    paths = generate(GenerateConfig(**settings, num_images=3))
    assert [p.name for p in paths] == ["image-1.png", "image-2.png", "image-3.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [p.name for p in paths]
    assert len({load_picture(p).tobytes() for p in paths}) == 3


def test_many_images_go_in_batches(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """At most --batch-size at once, each written before the next batch; image i is that of seed + i alone."""
    sizes: list[int] = []
    call = RealGeneralPipeline.__call__

    def counted(self: RealGeneralPipeline, *args: Any, **kwargs: Any) -> Any:
        sizes.append(kwargs["num_images_per_prompt"])
        return call(self, *args, **kwargs)

    monkeypatch.setattr(RealGeneralPipeline, "__call__", counted)
    paths = generate(GenerateConfig(**settings, seed=5, num_images=5, batch_size=2))
    assert sizes == [2, 2, 1]
    (alone,) = generate(GenerateConfig(**settings, seed=8))
    assert np.abs(np.asarray(load_picture(paths[3])).astype(int) - np.asarray(load_picture(alone)).astype(int)).max() <= 1


def test_condition_files(settings: dict[str, Any], bases: dict[str, Path], adapter: Path) -> None:
    """--condition pictures go to the pipeline as they are: the file equals a call of the pipeline."""
    settings["condition"] = [settings.pop("picture")]
    (path,) = generate(GenerateConfig(**settings, seed=3))
    pipe = RealGeneralPipeline.from_pretrained(bases["5b"], adapter=adapter)
    wanted = pipe(
        "a red pot", load_picture(settings["condition"][0]), task="canny", height=32, width=48, num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    assert np.abs(np.asarray(load_picture(path)).astype(int) - np.asarray(wanted).astype(int)).max() <= 1


def test_two_conditions(settings: dict[str, Any], tmp_path: Path) -> None:
    """Several --condition pictures are several conditions of one image."""
    make_photo(64, 64, 9).save(tmp_path / "second.png")
    first = settings.pop("picture")
    one = generate(GenerateConfig(**settings, condition=[first]))[0].read_bytes()
    two = generate(GenerateConfig(**settings, condition=[first, str(tmp_path / "second.png")]))[0].read_bytes()
    assert one != two


def test_derived_condition_has_the_adapters_options(settings: dict[str, Any], pipe: RealGeneralPipeline, adapter: Path) -> None:
    """--picture with a bare task name derives with the options of training; --task with options overrides them."""
    pipe.load_adapter(adapter)
    photo = fit_picture(load_picture(settings["picture"]), 48, 32)
    bare = derive_condition(GenerateConfig(**settings), pipe, 48, 32)
    assert bare.tobytes() == get_task("canny:low=20,high=60").condition(photo, 0).tobytes()
    given = derive_condition(GenerateConfig(**{**settings, "task": "canny:low=250,high=255"}), pipe, 48, 32)
    assert given.tobytes() == get_task("canny:low=250,high=255").condition(photo, 0).tobytes()
    assert bare.tobytes() != given.tobytes()


def test_mask_says_what_to_fill(settings: dict[str, Any], pipe: RealGeneralPipeline, adapter: Path, tmp_path: Path) -> None:
    """White of the mask is black in the condition, the rest is the picture; the mask is fitted like the picture."""
    pipe.load_adapter(adapter)
    mask = Image.new("L", (120, 80))
    mask.paste(255, (0, 0, 60, 80))
    mask.save(tmp_path / "mask.png")
    config = GenerateConfig(**{**settings, "task": "inpainting"}, mask=str(tmp_path / "mask.png"))
    got = np.asarray(derive_condition(config, pipe, 48, 32))
    photo = np.asarray(fit_picture(load_picture(settings["picture"]), 48, 32))
    assert not got[:, :18].any()
    assert np.array_equal(got[:, 30:], photo[:, 30:])
    assert len(generate(config)) == 1


def test_without_adapter(settings: dict[str, Any]) -> None:
    """--adapter "" runs the bare base with its default tasks."""
    assert len(generate(GenerateConfig(**{**settings, "adapter": ""}))) == 1
