"""Recipe: which part of the method earns its place at nano's size.

python -m recipes.ablate --output outputs/ablation

Every variant is trained with the same seeds, steps and batches (a sample, its noise and its timestep depend on seed and step
alone), then judged on the same held-out concepts with the same noise. The same command continues; `table.md` and `results.json`
are written after each run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from realgeneral.data.samples import collate
from realgeneral.data.sources.packaged import NANO_TASKS
from realgeneral.errors import Failure, UsageError
from realgeneral.evaluation.generator import weights_fingerprint
from realgeneral.evaluation.metrics import RESAMPLES, Score, bootstrap
from realgeneral.evaluation.nano_table import NanoPairs, generate_all, measures, nano_pairs
from realgeneral.files import write_json, write_text
from realgeneral.generation.pipeline import RealGeneralPipeline
from realgeneral.model.adapter_info import library_versions
from realgeneral.model.vae import fold_single_frame
from realgeneral.settings.evaluate import EvaluateConfig
from realgeneral.settings.sampling import NANO_GUIDANCE, NANO_STEPS
from realgeneral.settings.train import TrainConfig
from realgeneral.tasks import get_task
from realgeneral.training.features import TextCache
from realgeneral.training.objective import Draws, training_loss
from realgeneral.training.train import train
from recipes.common import log

LOSS = "v-loss"
LOSS_DRAWS = 4
# what the table shows of a task; results.json holds every metric
SHOWN = {"customization": "SSIM", "canny": "edge F1", "image-to-sketch": "edge F1"}


@dataclass(frozen=True)
class Variant:
    """One way of training, and the variant that differs from it in that one thing."""

    preset: Literal["paper", "cached", "open"]
    ablation: Literal["none", "shared-adaln", "no-embedding"]
    against: str | None
    what: str


VARIANTS = {
    "cached": Variant("cached", "none", None, "the whole method, preset `cached`"),
    "paper": Variant(
        "paper", "none", "cached", "the whole method, preset `paper`: shared timestep, the condition sees the target"
    ),
    "no-mask": Variant("open", "none", "paper", "as `paper`, but text and condition see each other"),
    "shared-adaln": Variant(
        "cached", "shared-adaln", "cached", "as `cached`, the condition modulated by the base's video rows"
    ),
    "no-embedding": Variant("cached", "no-embedding", "cached", "as `cached`, nothing added to the condition's tokens"),
}


# values by task and metric, one per concept
Values = dict[str, dict[str, list[float]]]


def train_config(arguments: argparse.Namespace, name: str, seed: int) -> TrainConfig:
    """The training of one variant and seed."""
    variant = VARIANTS[name]
    return TrainConfig(
        base=arguments.base, tasks=list(arguments.tasks), preset=variant.preset, ablation=variant.ablation, seed=seed,
        output=str(arguments.output / "runs" / f"{name}-{seed}"), steps=arguments.steps, batch_size=arguments.batch_size,
        rank=arguments.rank, learning_rate=arguments.learning_rate, ema_decay=arguments.ema_decay,
        mixed_precision="bf16" if arguments.bf16 else "no", compile=arguments.compile, sample_count=0, keep_checkpoints=1,
        save_every=max(1, arguments.steps // 4), resume=True, precomputed=arguments.precomputed,
    )  # fmt: skip


def check_settings(arguments: argparse.Namespace) -> None:
    """Note what all runs in the folder share, the base's weights too; UsageError if earlier ones differ."""
    settings = {k: v for k, v in vars(arguments).items() if k not in ("output", "variants", "seeds")}
    settings["base_weights"] = weights_fingerprint(RealGeneralPipeline.from_pretrained(arguments.base))
    path = arguments.output / "settings.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else settings
    for name, value in settings.items():
        if before.get(name) != value:
            raise UsageError(f"{name} must be {before.get(name)!r} as in the runs in {arguments.output}, got {value!r}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def run(arguments: argparse.Namespace, name: str, seed: int) -> Values:
    """Train and judge one variant, or read what an earlier run found."""
    config = train_config(arguments, name, seed)
    path = Path(config.output) / "scores.json"
    if path.is_file():
        values: Values = json.loads(path.read_text(encoding="utf-8"))["values"]
        return values
    log(f"{name}, seed {seed}")
    torch.compiler.reset()  # compiled code of the last run counts against the limit of recompilations
    result = train(config)
    values = judge(config, arguments, result["adapter"])
    write_json(path, {"loss": result["loss"], "values": values})
    return values


def judge(config: TrainConfig, arguments: argparse.Namespace, adapter: str) -> Values:
    """Values of each held-out concept, by task and metric."""
    pipe = RealGeneralPipeline.from_pretrained(config.base, adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    fold_single_frame(pipe.vae)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    height, width = pipe.image_size()
    # one seed for all variants: the same conditions and the same noise
    sampling = EvaluateConfig(
        steps=arguments.sample_steps, guidance_scale=arguments.guidance_scale,
        image_guidance_scale=arguments.image_guidance_scale, seed=0,
    )  # fmt: skip
    values: Values = {}
    for spec in config.tasks:
        task, pairs = get_task(spec).name, nano_pairs(spec, arguments.concepts, (width, height), seed=0)
        images = generate_all(pipe, pairs, sampling, task)
        values[task] = {metric: fn(images).tolist() for metric, fn in measures(task, pairs).items()}
        values[task][LOSS] = held_out_loss(pipe, pairs, config, sampling.batch_size).tolist()
    return values


@torch.no_grad()
def held_out_loss(pipe: RealGeneralPipeline, pairs: NanoPairs, config: TrainConfig, batch_size: int) -> Tensor:
    """Loss of each pair without dropout, mean over `LOSS_DRAWS` timesteps that are the same in every run, [B]."""
    plain, texts, losses = replace(config, text_dropout=0.0, condition_dropout=0.0, seed=0), TextCache(pipe), []
    for start in range(0, len(pairs.samples), batch_size):
        batch = collate(pairs.samples[start : start + batch_size]).to(pipe.device)
        drawn = []
        for i in range(LOSS_DRAWS):
            numbers = [(start + j) * LOSS_DRAWS + i for j in range(len(batch.names))]
            draws = Draws.of(plain, numbers, pipe.scheduler.config.num_train_timesteps)
            drawn.append(training_loss(pipe, pipe.transformer, texts, batch, draws))
        losses.append(torch.stack(drawn).mean(0).float().cpu())
    return torch.cat(losses)


@dataclass(frozen=True)
class Difference:
    """Variant minus its counterpart in one metric of one task, paired by seed and concept."""

    score: Score
    by_seed: tuple[float, ...]

    @property
    def holds(self) -> bool:
        """Whether the interval excludes 0 and all seeds agree in sign."""
        same_sign = all(x > 0 for x in self.by_seed) or all(x < 0 for x in self.by_seed)
        low, high = self.score.low, self.score.high
        return same_sign and low is not None and high is not None and not low <= 0 <= high


def difference(found: dict[str, dict[int, Values]], name: str, task: str, metric: str) -> Difference | None:
    """Over the seeds that both variants have; None if there are none.

    The interval is the bootstrap's over concepts, of differences averaged over these seeds: it says nothing of other seeds,
    hence the differences by seed beside it.
    """
    against = VARIANTS[name].against
    if against is None:
        return None
    own, other = found.get(name, {}), found.get(against, {})
    seeds = sorted(own.keys() & other.keys())
    if not seeds:
        return None
    pairs = [(torch.tensor(own[s][task][metric]), torch.tensor(other[s][task][metric])) for s in seeds]
    differences = torch.stack([a - b for a, b in pairs])
    concepts = [str(i) for i in range(differences.shape[1])]
    return Difference(bootstrap(differences.mean(0), concepts), tuple(differences.mean(1).tolist()))


def shown_metrics(task: str) -> tuple[str, str]:
    """The loss, and the metric that says most about a task."""
    return LOSS, SHOWN.get(task, "PSNR dB")


def markdown(found: dict[str, dict[int, Values]], setting: str) -> str:
    """Means of every variant, then differences with their intervals."""
    first = next(iter(next(iter(found.values())).values()))
    rows = [(task, metric) for task in first for metric in shown_metrics(task)]
    names = [name for name in VARIANTS if name in found]
    lines = ["# Ablations at nano's size", "", setting, ""]
    lines += [f"- **{name}** ({len(found[name])} seeds): {VARIANTS[name].what}" for name in names]
    lines += ["", "| task | metric | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for task, metric in rows:
        means = [torch.tensor([found[n][s][task][metric] for s in found[n]]).mean().item() for n in names]
        lines.append(f"| {task} | {_header(metric)} | " + " | ".join(f"{x:.4f}" for x in means) + " |")
    compared = [name for name in names if VARIANTS[name].against in found]
    if compared:
        titles = [f"{name} - {VARIANTS[name].against}" for name in compared]
        lines += ["", "| task | metric | " + " | ".join(titles) + " |", "|---" * (2 + len(compared)) + "|"]
        for task, metric in rows:
            cells = [_cell(difference(found, name, task, metric)) for name in compared]
            lines.append(f"| {task} | {_header(metric)} | " + " | ".join(cells) + " |")
        lines += [
            "",
            f"Paired by seed and concept: mean [95 % interval, bootstrap over concepts, {RESAMPLES} draws]; by seed.",
            "Bold: the interval excludes 0 and every seed agrees in sign. No correction for the number of comparisons.",
        ]
    return "\n".join(lines) + "\n"


def report(arguments: argparse.Namespace, found: dict[str, dict[int, Values]]) -> None:
    """Write table.md and results.json of the runs that are complete."""
    setting = (
        f"{arguments.steps} steps of {arguments.batch_size}, rank {arguments.rank}, learning rate {arguments.learning_rate:g}, "
        f"average {arguments.ema_decay:g}; {arguments.concepts} held-out concepts, {arguments.sample_steps} denoising steps, "
        f"guidance {arguments.guidance_scale:g}, image guidance {arguments.image_guidance_scale:g}; "
        f"loss over {LOSS_DRAWS} timesteps each."
    )
    differences = {
        name: {
            task: {metric: _record(difference(found, name, task, metric)) for metric in metrics}
            for task, metrics in next(iter(found[name].values())).items()
        }
        for name in found
        if VARIANTS[name].against in found
    }
    write_text(arguments.output / "table.md", markdown(found, setting))
    settings = json.loads((arguments.output / "settings.json").read_text(encoding="utf-8"))
    variants = {name: asdict(VARIANTS[name]) for name in found}
    record = {"settings": settings, "versions": library_versions(), "variants": variants, "differences": differences}
    write_json(arguments.output / "results.json", {**record, "values": found})


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/ablation"))
    parser.add_argument("--base", default="nano")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=list(NANO_TASKS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--ema-decay", type=float, default=0.99)
    parser.add_argument("--bf16", action="store_true", help="base in bfloat16, autocast")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--precomputed", default="", help="store of `realgeneral precompute` for these tasks; default: encode on the fly"
    )
    parser.add_argument("--concepts", type=int, default=100)
    parser.add_argument("--sample-steps", type=int, default=NANO_STEPS)
    parser.add_argument("--guidance-scale", type=float, default=NANO_GUIDANCE)
    parser.add_argument("--image-guidance-scale", type=float, default=NANO_GUIDANCE)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, seed by seed, so that a stopped recipe has compared all variants on the seeds it did."""
    arguments = parse(argv)
    check_settings(arguments)
    found: dict[str, dict[int, Values]] = {}
    for seed in arguments.seeds:
        for name in arguments.variants:
            found.setdefault(name, {})[seed] = run(arguments, name, seed)
            report(arguments, found)
    print((arguments.output / "table.md").read_text(encoding="utf-8"))


def _header(metric: str) -> str:
    return f"{metric} {'↓' if metric == LOSS else '↑'}"


def _cell(found: Difference | None) -> str:
    if found is None:
        return "-"
    low, high = (math.nan if x is None else x for x in (found.score.low, found.score.high))
    mean = f"**{found.score.mean:+.4f}**" if found.holds else f"{found.score.mean:+.4f}"
    return f"{mean} [{low:+.4f}, {high:+.4f}]; {' / '.join(f'{x:+.4f}' for x in found.by_seed)}"


def _record(found: Difference | None) -> dict[str, Any] | None:
    return None if found is None else {**found.score._asdict(), "by_seed": list(found.by_seed), "holds": found.holds}


if __name__ == "__main__":
    try:
        main()
    except (UsageError, Failure) as error:
        sys.exit(f"ablate: {error}")
