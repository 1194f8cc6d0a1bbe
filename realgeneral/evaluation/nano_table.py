"""The table of nano: the adapter against copying the condition and against the un-adapted base, with intervals."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from realgeneral.data.rows import Source
from realgeneral.data.samples import PairDataset, Sample
from realgeneral.data.shapes import Size
from realgeneral.data.sources.packaged import TARGET_STYLES, AvatarSource, NanoSource
from realgeneral.errors import UsageError
from realgeneral.evaluation.metrics import edge_f1, feature_hits, image_features, psnr, ssim
from realgeneral.files import locked, write_json, write_text
from realgeneral.generation.bases import load_pipeline
from realgeneral.generation.pipeline import RealGeneralPipeline
from realgeneral.model.adapter_info import AdapterInfo, library_versions
from realgeneral.nano.avatars import FACES
from realgeneral.pictures import picture_grid, save_picture, to_picture, to_pixels
from realgeneral.settings.evaluate import EvaluateConfig
from realgeneral.settings.sampling import sampling
from realgeneral.tasks import get_task

METHODS = ("adapter", "copy condition", "base")


FACE_CHANGE, STYLE_CHANGE = "customization of face", "customization of style"


@dataclass(frozen=True)
class NanoPairs:
    """Pairs of one task, one per concept or avatar.

    Attributes:
        samples: The pairs.
        names: What each shows.
        states: Of each, pictures of the same concept in every state (style; face), the asked one among them.
        asked: Which of `states` that is.
    """

    samples: list[Sample]
    names: list[str]
    states: list[list[Image.Image]]
    asked: list[int]

    @property
    def truth(self) -> Tensor:
        """Targets, [B, 3, H, W] in [0, 1]."""
        return torch.stack([s.target for s in self.samples]) / 2 + 0.5

    @property
    def conditions(self) -> Tensor:
        """First conditions, [B, 3, H, W] in [0, 1]."""
        return torch.stack([s.conditions[0] for s in self.samples]) / 2 + 0.5


def nano_pairs(spec: str, count: int, size: Size, seed: int, split: str = "held_out") -> NanoPairs:
    """`count` emoji of a split (all if there are fewer) in a fixed random order, their styles in turn, as pairs of a task."""
    source, styles = NanoSource(split, augment=False), len(TARGET_STYLES)
    drawn = _draw(len(source.concepts), styles, count, seed)
    concepts = [source.concepts[row // styles] for row, _ in drawn]
    states = [[concept.image(style) for style in TARGET_STYLES] for concept in concepts]
    samples = _samples(source, spec, size, seed, drawn)
    return NanoPairs(samples, [concept.codepoint for concept in concepts], states, [row % styles for row, _ in drawn])


def avatar_pairs(count: int, size: Size, seed: int, split: str = "held_out", same_background: bool = False) -> NanoPairs:
    """`count` avatars of a split (all if there are fewer) in a fixed random order, as pairs of customization.

    Face and background change, or the face alone. The states are the avatar's faces on the asked background, and the condition.
    """
    source = AvatarSource(split, augment=False, same_background=same_background)
    drawn = _draw(len(source.avatars), FACES, count, seed)
    avatars = [source.avatars[row // FACES] for row, _ in drawn]
    samples = _samples(source, "customization", size, seed, drawn)
    states = [[*source.states(*d), to_picture(s.conditions[0])] for d, s in zip(drawn, samples, strict=True)]
    return NanoPairs(samples, [avatar.seed for avatar in avatars], states, [row % FACES for row, _ in drawn])


def task_pairs(spec: str, count: int, size: Size, seed: int, split: str = "held_out") -> NanoPairs:
    """What a task is judged on: customization on avatars in another state, the others on emoji."""
    if get_task(spec).name == "customization":
        return avatar_pairs(count, size, seed, split)
    return nano_pairs(spec, count, size, seed, split)


def table_pairs(
    specs: Sequence[str], count: int, size: Size, seed: int, split: str = "held_out"
) -> Iterator[tuple[str, NanoPairs]]:
    """Name and pairs of each part of the table: the tasks, and after customization two more kinds of it.

    Avatars whose face alone changes, for which the condition is nearly the truth; emoji in another style.
    """
    for spec in specs:
        task = get_task(spec).name
        yield task, task_pairs(spec, count, size, seed, split)
        if task == "customization":
            yield FACE_CHANGE, avatar_pairs(count, size, seed, split, same_background=True)
            yield STYLE_CHANGE, nano_pairs(spec, count, size, seed, split)


def _draw(things: int, states: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Row of a source that has `states` rows per thing, one after the other, and seed, of each thing that is drawn."""
    # a fixed shuffle: neighbours in code point order are alike
    order = random.Random(0).sample(range(things), min(count, things))
    rows = [thing * states + i % states for i, thing in enumerate(order)]
    return [(row, seed * 1000 + row) for row in rows]


def _samples(source: Source, spec: str, size: Size, seed: int, drawn: list[tuple[int, int]]) -> list[Sample]:
    dataset = PairDataset(source, [spec], [], size, seed, strict=True)
    return [dataset.sample(row, row_seed) for row, row_seed in drawn]


def as_base(pipe: RealGeneralPipeline, tasks: Sequence[str]) -> RealGeneralPipeline:
    """A pipeline without adapter as the stock video model that goes on from a clean frame: nothing blocked, nothing added."""
    pipe.transformer.configure_condition(tasks, "open")
    return pipe


def generate_all(
    pipe: RealGeneralPipeline, pairs: NanoPairs, config: Any, progress: str = "", *, adapted: bool = True
) -> Tensor:
    """Generate every pair in batches, [B, 3, H, W] in [0, 1]; noise depends on the sample, not on its batch.

    Args:
        pipe: With an adapter, or `as_base`.
        pairs: What to generate.
        config: Steps, guidance, batch size and seed.
        progress: Name of a progress bar; empty = none.
        adapted: False for the base: an empty condition is something that only training with condition dropout teaches.
    """
    results = []
    steps, text, image = sampling(config, pairs.samples[0].task)
    image = image if adapted else 1.0
    for start in tqdm(range(0, len(pairs.samples), config.batch_size), desc=progress, disable=not progress):
        part = pairs.samples[start : start + config.batch_size]
        results.append(
            pipe(
                [s.prompt for s in part],
                [[to_picture(c) for c in s.conditions] for s in part],
                task=part[0].task,
                subject=[s.subject for s in part],
                num_inference_steps=steps,
                guidance_scale=text,
                image_guidance_scale=image,
                generator=[torch.Generator().manual_seed(config.seed * 100_003 + start + i) for i in range(len(part))],
                output_type="pt",
            ).images
        )
    return torch.cat(results).cpu()


def measures(task: str, pairs: NanoPairs) -> dict[str, Callable[[Tensor], Tensor]]:
    """The metrics of a task by name; each takes images and gives one value per sample."""
    truth = pairs.truth
    table: dict[str, Callable[[Tensor], Tensor]] = {"SSIM": lambda x: ssim(x, truth), "PSNR dB": lambda x: psnr(x, truth)}
    if task == "customization":
        # galleries: every compared concept in the state that was asked for; every compared concept in every state
        ranks = torch.arange(len(pairs.names))
        every = image_features(_stack(picture for states in pairs.states for picture in states))
        places = ranks * len(pairs.states[0]) + torch.tensor(pairs.asked)
        asked = every[places]
        return {
            "same concept R@1": lambda x: feature_hits(image_features(x), asked, ranks, 1),
            "same concept R@5": lambda x: feature_hits(image_features(x), asked, ranks, 5),
            "concept in asked state R@1": lambda x: feature_hits(image_features(x), every, places, 1),
            **table,
        }
    if task in ("canny", "image-to-sketch"):
        table["edge F1"] = lambda x: edge_f1(x, truth)
    return table


def interval(values: Tensor) -> tuple[float, float]:
    """Mean and half width of its 95 % confidence interval (normal approximation)."""
    half = 1.96 * values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return values.mean().item(), half


def scores(values: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """By method and metric: "scores", `interval` of the values; "differences" of the adapter from each other method, paired by
    concept; the "values" themselves.
    """
    adapter, *others = METHODS
    return {
        "scores": {m: {k: interval(x) for k, x in metrics.items()} for m, metrics in values.items()},
        "differences": {m: {k: interval(values[adapter][k] - x) for k, x in values[m].items()} for m in others},
        "values": {m: {k: x.tolist() for k, x in metrics.items()} for m, metrics in values.items()},
    }


def nano_table(config: EvaluateConfig, info: AdapterInfo) -> dict[str, Any]:
    """Compare by task: `table.md`, `results.json` and one grid per task.

    Args:
        config: Settings.
        info: The adapter's description.
    """
    if options := [task for task in config.tasks if ":" in task and task not in info.tasks]:
        raise UsageError(f"tasks must be names, scored with the adapter's own options {list(info.tasks)}, got {options[0]!r}")
    specs = [info.task_spec(name.partition(":")[0]) for name in config.tasks or info.task_names]
    with locked(config.output):
        return _compare(config, specs, Path(config.output))


def _compare(config: EvaluateConfig, specs: Sequence[str], output: Path) -> dict[str, Any]:
    pipe = _pipeline(config, config.adapter)
    assert pipe.adapter is not None
    base = as_base(_pipeline(config, ""), pipe.adapter.task_names)
    results: dict[str, Any] = {}
    note = "" if config.split == "held_out" else "Concepts of the training split: to choose settings by, not to report.\n\n"
    for name, pairs in table_pairs(specs, config.concepts, (64, 64), config.seed, config.split):
        images = {
            "adapter": generate_all(pipe, pairs, config, f"{name}, adapter"),
            "copy condition": pairs.conditions,
            "base": generate_all(base, pairs, config, f"{name}, base", adapted=False),
        }
        measured = measures(pairs.samples[0].task, pairs)
        values = {m: {k: fn(images[m]) for k, fn in measured.items()} for m in METHODS}
        results[name] = {"count": len(pairs.samples), **scores(values)}
        save_picture(comparison_grid(pairs, images, 12), output / f"{name.replace(' ', '-')}.png")
        write_text(output / "table.md", note + markdown(results))
        record = {"config": asdict(config), "versions": library_versions(), "adapter": asdict(pipe.adapter), "results": results}
        write_json(output / "results.json", record)
    print(note + markdown(results))
    return results


def comparison_grid(pairs: NanoPairs, images: dict[str, Tensor], rows: int) -> Image.Image:
    """condition | adapter | base | truth, for the first rows."""
    columns = (pairs.conditions, images["adapter"], images["base"], pairs.truth)
    pictures = [[to_picture(column[i] * 2 - 1) for column in columns] for i in range(min(rows, len(pairs.samples)))]
    labels = [s.prompt for s in pairs.samples[: len(pictures)]]
    return picture_grid(pictures, ("condition", "adapter", "base", "truth"), labels)


def markdown(results: dict[str, Any]) -> str:
    """The table as Markdown: one row per task and metric."""
    adapter, *others = METHODS
    header = ["task", "metric", "n", *METHODS, *(f"{adapter} - {other}" for other in others)]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for task, result in results.items():
        for metric in result["scores"][adapter]:
            cells = [f"{mean:.3f} ± {half:.3f}" for mean, half in (result["scores"][m][metric] for m in METHODS)]
            for mean, half in (result["differences"][m][metric] for m in others):
                cell = f"{mean:+.3f} ± {half:.3f}"
                cells.append(f"**{cell}**" if abs(mean) > half else cell)
            lines.append(f"| {task} | {metric} | {result['count']} | " + " | ".join(cells) + " |")
    note = "Means and 95 % intervals over concepts; differences are paired by concept, bold where the interval excludes 0."
    return "\n".join([*lines, "", note]) + "\n"


def _pipeline(config: EvaluateConfig, adapter: str) -> RealGeneralPipeline:
    pipe = load_pipeline(config.base, torch.float32, adapter=adapter or None)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def _stack(pictures: Iterable[Image.Image]) -> Tensor:
    return torch.stack([to_pixels(picture) for picture in pictures]) / 2 + 0.5
