"""LayerNorm of queries and keys over the head size, and rotary position embedding, in one pass.

Letters: B batch, H heads, S tokens, D head size.
"""

from __future__ import annotations

from torch import Tensor

from rgkernels import reference
from rgkernels._checks import check_affine, check_device, check_eps, check_rank, check_tensor
from rgkernels._impl import resolve


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    *,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rope_start: int = 0,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """LayerNorm over each head of q and k, then the rotation of tokens from `rope_start` on.

        n = LayerNorm_D(x) * weight + bias
        y[2i]     = n[2i]     * cos[2i]     - n[2i + 1] * sin[2i]         for tokens s >= rope_start
        y[2i + 1] = n[2i + 1] * cos[2i + 1] + n[2i]     * sin[2i + 1]
        y = n                                                            for tokens s <  rope_start

    Args:
        q: Queries, [B, H, S, D], float16 / bfloat16 / float32; any strides with a contiguous last dim, such as a view of a
            packed projection.
        k: Keys, as `q`.
        q_weight: LayerNorm weight of q, [D], dtype of `q` or float32; None = 1.
        q_bias: LayerNorm bias of q, [D]; None = 0.
        k_weight: LayerNorm weight of k, [D].
        k_bias: LayerNorm bias of k, [D].
        cos: Cosines, [S - rope_start, D], float32, interleaved pairs (diffusers' convention); None = no rotation.
        sin: Sines, as `cos`; both or neither.
        rope_start: First token that is rotated (text tokens come before it).
        eps: Added to the variance.
        impl: "auto" picks "triton" for CUDA tensors and "reference" otherwise. A named choice never falls back.

    Returns:
        (q, k), each [B, H, S, D], dtype and memory order ([B, S, H, D] or [B, H, S, D]) of its input. Gradients for q, k and
        the weights and biases; none for cos and sin.

    Raises:
        ValueError: A shape, stride, dtype or device disagrees (the message names the argument and both values).
        RuntimeError: `impl="triton"` cannot run here.

    Note:
        Statistics, arithmetic and rotation in float32, one rounding at the output; deterministic forward and backward.

    Source:
        diffusers `CogVideoXAttnProcessor2_0` (norm_q, norm_k) and `apply_rotary_emb(use_real_unbind_dim=-1)`.
    """
    _check_qk(q, k, q_weight, q_bias, k_weight, k_bias, eps)
    _check_rope(q, cos, sin, rope_start)
    if resolve(impl, q.device) == "triton":
        from rgkernels._triton import qk_norm_rope as triton_impl

        return triton_impl.qk_norm_rope(q, k, q_weight, q_bias, k_weight, k_bias, cos, sin, rope_start, eps)
    return (
        reference.qk_norm_rope(q, q_weight, q_bias, cos, sin, rope_start, eps),
        reference.qk_norm_rope(k, k_weight, k_bias, cos, sin, rope_start, eps),
    )


def _check_qk(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    eps: float,
) -> None:
    check_rank("q", q, "B, H, S, D")
    check_tensor("q", q, tuple(q.shape), "B, H, S, D")
    check_tensor("k", k, tuple(q.shape), "B, H, S, D", like=q)
    for name, affine in {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}.items():
        check_affine(name, affine, q.shape[-1], "D", q)
    check_eps(eps)


def _check_rope(q: Tensor, cos: Tensor | None, sin: Tensor | None, rope_start: int) -> None:
    seq_len, head_dim = q.shape[2], q.shape[3]
    if not 0 <= rope_start <= seq_len:
        raise ValueError(f"rope_start must be in 0..S = 0..{seq_len}, got {rope_start}")
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must be given together, got only one of them")
    if cos is None or sin is None:
        return
    if head_dim % 2:
        raise ValueError(f"D must be even to rotate pairs, got {head_dim}")
    for name, table in {"cos": cos, "sin": sin}.items():
        check_tensor(name, table, (seq_len - rope_start, head_dim), "S - rope_start, D")
        check_device(name, table, q)
