"""`rgkernels.patch`: stock CogVideoX models run on the ops and compute what they computed."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("diffusers")
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from peft import LoraConfig

import rgkernels
from rgkernels._patch import FusedCogVideoXBlock
from rgkernels.testing import assert_within_reference_error, outputs_and_grads
from tests.realgeneral.helpers.checkpoints import GEOMETRIES, TEXT_WINDOW, save_checkpoint, tiny_transformer
from tests.rgkernels.helpers.clips import clip_inputs


def run(model: CogVideoXTransformer3DModel, inputs: dict[str, object], **extra: object) -> torch.Tensor:
    return model(**inputs, **extra)[0]


@pytest.fixture(params=GEOMETRIES)
def model(request: pytest.FixtureRequest) -> CogVideoXTransformer3DModel:
    return tiny_transformer(request.param)


def check_parity(model: CogVideoXTransformer3DModel, impl: str, **extra: object) -> None:
    """Patched output within the tolerance rule of the stock one, against stock in float64."""
    inputs = clip_inputs(model)
    oracle = copy.deepcopy(model).double()
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        stock, truth = run(model, inputs, **extra), run(oracle, wide, **extra)
        rgkernels.patch(model, impl=impl)
        patched = run(model, inputs, **extra)
    assert all(type(block) is FusedCogVideoXBlock for block in model.transformer_blocks)
    assert_within_reference_error({"out": patched}, {"out": stock}, {"out": truth})


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_matches_stock(model: CogVideoXTransformer3DModel, impl: str) -> None:
    """A patched model of each geometry computes the stock output."""
    check_parity(model, impl)


def test_image_to_video_geometry() -> None:
    """The I2V variants: twice the input channels, learned positions, and 1.5's ofs embedding."""
    learned = tiny_transformer("5b", in_channels=8, use_learned_positional_embeddings=True, sample_frames=13)
    check_parity(learned, "reference")
    check_parity(tiny_transformer("1.5", in_channels=8, ofs_embed_dim=16), "reference", ofs=torch.full((1,), 2.0))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_gradients_match_stock(impl: str) -> None:
    """Gradients of a LoRA and of the inputs agree with stock, with and without gradient checkpointing."""
    model = tiny_transformer("5b")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    inputs = clip_inputs(model)
    inputs["hidden_states"].requires_grad_()
    upstream = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(1))

    def gradients(network: CogVideoXTransformer3DModel, wide: bool) -> dict[str, torch.Tensor]:
        moved = {
            k: v.detach().double() if wide and torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()
        }
        if wide:
            moved["hidden_states"].requires_grad_()
        results = outputs_and_grads(lambda **kw: run(network, kw), moved, [upstream])
        out = run(network, moved)
        wanted = [p for n, p in network.named_parameters() if "lora_" in n]
        # one vector: of a tensor of 64 elements, the largest rounding error is a matter of luck
        results["lora"] = torch.cat([g.flatten() for g in torch.autograd.grad(out, wanted, upstream.to(out.dtype))])
        return results

    stock, truth = gradients(model, False), gradients(copy.deepcopy(model).double(), True)
    rgkernels.patch(model, impl=impl)
    patched = gradients(model, False)
    assert patched["lora"].abs().sum() > 0
    assert_within_reference_error(patched, stock, truth)
    model.enable_gradient_checkpointing()
    checkpointed = gradients(model.train(), False)
    assert all(torch.equal(patched[k], checkpointed[k]) for k in patched)


def test_lora_scale_fused_projections_and_late_lora() -> None:
    """`attention_kwargs` scale, fused QKV, and a LoRA that is loaded after patching all take effect as in stock."""
    model = tiny_transformer("5b")
    model.fuse_qkv_projections()
    check_parity(model, "reference")

    model = rgkernels.patch(tiny_transformer("5b"), impl="reference")
    before = run(model, clip_inputs(model))
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with torch.no_grad():
        full = run(model, clip_inputs(model))
        half = run(model, clip_inputs(model), attention_kwargs={"scale": 0.5})
        rgkernels.unpatch(model)
        stock_half = run(model, clip_inputs(model), attention_kwargs={"scale": 0.5})
    assert not torch.equal(before, full)
    assert not torch.equal(full, half)
    torch.testing.assert_close(half, stock_half)


def test_keys_identity_and_unpatch(model: CogVideoXTransformer3DModel) -> None:
    """Patching changes no key and no parameter object, is idempotent, and unpatching restores the same bits."""
    inputs = clip_inputs(model)
    with torch.no_grad():
        before = run(model, inputs)
        state = {name: p.data_ptr() for name, p in model.state_dict().items()}
        assert rgkernels.patch(model, impl="reference") is model
        rgkernels.patch(model, impl="reference")
        assert {name: p.data_ptr() for name, p in model.state_dict().items()} == state
        rgkernels.unpatch(model)
        rgkernels.unpatch(model)
        after = run(model, inputs)
    assert all(type(block) is CogVideoXBlock for block in model.transformer_blocks)
    assert torch.equal(before, after)


# PyTorch's own compiler instantiates autograd functions while tracing them, which PyTorch deprecates
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_patched_model_compiles_to_one_graph(model: CogVideoXTransformer3DModel) -> None:
    """fullgraph, on the reference: the patched model's own output to rounding."""
    inputs = clip_inputs(model)
    rgkernels.patch(model, impl="reference")
    torch._dynamo.reset()  # graphs of other models count towards the limit of recompilations
    with torch.no_grad():
        wanted = run(model, inputs)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        actual = compiled(**inputs)[0]
    assert (actual - wanted).abs().max() <= 1e2 * torch.finfo(torch.float32).eps * wanted.abs().max()


def test_pipeline(tmp_path: object) -> None:
    """A whole pipeline is patched through its transformer and generates the same clip."""
    pipe = CogVideoXPipeline.from_pretrained(save_checkpoint(tmp_path, "5b"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "height": 64, "width": 96, "num_frames": 9, "output_type": "pt"}

    def clip() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe("a red fox", max_sequence_length=TEXT_WINDOW, generator=generator, **arguments).frames

    stock = clip()
    assert rgkernels.patch(pipe, impl="reference") is pipe
    torch.testing.assert_close(clip(), stock, atol=1e-4, rtol=1e-4)


def test_errors() -> None:
    """What cannot be patched says why, and nothing is half patched."""
    with pytest.raises(TypeError, match="must be a CogVideoXTransformer3DModel"):
        rgkernels.patch(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="must be a CogVideoXTransformer3DModel"):
        rgkernels.patch(object())
    model = tiny_transformer("5b")
    with pytest.raises(ValueError, match="impl must be one of"):
        rgkernels.patch(model, impl="cuda")

    model.transformer_blocks[1].attn1.norm_q = None
    with pytest.raises(ValueError, match="attention of block 1 must have QK-norm, got none"):
        rgkernels.patch(model)
    assert type(model.transformer_blocks[0]) is CogVideoXBlock
    model = rgkernels.patch(tiny_transformer("5b"), impl="reference")
    with pytest.raises(NotImplementedError, match="attention_mask"):
        run(model, clip_inputs(model), attention_kwargs={"attention_mask": torch.ones(1)})
