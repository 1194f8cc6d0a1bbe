"""What `make demo` shows: the method on real images at 64 px, on a CPU, in minutes.

First the shipped adapter turns conditions of held-out concepts into images, one row per task; then a short real LoRA training
starts from the base on one task, with its loss curve and pictures before and after.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from realgeneral.evaluation.metrics import psnr, ssim
from realgeneral.evaluation.nano_table import (
    FACE_CHANGE,
    NanoPairs,
    as_base,
    generate_all,
    interval,
    measures,
    table_pairs,
    task_pairs,
)
from realgeneral.files import check_output, locked, write_json
from realgeneral.generation.arguments import check_steps
from realgeneral.generation.bases import check_kernels, open_base, use_kernels
from realgeneral.generation.pipeline import RealGeneralPipeline
from realgeneral.model.adapter import read_adapter_info
from realgeneral.pictures import picture_grid, save_picture, to_picture
from realgeneral.settings.sampling import DemoConfig
from realgeneral.settings.train import TrainConfig
from realgeneral.tasks import get_task
from realgeneral.training.train import train

NOTE = (
    "SSIM weighs brightness and structure. Colouring's grey condition has both from the truth, so its SSIM is high without a "
    "colour; a result gains the colours and loses a little of the rest."
)


def demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demo; writes grid.png, loss.png, before_after.png and metrics.json to `config.output`."""
    began = time.perf_counter()
    check_output(config.output)
    check_kernels(config.fused_kernels, _device())
    check_steps("steps", config.steps, open_base("nano").scheduler)
    spec = read_adapter_info("nano").task_spec(config.train_task)
    output = Path(config.output)
    metrics: dict[str, Any] = {"generation": show_tasks(config, output)}
    with scratch(output / "training.partial") as run:
        if config.train_steps:
            metrics["training"] = show_training(config, spec, output, str(run))
    metrics["seconds"] = round(time.perf_counter() - began, 1)
    write_json(output / "metrics.json", metrics)
    print(report(metrics, output))
    return metrics


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder for a while, without what a killed process left in it; whatever else is beside it is the user's."""
    with locked(folder.parent, folder.name):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def open_pipeline(adapter: str | None, config: DemoConfig) -> RealGeneralPipeline:
    """The nano pipeline on the best device, quiet."""
    pipe = RealGeneralPipeline.from_pretrained("nano", adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.images.fold(pipe.vae)
    use_kernels(pipe.transformer, config.fused_kernels, _device())
    return pipe.to(_device())


def show_tasks(config: DemoConfig, output: Path) -> dict[str, Any]:
    """Generate `concepts` held-out pictures per task into one grid; returns the scores by task, those of the base beside."""
    pipe = open_pipeline("nano", config)
    assert pipe.adapter is not None
    base = as_base(open_pipeline(None, config), pipe.adapter.task_names)
    rows, labels, scores = [], [], {}
    for name, pairs in table_pairs(pipe.adapter.tasks, config.concepts, (64, 64), config.seed):
        if name == FACE_CHANGE:
            continue  # in the table it is to tell what the background's share is; here it would be the same pictures again
        print(f"generating: {name}", flush=True)
        images = generate_all(pipe, pairs, _Sampling(config))
        rows.append([picture for i in range(len(pairs.samples)) for picture in _triple(pairs, images, i)])
        labels.append(name)
        scores[name] = {
            "ssim": interval(ssim(images, pairs.truth))[0],
            "ssim_of_condition": interval(ssim(pairs.conditions, pairs.truth))[0],
            "ssim_of_base": interval(ssim(generate_all(base, pairs, _Sampling(config), adapted=False), pairs.truth))[0],
            "psnr_db": interval(psnr(images, pairs.truth))[0],
        }
    header = ["condition", "result", "truth"] * len(pairs.samples)
    save_picture(picture_grid(rows, header, labels), output / "grid.png")
    return scores


def show_training(config: DemoConfig, spec: str, output: Path, run: str) -> dict[str, Any]:
    """Train an adapter from the base on one task in the folder `run`; loss curve, and the same pictures before and after."""
    print(f"training: {config.train_steps} steps of LoRA + condition branch from the base on {config.train_task}", flush=True)
    began = time.perf_counter()
    settings = TrainConfig(
        tasks=[spec], data="avatars" if get_task(spec).name == "customization" else "nano", output=run,
        steps=config.train_steps, batch_size=8, rank=32, learning_rate=2e-3, warmup_steps=10,
        save_every=config.train_steps, sample_count=0, fused_kernels=config.fused_kernels, seed=config.seed,
    )  # fmt: skip
    result = train(settings)
    seconds = time.perf_counter() - began
    pairs = task_pairs(spec, config.concepts, (64, 64), config.seed)
    before = open_pipeline(None, config)
    before.transformer.configure_condition([get_task(spec).name], settings.preset)
    after = open_pipeline(result["adapter"], config)
    images = [generate_all(p, pairs, _Sampling(config)) for p in (before, after)]
    pictures = [
        [*(to_picture(x[i] * 2 - 1) for x in (pairs.conditions, *images, pairs.truth))] for i in range(len(pairs.samples))
    ]
    labels = [s.prompt for s in pairs.samples]
    save_picture(picture_grid(pictures, ("condition", "before", "after", "truth"), labels), output / "before_after.png")
    losses = [json.loads(line)["loss"] for line in Path(result["log"]).read_text(encoding="utf-8").splitlines()]
    loss_plot(losses, output / "loss.png")
    score = {k: [interval(fn(x))[0] for x in images] for k, fn in measures(get_task(spec).name, pairs).items()}
    return {
        "task": config.train_task,
        "steps": config.train_steps,
        "seconds": round(seconds, 1),
        "losses": losses,
        "before_after": score,
    }


def loss_plot(losses: list[float], path: Path) -> None:
    """Loss of each step, and its running mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    window = max(1, len(losses) // 12)
    padded = torch.tensor(losses)
    smooth = [padded[max(0, i - window) : i + 1].mean().item() for i in range(len(losses))]
    figure, axes = plt.subplots(figsize=(6, 3.4), dpi=120, layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, color="#b8c4d6", linewidth=0.8, label="each step")
    axes.plot(range(1, len(losses) + 1), smooth, color="#1f4e9c", linewidth=2, label=f"mean of {window}")
    axes.set(xlabel="optimizer step", ylabel="v-prediction loss (MSE)", title="LoRA training from the base")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def report(metrics: dict[str, Any], output: Path) -> str:
    """The table that the command prints."""
    lines = [f"{'':<23}{'SSIM with the truth':^34}", f"{'task':<23}{'adapter':>10}{'base':>10}{'condition':>12}{'PSNR dB':>10}"]
    for task, row in metrics["generation"].items():
        ssims = f"{row['ssim']:>10.3f}{row['ssim_of_base']:>10.3f}{row['ssim_of_condition']:>12.3f}"
        lines.append(f"{task:<23}{ssims}{row['psnr_db']:>10.2f}")
    lines.append(NOTE)
    files = ["grid.png", "metrics.json"]
    if "training" in metrics:
        losses = metrics["training"]["losses"]
        tenth = max(1, len(losses) // 10)
        first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
        lines.append(
            f"training {metrics['training']['task']}: loss {first:.3f} -> {last:.3f} in {metrics['training']['seconds']} s"
        )
        files += ["loss.png", "before_after.png"]
    lines.append(f"{metrics['seconds']} s; pictures: " + ", ".join(str(output / f) for f in files))
    return "\n".join(lines)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Sampling:
    """Sampling settings as `generate_all` reads them."""

    def __init__(self, config: DemoConfig) -> None:
        self.batch_size, self.steps = config.concepts, config.steps
        self.guidance_scale, self.image_guidance_scale = config.guidance_scale, config.image_guidance_scale
        self.seed = config.seed


def _triple(pairs: NanoPairs, images: Tensor, i: int) -> list[Image.Image]:
    return [to_picture(x[i] * 2 - 1) for x in (pairs.conditions, images, pairs.truth)]
