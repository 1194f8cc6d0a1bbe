"""The packaged nano model: data, weights, and that it does on held-out concepts what it is for."""

from __future__ import annotations

import io
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from PIL import Image, ImageColor

from realgeneral import RealGeneralPipeline
from realgeneral.commands.demo import demo
from realgeneral.data.samples import PairDataset
from realgeneral.data.sources.packaged import NANO_TASKS, TARGET_STYLES, NanoSource
from realgeneral.evaluation.evaluate import evaluate
from realgeneral.evaluation.metrics import edge_f1, psnr, retrieval_hits, ssim
from realgeneral.evaluation.nano_table import avatar_pairs, generate_all, interval, markdown, measures, nano_pairs
from realgeneral.model.adapter import read_adapter_info
from realgeneral.model.vae import decode_latents, encode_images, fold_single_frame
from realgeneral.nano.assets import ASSETS
from realgeneral.nano.colours import COLOURS, colour_words
from realgeneral.nano.emoji import EMOJI_PARQUET, STYLES, Concept, caption, load_emoji
from realgeneral.pictures import to_pixels
from realgeneral.settings.evaluate import EvaluateConfig
from realgeneral.settings.sampling import DemoConfig
from realgeneral.tasks import get_task
from recipes.train_vae import decoder_terms, latent_noise


@pytest.fixture(scope="module")
def pipe() -> RealGeneralPipeline:
    pipe = RealGeneralPipeline.from_pretrained("nano", adapter="nano")
    pipe.set_progress_bar_config(disable=True)
    fold_single_frame(pipe.vae)
    return pipe


def test_assets_are_small_and_licensed() -> None:
    """Pictures, weights and licences ship within their budgets: 6.5 MB of pictures, 35 MB of weights."""
    weights = list(ASSETS.rglob("*.safetensors"))
    assert {p.parent.name for p in weights} == {"vae", "transformer", "text_encoder", "adapter"}
    assert sum(p.stat().st_size for p in weights) < 35e6
    assert EMOJI_PARQUET.stat().st_size < 6.5e6
    assert {p.name for p in (ASSETS / "licenses").iterdir()} >= {"README.md", "APACHE-2.0.txt", "MIT-fluent-emoji.txt"}


def test_concepts_and_split() -> None:
    """About 1,500 concepts, 64 x 64 in each style, and no concept on both sides of the split."""
    train, test = load_emoji("train"), load_emoji("held_out")
    assert len(train) + len(test) == len(load_emoji()) >= 1500
    assert len(test) >= 150
    assert not {c.codepoint for c in train} & {c.codepoint for c in test}
    assert not {c.name for c in train} & {c.name for c in test}
    for concept in random.Random(0).sample(load_emoji(), 20):
        assert all(concept.image(style).size == (64, 64) for style in STYLES)
    with pytest.raises(ValueError, match="style must be one of"):
        train[0].image("oil")
    with pytest.raises(ValueError, match="split must be one of"):
        load_emoji("test")


def test_source_is_deterministic_and_paired() -> None:
    """A row is a function of (index, seed), and its reference shows the same concept in another style."""
    source = NanoSource("train")
    first, again, other = source.row(5, 1), source.row(5, 1), source.row(5, 2)
    assert np.array_equal(np.asarray(first.target), np.asarray(again.target))
    assert not np.array_equal(np.asarray(first.target), np.asarray(other.target))
    assert first.subject in first.prompt
    plain = NanoSource("held_out", augment=False).row(0, 0)
    concept = load_emoji("held_out")[0]
    assert plain.prompt == caption(concept, TARGET_STYLES[0], colour_words(concept.image(TARGET_STYLES[0])))
    references = [np.asarray(concept.image(style)) for style in TARGET_STYLES[1:]]
    assert any(np.array_equal(np.asarray(plain.reference), r) for r in references)
    dataset = PairDataset(source, NANO_TASKS, [], (64, 64), seed=0, strict=True)
    assert {dataset[n].task for n in range(60)} == {get_task(spec).name for spec in NANO_TASKS}


def test_target_and_reference_are_augmented_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference that is the target's own picture stays its equal: mirrored, rotated, moved and recoloured the same way."""
    monkeypatch.setattr(Concept, "image", lambda self, style, image=Concept.image: image(self, "flat"))
    source, plain = NanoSource("train"), NanoSource("train", augment=False)
    changed = []
    for seed in range(40):
        row = source.row(6, seed)
        assert row.reference is not None
        assert np.array_equal(np.asarray(row.target), np.asarray(row.reference))
        changed.append(not np.array_equal(np.asarray(row.target), np.asarray(plain.row(6, seed).target)))
    assert 20 < sum(changed) < 40


def test_colours_are_told_in_words() -> None:
    """Plain areas by their size, white and specks left out; a recoloured picture has other words."""

    def drawing(*areas: tuple[str, int]) -> Image.Image:
        pixels = [rgb for rgb, count in areas for _ in range(count)]
        picture = Image.new("RGB", (64, 64), "white")
        picture.putdata([ImageColor.getrgb(rgb) for rgb in pixels] + [(255, 255, 255)] * (64 * 64 - len(pixels)))
        return picture

    assert colour_words(drawing()) == ()
    assert colour_words(drawing(("#0067d6", 500), ("#ffc83d", 900), ("#f8312f", 60))) == ("yellow", "blue")
    named = {
        "#f8312f": "red", "#ff822d": "orange", "#ffc83d": "yellow", "#00d26a": "green", "#26c9c9": "cyan",
        "#0067d6": "blue", "#8d65c5": "purple", "#ff9db0": "pink", "#7d4533": "brown", "#9b9b9b": "grey", "#1c1c1c": "black",
    }  # fmt: skip
    assert {rgb: colour_words(drawing((rgb, 400))) for rgb in named} == {rgb: (name,) for rgb, name in named.items()}
    assert set(named.values()) == set(COLOURS)
    assert len(colour_words(drawing(*((rgb, 300) for rgb in list(named)[:8])))) == 3
    source = NanoSource("train")
    prompts = [source.row(5, seed).prompt.split(", ") for seed in range(100)]
    assert 60 < sum(len(parts) == 3 for parts in prompts) < 90
    assert len({parts[1] for parts in prompts if parts[0] == "emoji"}) > 3


def test_captions_fit_nanos_window(pipe: RealGeneralPipeline) -> None:
    """Every caption with its colours has at most 16 tokens."""
    captions = [caption(c, style, colour_words(c.image(style))) for c in load_emoji("held_out") for style in TARGET_STYLES]
    assert max(map(len, pipe.tokenizer(captions).input_ids)) <= pipe.transformer.config.max_text_seq_length


def test_base_is_a_stock_checkpoint() -> None:
    """The base folder loads in plain diffusers and makes a clip of two frames from text alone."""
    stock = CogVideoXPipeline.from_pretrained(ASSETS / "base", dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    frames = stock(
        "red heart, 3d render", num_frames=2, num_inference_steps=4, guidance_scale=3, max_sequence_length=16,
        output_type="pt", generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    assert frames.shape == (1, 2, 3, 64, 64)
    assert torch.isfinite(frames).all()


def test_vae_reconstructs_held_out_pictures(pipe: RealGeneralPipeline) -> None:
    """At least 29 dB on held-out pictures in every style, and on edge maps of them at least 25 dB."""
    concepts = load_emoji("held_out")[::20]
    for style in STYLES:
        pictures = [c.image(style) for c in concepts]
        assert _reconstruction_psnr(pipe, pictures) > 29
    edges = [get_task("canny").condition(c.image("3d"), 0) for c in concepts]
    assert _reconstruction_psnr(pipe, edges) > 25


def test_decoder_recipe_leaves_the_encoder() -> None:
    """Noise of the size that was asked for, and no gradient but the decoder's."""
    latent = torch.zeros(200, 8, 1, 16, 16)
    noise = latent_noise(latent, 0.3)
    sizes = noise.std(dim=(1, 2, 3, 4))
    assert sizes.max() < 0.36
    assert 0.12 < sizes.mean() < 0.18
    vae = fold_single_frame(AutoencoderKLCogVideoX.from_pretrained(ASSETS / "base" / "vae", torch_dtype=torch.float32))
    pixels = torch.stack([to_pixels(load_emoji("train")[0].image("3d"))])
    terms = decoder_terms(vae, pixels, torch.float32)
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is None for p in vae.encoder.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in vae.decoder.parameters())


def _reconstruction_psnr(pipe: RealGeneralPipeline, pictures: list[Image.Image]) -> float:
    pixels = torch.stack([to_pixels(p) for p in pictures])
    with torch.no_grad():
        decoded = decode_latents(pipe.vae, encode_images(pipe.vae, pixels))
    return psnr((decoded.clamp(-1, 1) + 1) / 2, (pixels + 1) / 2).mean().item()


def test_adapter_beats_copying_and_the_base(pipe: RealGeneralPipeline) -> None:
    """On held-out concepts, deblurring comes closer to the truth than its condition and than the stock base; colouring too.

    In dB of PSNR. The 150 concepts of docs/results.md give more room in colouring than these 8.
    """
    assert set(read_adapter_info(ASSETS / "adapter").task_names) == {get_task(spec).name for spec in NANO_TASKS}
    settings = EvaluateConfig(steps=8, batch_size=8, concepts=8)
    base = RealGeneralPipeline.from_pretrained("nano")
    base.set_progress_bar_config(disable=True)
    base.transformer.configure_condition(["colouring", "deblurring"], "open")
    for spec, above_copy, above_base in (("deblurring:radius=16.0", 1, 1), ("colouring", 0, 0)):
        pairs = nano_pairs(spec, settings.concepts, (64, 64), 0)
        made = interval(psnr(generate_all(pipe, pairs, settings), pairs.truth))[0]
        unadapted = interval(psnr(generate_all(base, pairs, replace(settings, image_guidance_scale=1.0)), pairs.truth))[0]
        copied = interval(psnr(pairs.conditions, pairs.truth))[0]
        assert made > copied + above_copy
        assert made > unadapted + above_base


def test_customization_gives_the_subject_the_state_that_is_asked_for(pipe: RealGeneralPipeline) -> None:
    """Held-out avatars: on the asked background, and with the asked face more often than the one in six of chance."""
    settings = EvaluateConfig(steps=8, batch_size=12, concepts=12)
    pairs = avatar_pairs(settings.concepts, (64, 64), 0)
    made = generate_all(pipe, pairs, settings)
    scores = measures("customization", pairs)
    assert scores["concept in asked state R@1"](made).mean() > 1 / 3
    assert scores["PSNR dB"](made).mean() > scores["PSNR dB"](pairs.conditions).mean() + 8


def test_metrics_know_identity_and_difference() -> None:
    """Each metric is perfect on equal pictures and clearly lower on another concept's."""
    concepts = load_emoji("held_out")[:8]
    truth = torch.stack([to_pixels(c.image("3d")) for c in concepts]) / 2 + 0.5
    other = truth.roll(1, 0)
    assert ssim(truth, truth).min() > 0.999 > ssim(other, truth).max()
    assert psnr(other, truth).max() < 30
    assert edge_f1(truth, truth).min() == 1.0
    assert edge_f1(other, truth).mean() < 0.8
    index = torch.arange(8)
    assert retrieval_hits(truth, truth, index).mean() == 1.0
    assert retrieval_hits(other, truth, index).mean() == 0.0
    assert retrieval_hits(other, truth, index, top=8).mean() == 1.0


def test_customization_is_measured_on_concept_and_style() -> None:
    """The truth is found in the style that was asked for; the condition, another style's picture, never."""
    pairs = nano_pairs("customization", 8, (64, 64), 0)
    scores = measures("customization", pairs)
    asked = scores["concept in asked state R@1"]
    assert asked(pairs.truth).min() == 1.0
    assert asked(pairs.conditions).max() == 0.0
    assert scores["same concept R@1"](pairs.conditions).mean() > 0


def test_evaluate_writes_table_json_and_grids(tmp_path) -> None:
    """`realgeneral evaluate` end to end at a tiny size."""
    results = evaluate(
        EvaluateConfig(output=str(tmp_path), tasks=["canny", "customization"], concepts=3, steps=1, batch_size=2)
    )
    assert list(results) == ["canny", "customization", "customization of face", "customization of style"]
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table == markdown(results)
    assert "edge F1" in table and "same concept R@1" in table
    for name in ("results.json", "canny.png", "customization.png", "customization-of-style.png"):
        assert (tmp_path / name).stat().st_size > 0


def test_demo_runs(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    """`realgeneral demo` end to end at a tiny size: pictures, metrics, and a table on the screen."""
    metrics = demo(DemoConfig(output=str(tmp_path), concepts=1, steps=1, train_steps=2))
    for name in ("grid.png", "loss.png", "before_after.png"):
        Image.open(io.BytesIO((tmp_path / name).read_bytes())).verify()
    assert len(metrics["training"]["losses"]) == 2
    printed = capsys.readouterr().out
    assert "colouring" in printed and "grid.png" in printed
