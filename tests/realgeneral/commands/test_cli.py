"""The command line: one line per error, the right exit status, a traceback only on demand, nothing half-written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline

from realgeneral import RealGeneralPipeline, __version__
from realgeneral.commands import cli
from realgeneral.commands.cli import main
from realgeneral.model.adapter import CONDITION_FILE, save_adapter
from realgeneral.model.adapter_info import adapter_info
from tests.realgeneral.helpers.models import TASKS, trained_model
from tests.realgeneral.helpers.pictures import bomb, make_photo

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="session")
def adapters(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter per geometry; the one of 5b is the normal one."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("5b", "2b"):
        model = trained_model(bases[name], "cached").float()
        save_adapter(model, folder / name, adapter_info(model, TASKS, str(bases[name])))
    return {name: folder / name for name in ("5b", "2b")}


@pytest.fixture
def work(tmp_path: Path, bases: dict[str, Path], adapters: dict[str, Path]) -> dict[str, str]:
    """What a user has on disk, good and bad."""
    make_photo().save(tmp_path / "photo.png")
    data = (tmp_path / "photo.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "bomb.png").write_bytes(bomb(30_000, 30_000))
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures").mkdir()
    make_photo(48, 32).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("a red pot")
    (tmp_path / "truncated").mkdir()
    for file in adapters["5b"].iterdir():
        content = file.read_bytes()
        (tmp_path / "truncated" / file.name).write_bytes(content[: len(content) // 2 if file.name == CONDITION_FILE else None])
    names = ("photo.png", "cut.png", "text.png", "bomb.png", "empty", "pictures", "truncated")
    return {
        **{name: str(tmp_path / name) for name in names},
        "base": str(bases["5b"]), "newer": str(bases["1.5"]), "adapter": str(adapters["5b"]), "other": str(adapters["2b"]),
        "out": str(tmp_path / "made" / "out.png"), "run": str(tmp_path / "made" / "run"), "root": str(tmp_path),
    }  # fmt: skip


@pytest.fixture
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a base, which takes minutes for a large one, fails the test."""

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(CogVideoXPipeline, "from_pretrained", loaded)


def generate_args(work: dict[str, str], **changes: str | None) -> list[str]:
    options: dict[str, str | None] = {
        "base": work["base"], "adapter": work["adapter"], "prompt": "a red pot", "task": "canny", "picture": work["photo.png"],
        "output": work["out"], "height": "32", "width": "48", "steps": "1", **changes,
    }  # fmt: skip
    return ["generate", *(part for key, value in options.items() if value is not None for part in (f"--{key}", value))]


def train_args(work: dict[str, str], **changes: str | None) -> list[str]:
    options: dict[str, str | None] = {
        "base": work["base"], "data": work["pictures"], "tasks": "canny", "output": work["run"], "height": "16", "width": "32",
        "rank": "2", "steps": "1", "batch-size": "1", "sample-count": "0", **changes,
    }  # fmt: skip
    return ["train", *(part for key, value in options.items() if value is not None for part in (f"--{key}", value))]


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int) -> str:
    """Run in-process; the one line of stderr."""
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    (line,) = captured.err.splitlines()
    assert line.startswith("realgeneral ")
    return line


# --- the command itself --------------------------------------------------------------------------------------------------


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a command the usage is shown and the status is 2; --help is the same with status 0."""
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.count("usage: realgeneral COMMAND") == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints the package's."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"realgeneral {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in cli.COMMANDS), ["train", "--stepz", "3"], ["trian"]]
)
def test_help_and_typing_errors_import_no_models(arguments: list[str]) -> None:
    """They answer at once: neither torch nor diffusers nor transformers is imported, which takes seconds."""
    code = (
        f"import sys; from realgeneral.commands.cli import main\ntry: main({arguments})\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'numpy', 'PIL') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_help_is_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    """Options stand under headings, in one spelling, and no empty default is printed."""
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    for heading in ("data:", "method:", "optimization:", "memory and speed:", "several processes:", "progress:", "run:"):
        assert f"\n{heading}\n" in out
    assert "(default: )" not in out
    assert "--batch-size" in out
    assert "--batch_size" not in out


def test_mistyped_options_name_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    """One hint; a value that looks like nothing gets none."""
    assert "got --stepz 3; did you mean --steps? (realgeneral train" in fails(capsys, ["train", "--stepz", "3"], 2)
    assert "got stray (realgeneral train" in fails(capsys, ["train", "stray"], 2)


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The error lists the commands."""
    assert main(["trian"]) == 2
    err = capsys.readouterr().err
    commands = ["demo", "check-data", "precompute", "train", "generate", "evaluate"]
    assert err == f"realgeneral: command must be one of {commands}, got 'trian'\n"


def test_a_list_given_twice(capsys: pytest.CaptureFixture[str]) -> None:
    """The first values would be lost."""
    assert main(["train", "--tasks", "canny", "--tasks=colouring"]) == 2
    assert "--tasks must be given once, with all its values after it, got 2 times" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "train", "generate", "evaluate"])
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--help lists every option with its meaning and ends with status 0."""
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"realgeneral {command}" in out
    assert "--seed" in out
    assert "random seed" in out or "seed of everything" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--stepz", "3"], "--stepz 3"),
        (["train", "--steps", "many"], "invalid int value: 'many'"),
        (["train", "--preset", "fast"], "invalid choice: 'fast'"),
        (["train", "--step", "3"], "--step 3"),
        (["train", "--steps"], "expected one argument"),
        (["train", "stray"], "stray"),
        (["train", "--steps", "0"], "steps must be at least 1, got 0"),
        (["train", "--learning-rate", "0"], "learning_rate must be positive, got 0.0"),
        (["train", "--learning-rate", "3e38"], "learning_rate must be at most 1e10, got 3e+38"),
        (["train", "--text-dropout", "2"], "text_dropout must be between 0 and 1, got 2.0"),
        (["train", "--num-workers", "-1"], "num_workers must not be negative, got -1"),
        (["train", "--tasks", "canny", "--task-weights", "1", "2"], "task_weights must have one entry per task (1), got 2"),
        (["train", "--tasks", "canny", "--task-weights", "2"], "task_weights must come with several tasks, got [2.0]"),
        (["train", "--tasks", "canny", "--task-weights", "0"], "task_weights must not be negative and not all 0"),
        (["generate"], "--prompt must be given, got none"),
        (["generate", "--prompt", "a"], "--task must be given, got none"),
        (["generate", "--prompt", "a", "--task", "canny"], "one of --condition and --picture must be given, got neither"),
        (["generate", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["demo", "--concepts", "0"], "concepts must be at least 1, got 0"),
        (["evaluate", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["train", "--variants", "-1"], "variants must not be negative, got -1"),
        (["train", "--buckets"], "expected at least one argument"),
        (["check-data", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["check-data", "--num-workers", "-1"], "num_workers must not be negative, got -1"),
        (["check-data", "--columns", "picture=x", "--data", "."], "field of --columns must be one of"),
        (
            ["check-data", "--base", "nano", "--buckets", "60x60"],
            "sides of buckets must be positive multiples of 8 of at most 16384, got 60x60",
        ),
        (["train", "--weight-decay", "nan"], "weight_decay must be finite, got nan"),
        (["train", "--learning-rate", "inf"], "learning_rate must be finite, got inf"),
        (["train", "--tasks", "canny", "--task-weights", "nan"], "task_weights must be finite, got nan"),
        (["generate", "--guidance-scale", "inf"], "guidance_scale must be finite, got inf"),
        (["demo", "--guidance-scale", "nan"], "guidance_scale must be finite, got nan"),
        (["evaluate", "--guidance-scale=-inf"], "guidance_scale must be finite, got -inf"),
        (["train", "--deepspeed-config", "x.json"], "deepspeed_config has no effect without --engine deepspeed, got 'x.json'"),
        (["train", "--sample-count", "0", "--sample-every", "5"], "sample_every has no effect with --sample-count 0, got 5"),
        (["train", "--sample-count", "0", "--guidance-scale", "2"], "guidance_scale has no effect with --sample-count 0"),
        (["demo", "--train-steps", "0", "--train-task", "canny"], "train_task has no effect with --train-steps 0, got 'canny'"),
        (
            ["generate", "--prompt", "a", "--task", "canny:low=5", "--condition", "edges.png"],
            "task options have no effect with --condition, which is taken as it is, got 'canny:low=5'",
        ),
        (
            "generate --prompt a --task canny --guidance-scale 1 --image-guidance-scale 1 --negative-prompt b".split(),
            "negative_prompt has no effect without guidance (both scales of 1 or less), got 'b'",
        ),
        (["train", "--seed", str(2**70)], f"seed must be between 0 and 4294967295, got {2**70}"),
        (["generate", "--seed", "9" * 23], f"seed must be between 0 and 4294967295, got {'9' * 23}"),
        (["generate", "--condition-seed", "-2"], "condition_seed must be between -1 and 4294967295, got -2"),
        (["demo", "--seed", "-1"], "seed must be between 0 and 4294967295, got -1"),
        (["evaluate", "--seed", str(2**32)], "seed must be between 0 and 4294967295, got 4294967296"),
        (["evaluate", "--adapter", ""], "adapter must be a folder or \"nano\", got ''"),
        (["precompute", "--variants", "0"], "variants must be at least 1, got 0"),
        (["precompute", "--shard", "2/2"], "shard must be \"i/n\" with 0 <= i < n, got '2/2'"),
    ],
)
def test_wrong_options(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    """Every wrong option is one line that names it, with status 2."""
    assert message in fails(capsys, arguments, 2)


# --- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"height": "40"}, 2, "height must be a positive multiple of 16, got 40"),
        ({"width": "-16"}, 2, "width must be a positive multiple of 16, got -16"),
        ({"task": "cany"}, 2, "task must be one of"),
        ({"task": "depth"}, 2, "task must be one that the adapter was trained for, ['canny', 'colouring'], got 'depth'"),
        ({"task": "canny:low=x"}, 2, "option low of task 'canny' must be of type int, got 'x'"),
        ({"picture": "{root}/nothing.png"}, 1, "nothing.png must be a picture file, got no such file"),
        ({"picture": "{root}/cut.png"}, 1, "cut.png must be a complete picture file"),
        ({"picture": "{root}/text.png"}, 1, "text.png must be a picture file, got something that is not an image"),
        ({"picture": "{root}/bomb.png"}, 1, "bomb.png must have at most 100000000 pixels"),
        ({"picture": "{root}/empty"}, 1, "empty must be a picture file, got a folder"),
        ({"picture": None, "condition": "{root}/cut.png"}, 1, "cut.png must be a complete picture file"),
        ({"condition": "{root}/photo.png"}, 2, "one of --condition and --picture must be given, got both"),
        ({"mask": "{root}/photo.png"}, 2, "--mask must come with --picture and --task inpainting"),
        ({"condition-seed": "3"}, 2, "condition_seed has no effect without --picture and a task that draws"),
        ({"adapter": "{other}"}, 2, "adapter must be for this base, got one trained on '2b'"),
        ({"adapter": "{root}/empty"}, 1, "must hold realgeneral.safetensors, found none"),
        ({"adapter": "{root}/truncated"}, 1, "must be a complete safetensors file"),
        ({"adapter": "{root}/nothing"}, 1, "must hold realgeneral.safetensors, found none"),
        ({"base": "{root}/nothing"}, 1, "base must be a checkpoint folder or a hub id that can be had, got {root}/nothing: "),
        ({"base": "{root}/empty"}, 1, "base must be a CogVideoX checkpoint, got {root}/empty without model_index.json"),
        ({"prompt": "a cat " * 30}, 2, "prompt must have at most 12 tokens, got "),
        ({"negative_prompt": "a cat " * 30}, 2, "prompt must have at most 12 tokens, got "),
        ({"subject": "fox"}, 2, "subject must occur in the prompt 'a red pot', got 'fox'"),
        ({"base": "{newer}", "height": "336", "adapter": ""}, 2, "height must be at most 320, got 336"),
        ({"output": "{root}/out.jpg"}, 2, "output must be a .png file, got"),
        ({"output": "{root}/empty"}, 2, "output must be a .png file, got"),
        (
            {"output": "{root}/photo.png/x.png"},
            1,
            "output must be in a folder that can be written, got {root}/photo.png/x.png where {root}/photo.png is a file",
        ),
        ({"steps": "0"}, 2, "steps must be at least 1, got 0"),
        ({"steps": "2000"}, 2, "steps must be between 1 and 1000, got 2000"),
        ({"num-images": "0"}, 2, "num_images must be at least 1, got 0"),
        ({"task": "customization"}, 2, "--condition must be given for task 'customization', which makes none of a picture"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
@pytest.mark.usefixtures("_no_weights")
def test_bad_input_of_generate(
    work: dict[str, str], capsys: pytest.CaptureFixture[str], changes: dict[str, Any], status: int, message: str
) -> None:
    """Every bad input is one line with the thing's name and the right status, before the base is loaded; no file is made."""
    filled = {key: value if value is None else value.format(**work) for key, value in changes.items()}
    before = sorted(p for p in Path(work["root"]).rglob("*"))
    assert message.format(**work) in fails(capsys, generate_args(work, **filled), status)
    assert sorted(p for p in Path(work["root"]).rglob("*")) == before


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--train-task", "nope"], "task must be one that the adapter was trained for, "),
        (["demo", "--steps", "2000"], "steps must be between 1 and 1000, got 2000"),
        (["evaluate", "--tasks", "canny", "nope"], "task must be one that the adapter was trained for, "),
        (["evaluate", "--steps", "2000"], "steps must be between 1 and 1000, got 2000"),
    ],
)
def test_wrong_options_of_demo_and_evaluate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """Told before a model is loaded; no folder is made."""
    assert message in fails(capsys, [*arguments, "--output", str(tmp_path / "out")], 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize("arguments", [["demo"], ["evaluate"], ["evaluate", "--protocol", "canny", "--data", "."]])
def test_output_that_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    """An output that is a file, or below one, is named before any work; the file stays."""
    file = tmp_path / "file"
    file.write_text("x")
    for path in (file, file / "out"):
        told = fails(capsys, [*arguments, "--output", str(path)], 1)
        assert (
            told
            == f"realgeneral {arguments[0]}: output must be a folder that can be written, got {path} where {file} is a file"
        )
    assert file.read_text() == "x"


@pytest.mark.parametrize(("command", "file"), [("generate", True), ("train", False), ("evaluate", False)])
def test_output_that_is_read_only(
    work: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, file: bool
) -> None:
    """A folder in which nothing can be written is named before any work."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    arguments = {"generate": generate_args, "train": train_args}.get(command, lambda _: [command, "--output", work["run"]])(
        work
    )
    told = fails(capsys, arguments, 1)
    assert told.endswith(f"that can be written, got {work['out' if file else 'run']} where {work['root']} is read-only")


@pytest.mark.skipif(torch.cuda.is_available(), reason="offload works here")
def test_offload_without_a_gpu(work: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """--offload on a machine without GPU is a usage error."""
    assert "--offload needs a GPU, found none" in fails(capsys, [*generate_args(work), "--offload"], 2)


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"height": "20"}, 2, "height must be a positive multiple of 16, got 20"),
        ({"tasks": "cany"}, 2, "task must be one of"),
        ({"data": "{root}/nothing"}, 1, "data must be an existing folder or file, got"),
        ({"data": "{root}/empty"}, 1, "data must hold at least one row, got none in"),
        ({"data": "{root}/text.png"}, 2, "data must be a folder, a .parquet or a .tar file, got"),
        ({"init-adapter": "{other}"}, 2, "adapter must be for this base, got one trained on '2b'"),
        ({"init-adapter": "{adapter}", "tasks": None, "preset": "paper"}, 2, "adapter must be of preset 'paper'"),
        ({"output": "{root}/photo.png"}, 1, "output must be a folder that can be written"),
        ({"precomputed": "{root}/empty"}, 1, "precomputed must be a folder that realgeneral precompute wrote, got"),
        ({"buckets": "16x20"}, 2, "sides of buckets must be positive multiples of 16 of at most 16384, got 16x20"),
        ({"columns": "target=x"}, 2, "columns must not be given for a folder of pictures with captions"),
        ({"base": "{root}/nothing"}, 1, "base must be a checkpoint folder or a hub id that can be had, got {root}/nothing: "),
        ({"base": "{root}/empty"}, 1, "base must be a CogVideoX checkpoint, got {root}/empty without model_index.json"),
        ({"init-adapter": "{root}/empty"}, 1, "must hold realgeneral.safetensors, found none"),
        ({"precomputed": "{root}/nothing"}, 1, "precomputed must be a folder that realgeneral precompute wrote, got"),
        ({"lora-targets": "nonsense"}, 2, "LoRA target must name linear layers of the base"),
        ({"sample-count": "1", "sample-steps": "5000"}, 2, "sample_steps must be between 1 and 1000, got 5000"),
        pytest.param(
            {"optimizer": "adamw8bit"},
            2,
            "--optimizer adamw8bit needs a CUDA device, found none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device"),
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
@pytest.mark.usefixtures("_no_weights")
def test_bad_input_of_train(
    work: dict[str, str], capsys: pytest.CaptureFixture[str], changes: dict[str, Any], status: int, message: str
) -> None:
    """The same for training: told before the base is loaded, and no folder is made."""
    filled = {key: value if value is None else value.format(**work) for key, value in changes.items()}
    assert message.format(**work) in fails(capsys, train_args(work, **filled), status)
    assert not Path(work["run"]).exists()


@pytest.mark.parametrize("debug", ["--debug", "--debug=true"])
def test_debug_shows_the_traceback(work: dict[str, str], capsys: pytest.CaptureFixture[str], debug: str) -> None:
    """--debug prints the traceback before the same last line and keeps the status."""
    arguments = [*generate_args(work, picture=f"{work['root']}/nothing.png"), debug]
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.strip().splitlines()[-1].startswith("realgeneral generate: ")


def test_debug_false_shows_none(work: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """It is what it says."""
    fails(capsys, [*generate_args(work, picture=f"{work['root']}/nothing.png"), "--debug", "false"], 1)


def test_unforeseen_errors_are_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An error of a library, of several lines, is one line with its type, status 1; an interrupt is 130."""

    def broken(config: Any) -> None:
        raise RuntimeError("first line\n  second line")

    def interrupted(config: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "demo", cli.COMMANDS["demo"]._replace(run=broken))
    assert fails(capsys, ["demo"], 1) == "realgeneral demo: RuntimeError: first line second line"
    monkeypatch.setitem(cli.COMMANDS, "demo", cli.COMMANDS["demo"]._replace(run=interrupted))
    assert fails(capsys, ["demo"], 130) == "realgeneral demo: interrupted"


# --- good input ----------------------------------------------------------------------------------------------------------


def test_train_then_generate(work: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """The two commands in a row: the adapter that one leaves is what the other takes."""
    assert main(train_args(work)) == 0
    out = capsys.readouterr().out
    assert "0 rows skipped; adapter in " in out
    assert main(generate_args(work, adapter=f"{work['run']}/adapter")) == 0
    assert capsys.readouterr().out.strip() == work["out"]
    assert Path(work["out"]).is_file()


def test_check_precompute_train(work: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """The three commands of a data set, one after the other."""
    common = ["--base", work["base"], "--data", work["pictures"], "--tasks", "canny", "--height", "16", "--width", "32"]
    assert main(["check-data", *common]) == 0
    assert "1 rows, 0 bad, 0 duplicates" in capsys.readouterr().out
    store = f"{work['root']}/made/store"
    assert main(["precompute", *common, "--output", store]) == 0
    assert f"4 entries encoded, 0 there already, 0 of 1 rows bad; store in {store}" in capsys.readouterr().out
    assert main(train_args(work, precomputed=store)) == 0
    assert "0 rows skipped" in capsys.readouterr().out


def test_real_processes(work: dict[str, str]) -> None:
    """`python -m realgeneral`: usage without a command, one line for a bad file, a picture for a good one."""
    root = str(Path(cli.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "realgeneral", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    usage = run()
    assert usage.returncode == 2
    assert usage.stdout.startswith("usage: ")
    bad = run(*generate_args(work, picture=f"{work['root']}/cut.png"))
    assert bad.returncode == 1
    assert bad.stderr.count("\n") == 1
    assert bad.stderr.startswith("realgeneral generate: ")
    good = run(*generate_args(work))
    assert good.returncode == 0, good.stderr
    assert good.stdout.strip() == work["out"]


def test_lazy_package() -> None:
    """The package gives its two classes by name and nothing else."""
    import realgeneral

    assert realgeneral.RealGeneralPipeline is RealGeneralPipeline
    with pytest.raises(AttributeError, match="module 'realgeneral' has no attribute 'nothing'"):
        realgeneral.nothing  # noqa: B018


def test_errors_of_the_system_are_words(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is told with the file, without a number."""

    def full(config: Any) -> None:
        raise OSError(28, "No space left on device", "out/a.png")

    monkeypatch.setitem(cli.COMMANDS, "check-data", cli.COMMANDS["check-data"]._replace(run=full))
    assert main(["check-data"]) == 1
    assert capsys.readouterr().err == "realgeneral check-data: out/a.png: no space left on device\n"


def test_names_that_the_terminal_cannot_print(tmp_path: Path) -> None:
    """In an encoding without their characters they are printed as escapes, and the run ends well."""
    make_photo().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a pot")
    make_photo().save(tmp_path / "\xfcn\xef \U0001f98a.png")
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes((tmp_path / "a.png").read_bytes())
    command = [sys.executable, "-m", "realgeneral", "check-data", "--data", str(tmp_path), "--tasks", "canny"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False)
    assert done.returncode == 1
    assert rb"\xfcn\xef \U0001f98a.png must have a caption" in done.stdout
    assert rb"caf\udce9.png must have a caption" in done.stdout
    assert b"2 of 3 rows" in done.stderr
