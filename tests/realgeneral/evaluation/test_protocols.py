"""The paper's protocols end to end on nano, with small sets made from the packaged emoji and tiny encoders on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from realgeneral import RealGeneralPipeline
from realgeneral.commands.cli import main
from realgeneral.errors import Failure
from realgeneral.evaluation import generator as generation
from realgeneral.evaluation.evaluate import evaluate
from realgeneral.evaluation.generator import read_settings
from realgeneral.model.adapter import save_adapter
from realgeneral.model.adapter_info import adapter_info
from realgeneral.model.lora import add_lora
from realgeneral.nano.emoji import caption, load_emoji
from realgeneral.pictures import load_picture
from realgeneral.settings.evaluate import EvaluateConfig
from realgeneral.settings.train import LORA_TARGETS
from tests.realgeneral.helpers.encoders_on_disk import save_clip, save_depth, save_dino
from tests.realgeneral.helpers.pictures import make_photo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DreamBench- and COCO-shaped emoji, encoders, and a fresh adapter on nano that knows the depth task."""
    folder = tmp_path_factory.mktemp("protocols")
    concepts = load_emoji("held_out")[:80:16]
    for concept in concepts[:2]:
        (folder / "dreambench" / concept.name.replace(" ", "_")).mkdir(parents=True)
        for style in ("flat", "3d", "noto"):
            concept.image(style).save(folder / "dreambench" / concept.name.replace(" ", "_") / f"{style}.png")
    (folder / "dreambench" / "prompts.txt").write_text("{}, flat icon\n{}, cartoon\n")
    (folder / "coco" / "annotations").mkdir(parents=True)
    (folder / "coco" / "val2017").mkdir()
    record: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
    for i, concept in enumerate(concepts):
        concept.image("3d").save(folder / "coco" / "val2017" / f"{i:012d}.png")
        record["images"].append({"id": i, "file_name": f"{i:012d}.png"})
        record["annotations"].append({"id": i, "image_id": i, "caption": caption(concept, "3d")})
    (folder / "coco" / "annotations" / "captions_val2017.json").write_text(json.dumps(record))
    save_clip(folder / "clip")
    save_dino(folder / "dino")
    save_depth(folder / "depth")
    model = RealGeneralPipeline.from_pretrained("nano").transformer
    model.configure_condition(["depth"], "paper")
    add_lora(model, 4, None, LORA_TARGETS)
    save_adapter(model, folder / "depth-adapter", adapter_info(model, ["depth"], "nano"))
    return folder


@pytest.fixture
def settings(folder: Path, tmp_path: Path) -> Callable[..., EvaluateConfig]:
    def settings_(protocol: str, **changes: object) -> EvaluateConfig:
        options: dict[str, object] = {"protocol": protocol, "output": str(tmp_path), "steps": 1, "batch_size": 2}
        options["data"] = str(folder / ("dreambench" if protocol == "customization" else "coco"))
        if protocol == "customization":
            options |= {"clip": str(folder / "clip"), "dino": str(folder / "dino")}
        else:
            options["fid_features"] = "none"
        if protocol == "depth":
            options |= {"depth_model": str(folder / "depth"), "adapter": str(folder / "depth-adapter")}
        return EvaluateConfig(**{**options, **changes})  # type: ignore[arg-type]

    return settings_


def pictures_of(output: Path) -> dict[str, bytes]:
    return {str(p.relative_to(output)): p.read_bytes() for p in sorted((output / "images").rglob("*.png"))}


def test_customization(settings: Callable[..., EvaluateConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two subjects by two prompts by two pictures; metrics name their encoder; the paper's rows are marked so."""
    results = evaluate(settings("customization", images_per_prompt=2))
    names = ["CLIP-I (clip)", "CLIP-I to the condition (clip)", "CLIP-T (clip)", "DINO (dino)", "DINO to the condition (dino)"]
    assert {method: list(scores) for method, scores in results.items()} == {"adapter": names, "copy condition": names}
    copied = results["copy condition"]
    for metric in (names[1], names[4]):
        assert copied[metric].mean == pytest.approx(1, abs=1e-3)  # an encoder's own view of the resized picture
    for score in results["adapter"].values():
        assert score.low is not None and score.high is not None
        assert score.low <= score.mean <= score.high
    assert len(pictures_of(tmp_path)) == 8
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    run, paper = table.split("## Of the paper, not of this run")
    assert "0.849" in paper and "0.849" not in run
    assert "95 % interval, bootstrap over subjects" in run
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["count"] == len(record["values"]["adapter"]["DINO (dino)"]) == len(record["cases"]) == 8
    assert record["paper"]["rows"]["RealGeneral"] == {"CLIP-I": 0.849, "DINO": 0.668, "CLIP-T": 0.314}
    assert load_picture(tmp_path / "grid.png").height > 8 * 64
    made = [load_picture(tmp_path / name).tobytes() for name in pictures_of(tmp_path)]
    assert len(set(made)) == 8  # repeats have noise of their own


def test_canny(settings: Callable[..., EvaluateConfig], tmp_path: Path) -> None:
    """The name of the Fréchet distance says whose features; edges of the copied condition are its outlines."""
    results = evaluate(settings("canny", fid_features="efficientnet-lite0"))
    names = ["Fréchet distance (EfficientNet-Lite0)", "SSIM", "edge F1, exact", "edge F1, 1 px"]
    assert [list(scores) for scores in results.values()] == [names, names]
    assert results["adapter"][names[0]].low is None
    assert "FID (Inception v3)" not in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert results["copy condition"]["edge F1, 1 px"].mean > 0.9


def test_depth(settings: Callable[..., EvaluateConfig], folder: Path, tmp_path: Path) -> None:
    """The named model makes the condition and the measure; a chosen part of the set; no distance where none is wanted."""
    results = evaluate(settings("depth", limit=3, guidance_scale=1.0))
    assert list(results["adapter"]) == ["SSIM", "depth MSE"]
    assert results["adapter"]["depth MSE"].mean > 0
    settings_of_one = read_settings(next((tmp_path / "images").glob("*.png")))
    assert settings_of_one is not None and settings_of_one["task"] == f"depth:model={folder / 'depth'}"
    assert len(pictures_of(tmp_path)) == 3


def test_continued_runs(settings: Callable[..., EvaluateConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is missing, damaged or of other settings is made again, bit for bit; the rest is kept."""
    config = settings("canny")
    evaluate(config)
    first, table = pictures_of(tmp_path), (tmp_path / "table.md").read_bytes()
    names = [tmp_path / name for name in first]
    names[0].unlink()
    names[1].write_bytes(first["images/" + names[1].name][:-200])
    load_picture(names[3]).save(names[3])  # without its settings
    kept = names[2].stat().st_mtime_ns
    capsys.readouterr()
    evaluate(config)
    assert "3 pictures generated, 2 kept from an earlier run" in capsys.readouterr().out
    assert pictures_of(tmp_path) == first
    assert names[2].stat().st_mtime_ns == kept
    assert (tmp_path / "table.md").read_bytes() == table
    evaluate(replace(config, seed=1, limit=2))
    assert "2 pictures generated, 0 kept" in capsys.readouterr().out


def test_interrupted_run(
    settings: Callable[..., EvaluateConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk ends in one line and leaves whole pictures, no table; the same command goes on, as if nothing had been."""
    config = settings("canny")
    save, left = generation.save_picture, iter(range(3))

    def full(*args: object, **kwargs: object) -> None:
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        save(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(generation, "save_picture", full)
        with pytest.raises(Failure, match=r"could not be written: No space left on device; the same command continues"):
            evaluate(config)
    before = pictures_of(tmp_path)
    assert len(before) == 3
    assert not (tmp_path / "table.md").exists()
    capsys.readouterr()
    evaluate(config)
    assert "2 pictures generated, 3 kept" in capsys.readouterr().out
    assert before.items() <= pictures_of(tmp_path).items()
    uninterrupted = tmp_path / "other"
    evaluate(replace(config, output=str(uninterrupted)))
    assert pictures_of(tmp_path) == pictures_of(uninterrupted)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--protocol", "canny"], 2, "--data must name a folder for the canny protocol, got none"),
        (["--protocol", "canny", "--data", "{0}/nothing"], 1, "data must be an existing folder or file, got"),
        (["--protocol", "customization", "--data", "{0}/coco"], 1, "data must hold prompts_and_classes.txt or prompts.txt"),
        (["--protocol", "customization", "--data", "{0}/dreambench"], 2, "--clip or --dino must name an encoder"),
        (["--protocol", "customization", "--data", "{0}/dreambench", "--clip", "{0}/coco"], 1, "clip must be the hub id or"),
        (["--protocol", "depth", "--data", "{0}/coco"], 2, "task must be one that the adapter was trained for"),
        (["--protocol", "depth", "--data", "{0}/coco", "--adapter", "{0}/depth-adapter"], 2, "--depth-model must name"),
        (
            [
                "--protocol",
                "depth",
                "--data",
                "{0}/coco",
                "--adapter",
                "{0}/depth-adapter",
                "--depth-model",
                "{0}/clip",
                "--fid-features",
                "none",
            ],
            1,
            "depth-model must be the hub id or folder of a transformers model",
        ),
        (["--protocol", "canny", "--data", "{0}/coco"], 1, "fid-features 'inception' needs torch-fidelity"),
        (["--protocol", "canny", "--data", "{0}/coco", "--fid-features", "x.pth"], 1, "fid-features must be an existing file"),
        (
            ["--protocol", "canny", "--data", "{0}/coco", "--fid-features", "none", "--height", "60"],
            2,
            "height must be a positive",
        ),
        (["--protocol", "canny", "--data", "{0}/coco", "--offload", "--fid-features", "none"], 2, "--offload needs a GPU"),
        (["--protocol", "canny", "--limit", "-1"], 2, "limit must not be negative, got -1"),
        (["--protocol", "canny", "--images-per-prompt", "0"], 2, "images_per_prompt must be at least 1, got 0"),
        (["--data", "{0}/coco"], 2, "--data must come with --protocol customization or canny or depth, got --protocol nano"),
        (["--columns", "prompt=text"], 2, "--columns must come with --protocol canny or depth, got --protocol nano"),
        (["--protocol", "canny", "--tasks", "canny"], 2, "--tasks must come with --protocol nano, got --protocol canny"),
        (["--protocol", "canny", "--depth-model", "x"], 2, "--depth-model must come with --protocol depth, got"),
        (["--protocol", "fid"], 2, "invalid choice: 'fid'"),
        (["--split", "test"], 2, "invalid choice: 'test'"),
    ],
)
def test_bad_input(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    status: int,
    message: str,
) -> None:
    """One line with what is wrong, before anything is generated or written."""
    if "inception" in message:
        monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    arguments = [option.format(folder) for option in options]
    assert main(["evaluate", *arguments, "--output", str(tmp_path / "out")]) == status
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("realgeneral evaluate: ")]
    assert len(err) == 1
    assert message in err[0]
    assert not (tmp_path / "out").exists()


def test_bad_rows_are_named_and_skipped(
    settings: Callable[..., EvaluateConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in training, with their number in the table; data with no good row is an error."""
    data = tmp_path / "data"
    data.mkdir()
    for name in "abc":
        make_photo(64, 64).save(data / f"{name}.png")
        (data / f"{name}.txt").write_text("a red fox")
    (data / "a.txt").unlink()
    (data / "b.png").write_bytes((data / "b.png").read_bytes()[:-40])
    evaluate(settings("canny", data=str(data), output=str(tmp_path / "out")))
    out = capsys.readouterr().out
    assert "bad row: a.png must have a caption a.txt beside it" in out
    assert "bad row: b.png: " in out
    assert "2 bad rows were skipped" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (record["count"], len(record["bad_rows"])) == (1, 2)
    (data / "c.txt").unlink()
    with pytest.raises(Failure, match=r"data must hold good rows, got 3 bad ones; the first: a.png must have a caption"):
        evaluate(settings("canny", data=str(data), output=str(tmp_path / "out2")))


def test_long_prompts_are_bad_rows(
    settings: Callable[..., EvaluateConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A caption past the text window is skipped as in training, by the name that check-data gives the row."""
    data = tmp_path / "data"
    data.mkdir()
    make_photo(64, 64).save(data / "b.png")
    (data / "b.txt").write_text("a red fox " * 20)
    make_photo(64, 64).save(data / "a.png")
    (data / "a.txt").write_text("a red fox")
    evaluate(settings("canny", data=str(data), output=str(tmp_path / "out"), images_per_prompt=2))
    out = capsys.readouterr().out
    assert "bad row: b.png: prompt must have at most 16 tokens, got" in out
    assert "1 bad rows are skipped" in out
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [case["row"] for case in record["cases"]] == ["a.png", "a.png"]
