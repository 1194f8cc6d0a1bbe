"""One protocol from the folder to the table: cases, generation, scores, report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from realgeneral.errors import Failure, UsageError
from realgeneral.evaluation.cases import Case, captioned_cases, chosen, readable, repeated, subject_cases
from realgeneral.evaluation.encoders import loading
from realgeneral.evaluation.generator import CaseGenerator, weights_fingerprint
from realgeneral.evaluation.metrics import Score, frechet_distance
from realgeneral.evaluation.report import grid, markdown, paper_record
from realgeneral.evaluation.scores import Scorer, SpatialScorer, SubjectEncoders, SubjectScorer, summary
from realgeneral.files import locked, write_json, write_text
from realgeneral.generation.bases import load_pipeline
from realgeneral.generation.pipeline import RealGeneralPipeline
from realgeneral.model.adapter import read_adapter_info
from realgeneral.model.adapter_info import library_versions
from realgeneral.pictures import save_picture
from realgeneral.prompts import cut_prompt
from realgeneral.settings.evaluate import EvaluateConfig
from realgeneral.settings.sampling import sampling
from realgeneral.tasks import Depth, Task, get_task

GRID_ROWS = 12


def run_protocol(config: EvaluateConfig) -> dict[str, dict[str, Score]]:
    """Generate what is missing, score it, and write `table.md`, `results.json` and `grid.png`.

    Returns:
        Scores by method ("adapter", "copy condition") and metric.

    Raises:
        UsageError: A setting does not fit the protocol, the adapter or the base.
        Failure: Data, a model or a picture cannot be read, or the output cannot be written.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output = Path(config.output)
    task = protocol_task(config)
    cases, bad = protocol_cases(config)
    new_scorer = scorers(config, task, device)  # before the hours of generation: its models may be missing
    pipe = open_pipeline(config, device)
    height, width = pipe.image_size(config.height or None, config.width or None)
    cases, bad = prepared(config, pipe, cases, bad)
    generator = CaseGenerator(pipe, task, config, (width, height), output / "images")
    try:
        generator.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"output must be a folder that can be written, got {output}: {error.strerror}") from None
    with locked(output):
        return _generate_and_score(config, generator, cases, bad, new_scorer)


def _generate_and_score(
    config: EvaluateConfig, generator: CaseGenerator, cases: list[Case], bad: list[str], new_scorer: Callable[[], Scorer]
) -> dict[str, dict[str, Score]]:
    made = generator.run(cases)
    print(f"{made} pictures generated, {len(cases) - made} kept from an earlier run", flush=True)

    results, values = {}, {}
    methods: dict[str, Callable[[Case, Image.Image], Image.Image]] = {
        "adapter": lambda case, picture: generator.result(case),
        "copy condition": lambda case, picture: generator.condition(picture),
    }
    for method, result in methods.items():
        scorer = new_scorer()
        for start in tqdm(range(0, len(cases), config.batch_size), desc=f"scoring {method}", unit="batch"):
            part = cases[start : start + config.batch_size]
            pictures = [generator.picture(case) for case in part]
            scorer.update(part, [result(c, p) for c, p in zip(part, pictures, strict=True)], pictures)
        results[method] = summary(scorer, [case.group for case in cases])
        values[method] = {name: x.tolist() for name, x in scorer.values().items()}
    _write(config, generator, cases, bad, results, values)
    return results


def protocol_task(config: EvaluateConfig) -> Task:
    """The adapter's own task of a protocol; for depth with the model that is named."""
    spec = read_adapter_info(config.adapter).task_spec(config.protocol)
    if config.protocol != "depth":
        return get_task(spec)
    if not config.depth_model:
        raise UsageError("--depth-model must name a transformers depth model for the depth protocol, got none")
    return Depth(model=config.depth_model)


def protocol_cases(config: EvaluateConfig) -> tuple[list[Case], list[str]]:
    """What is to be generated, and what is wrong with rows that are not."""
    if not config.data:
        raise UsageError(f"--data must name a folder for the {config.protocol} protocol, got none")
    if config.protocol == "customization":
        cases, bad = subject_cases(Path(config.data)), list[str]()
    else:
        cases, bad = captioned_cases(config.data, config.columns, config.allow_outside)
    return chosen(repeated(cases, config.images_per_prompt), config.limit), bad


def prepared(
    config: EvaluateConfig, pipe: RealGeneralPipeline, cases: list[Case], bad: list[str]
) -> tuple[list[Case], list[str]]:
    """Cut prompts if asked to, name the bad rows, those whose picture cannot be read too; Failure if no other is left."""
    window = pipe.transformer.geometry.text_window
    if config.truncate_prompts:
        cases = [replace(case, prompt=cut_prompt(pipe.tokenizer, case.prompt, window)) for case in cases]
    problems: dict[str, str] = {}
    for case in cases:
        try:
            pipe.check_prompts([case.prompt], window, "; --truncate-prompts cuts it")
        except UsageError as error:
            problem = f"{case.row or case.name}: {error}"
            if config.protocol == "customization":  # DreamBench is the benchmark: none of it may be missing
                raise UsageError(problem) from None
            problems[case.group] = problem
    cases, bad = [case for case in cases if case.group not in problems], [*bad, *problems.values()]
    if config.protocol != "customization":
        cases, unreadable = readable(cases)
        bad = [*bad, *unreadable]
    if not cases:
        raise Failure(f"data must hold good rows, got {len(bad)} bad ones; the first: {bad[0]}")
    for problem in bad:
        print(f"bad row: {problem}")
    if bad:
        print(f"{len(bad)} bad rows are skipped", flush=True)
    return cases, bad


def scorers(config: EvaluateConfig, task: Task, device: torch.device) -> Callable[[], Scorer]:
    """A function that makes a fresh scorer; whatever it needs has been loaded once."""
    if config.protocol == "customization":
        encoders = SubjectEncoders.load(config, device)
        return lambda: SubjectScorer(encoders)
    distance = None if config.fid_features == "none" else frechet_distance(config.fid_features, device)
    if isinstance(task, Depth):
        with loading(task.model, "depth-model"):
            task.depth(Image.linear_gradient("L").convert("RGB"))
    return lambda: SpatialScorer(task, distance)


def open_pipeline(config: EvaluateConfig, device: torch.device) -> RealGeneralPipeline:
    """Base and adapter, quiet, on the device or offloaded."""
    if config.offload and device.type == "cpu":
        raise UsageError("--offload needs a GPU, found none")
    pipe = load_pipeline(config.base, getattr(torch, config.dtype), adapter=config.adapter)
    pipe.set_progress_bar_config(disable=True)
    if config.offload:
        pipe.enable_model_cpu_offload()
        return pipe
    return pipe.to(device)


def _write(
    config: EvaluateConfig,
    generator: CaseGenerator,
    cases: list[Case],
    bad: list[str],
    results: dict[str, dict[str, Score]],
    values: dict[str, dict[str, list[float]]],
) -> None:
    output, (width, height) = Path(config.output), generator.size
    steps, prompt_scale, image_scale = sampling(config, generator.task.name)
    setting = (
        f"Adapter {config.adapter} on {config.base}, {config.data}, {width} x {height} px, {steps} steps "
        f"({type(generator.pipe.scheduler).__name__}), guidance {prompt_scale:g}, "
        f"image guidance {image_scale:g}, seed {config.seed}."
    ) + (f" {len(bad)} bad rows were skipped." if bad else "")
    text = markdown(config.protocol, results, len(cases), setting)
    write_text(output / "table.md", text)
    assert generator.pipe.adapter is not None
    record = {
        "config": asdict(config),
        "versions": library_versions(),
        "adapter": asdict(generator.pipe.adapter),
        "weights": weights_fingerprint(generator.pipe),
        "count": len(cases),
        "bad_rows": bad,
        "results": {m: {name: score._asdict() for name, score in scores.items()} for m, scores in results.items()},
        "paper": paper_record(config.protocol),
        "cases": [
            {"name": case.name, "row": case.row or case.name, "prompt": case.prompt, "group": case.group} for case in cases
        ],
        "values": values,
    }
    write_json(output / "results.json", record)
    shown = chosen(cases, GRID_ROWS)
    pictures = [generator.picture(case) for case in shown]
    columns = ("reference", "result") if config.protocol == "customization" else ("condition", "result", "truth")
    rows = [
        [generator.condition(picture), generator.result(case), picture][: len(columns)]
        for case, picture in zip(shown, pictures, strict=True)
    ]
    save_picture(grid(rows, columns, [case.prompt for case in shown]), output / "grid.png")
    print(text)
