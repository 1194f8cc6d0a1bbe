"""Bases in parts: what is loaded, what is not, fingerprints of files, and the kernels that were asked for."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from realgeneral import RealGeneralPipeline
from realgeneral.errors import Failure, UsageError
from realgeneral.generation.bases import fingerprints, lent, load_for_data, load_pipeline, use_kernels
from tests.realgeneral.helpers.checkpoints import tiny_text_encoder

CPU = torch.device("cpu")


def test_data_needs_no_weights(base: Path, tmp_path: Path) -> None:
    """Sizes, text window and tokenizer come from a folder without any weights."""
    for part in ("transformer", "vae", "tokenizer"):
        shutil.copytree(base / part, tmp_path / part, ignore=shutil.ignore_patterns("*.safetensors"))
    pipe = load_for_data(str(tmp_path))
    assert pipe.size_multiple == 16
    assert pipe.image_size() == ((320, 320) if pipe.transformer.config.patch_size_t else (64, 96))
    shutil.rmtree(tmp_path / "vae")
    with pytest.raises(Failure, match=r"base must be a CogVideoX checkpoint, got .* without vae"):
        load_for_data(str(tmp_path))


@pytest.mark.parametrize("name", ["/nowhere", "owner/nothing"])
def test_a_base_that_is_not_there(name: str) -> None:
    """Neither a folder nor a hub id that is at hand (the tests are offline): one line with its name."""
    with pytest.raises(Failure, match=rf"base must be a checkpoint folder or a hub id that can be had, got {name}: ."):
        load_for_data(name)


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("tokenizer/tokenizer.json", "{"),
        ("transformer/config.json", '{"num_layers": "six"}'),
        ("transformer/config.json", '{"in_channels": 32}'),
        ("text_encoder/model.safetensors", "cut"),
    ],
)
def test_damaged_parts_name_the_base(base: Path, tmp_path: Path, part: str, text: str) -> None:
    """Whatever the libraries raise, and say, for a damaged file."""
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / part).write_text(text)
    with pytest.raises(Failure, match=r"base must be a CogVideoX checkpoint that can be read, got .*/base: \S"):
        load_pipeline(str(tmp_path / "base"), torch.float32)


def test_nano_sizes_without_its_vae() -> None:
    """Its VAE has factor 4 where diffusers would take 8."""
    pipe = load_for_data("nano")
    assert (pipe.image_size(), pipe.size_multiple) == ((64, 64), 8)
    assert pipe.vae is pipe.text_encoder is None


def test_a_part_that_is_left_out(bases: dict[str, Path]) -> None:
    """The VAE is frozen and folded as beside a text encoder, which is not there."""
    pipe = load_pipeline(str(bases["5b"]), torch.bfloat16, text_encoder=None)
    assert pipe.text_encoder is None
    assert pipe.vae.dtype == pipe.transformer.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in pipe.vae.parameters())


def test_lent_for_a_moment() -> None:
    """A model is back afterwards, also after an error."""
    moves: list[Any] = []
    module = SimpleNamespace(device="cpu", to=moves.append)

    def use() -> None:
        with lent(module, torch.device("cuda")):
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert moves == [torch.device("cuda"), "cpu"]


def test_fingerprints_follow_the_files(bases: dict[str, Path], tmp_path: Path) -> None:
    """Each encoder has its own; a copy has the same, changed weights have another."""
    shutil.copytree(bases["5b"], tmp_path / "copy")
    before = fingerprints(str(bases["5b"]))
    assert fingerprints(str(tmp_path / "copy")) == before
    tiny_text_encoder(seed=1).save_pretrained(tmp_path / "copy" / "text_encoder")
    vae, text = fingerprints(str(tmp_path / "copy"))
    assert vae == before[0]
    assert text != before[1]
    shutil.rmtree(tmp_path / "copy" / "vae")
    with pytest.raises(Failure, match="vae must hold the files of a model, found none"):
        fingerprints(str(tmp_path / "copy"))


def test_reference_unless_asked(pipe: RealGeneralPipeline) -> None:
    """Without the option the model runs on plain PyTorch."""
    use_kernels(pipe.transformer, False, CPU)
    assert pipe.transformer.impl == "reference"


def test_missing_parts_are_named(pipe: RealGeneralPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA and interpreter, or without Triton, the error says what is missing, and the model stays as it was."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UsageError, match="--fused-kernels cannot run here: impl='triton' needs CUDA tensors, got cpu tensors"):
        use_kernels(pipe.transformer, True, CPU)
    monkeypatch.setattr("rgkernels._impl.HAS_TRITON", False)
    with pytest.raises(UsageError, match=r"--fused-kernels cannot run here: .*triton package, found none"):
        use_kernels(pipe.transformer, True, CPU)
    assert pipe.transformer.impl == "reference"


def test_interpreter_counts(pipe: RealGeneralPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """With TRITON_INTERPRET=1 kernels run on CPU tensors."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    use_kernels(pipe.transformer, True, CPU)
    assert pipe.transformer.impl == "triton"
