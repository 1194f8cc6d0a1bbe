"""Launch parameters of every kernel, as data; see `launch_table.py` for how a row is found and what fields mean.

A key is (architecture, dtype, size class); 1048576 is Triton's widest block. `python -m benchmarks.tune` writes this file anew,
with the measurement behind each row that it looked at. Rows without one were chosen from counts of registers, spills and shared
memory in binaries (docs/kernels.md, docs/kernels-attention.md).
"""

from typing import Any

Key = tuple[str, str, int]

LAUNCHES: dict[str, dict[Key, tuple[int | None, ...]]] = {
    # block_s, num_warps
    "adaln_fwd": {
        ("any", "any", 128): (16, 4),
        ("any", "any", 256): (8, 4),
        ("any", "any", 512): (4, 4),
        ("any", "any", 1024): (4, 4),
        ("any", "any", 2048): (2, 4),
        ("any", "any", 4096): (2, 4),
        ("any", "any", 8192): (1, 8),
        ("any", "any", 16384): (1, 16),
        ("any", "any", 1048576): (1, 32),
        ("sm_90", "half", 4096): (2, 4),
        ("sm_90", "half", 2048): (2, 4),
    },
    # block_s, num_warps, num_stages, programs_per_sm, maxnreg
    "adaln_bwd": {
        ("any", "any", 128): (16, 8, 3, 2, None),
        ("any", "any", 256): (8, 8, 3, 2, None),
        ("any", "any", 512): (4, 8, 3, 2, None),
        ("any", "any", 1024): (2, 8, 3, 2, None),
        ("any", "any", 2048): (1, 8, 3, 2, None),
        ("any", "any", 4096): (1, 8, 3, 2, 128),
        ("any", "any", 8192): (1, 16, 3, 1, None),
        ("any", "any", 1048576): (1, 32, 3, 1, None),
        ("sm_100", "any", 4096): (1, 16, 3, 1, None),
        ("sm_90", "half", 4096): (1, 8, 3, 1, 128),
        ("sm_90", "half", 2048): (1, 8, 3, 2, None),
    },
    # block_p, block_c, num_warps
    "adaln_bwd_reduce": {
        ("any", "any", 1048576): (32, 64, 4),
    },
    # block_p, block_c, num_warps
    "adaln_bwd_affine": {
        ("any", "any", 1048576): (8, 128, 4),
    },
    # elements, max_heads, num_warps, num_stages, programs_per_sm
    "qk_norm_rope_fwd": {
        ("any", "any", 64): (2048, 16, 8, 1, 1),
        ("any", "any", 1048576): (2048, 16, 8, 1, 1),
        ("sm_90", "half", 64): (2048, 16, 4, 1, 1),
    },
    # elements, max_heads, num_warps, num_stages, programs_per_sm
    "qk_norm_rope_bwd": {
        ("any", "any", 64): (2048, 16, 8, 2, 3),
        ("any", "any", 1048576): (2048, 16, 8, 2, 3),
        ("sm_90", "half", 64): (2048, 16, 4, 2, 3),
    },
    # elements, max_heads, num_warps, num_stages, programs_per_sm
    "qk_norm_rope_bwd_trained": {
        ("any", "any", 64): (2048, 16, 8, 2, 2),
        ("any", "any", 1048576): (2048, 16, 8, 2, 2),
    },
    # block_s, num_warps
    "qk_norm_rope_bwd_reduce": {
        ("any", "any", 1048576): (128, 8),
    },
    # block_m, block_n, tail, num_warps, num_stages, maxnreg
    "attn_fwd": {
        ("sm_80", "half", 32): (128, 64, 32, 8, 3, None),
        ("sm_80", "half", 64): (128, 64, 32, 8, 3, None),
        ("sm_80", "half", 128): (128, 32, 16, 8, 3, None),
        ("sm_86", "half", 32): (128, 64, 32, 8, 3, None),
        ("sm_86", "half", 64): (128, 64, 32, 8, 3, None),
        ("sm_86", "half", 128): (128, 32, 16, 8, 3, None),
        ("sm_89", "half", 32): (128, 64, 32, 8, 3, None),
        ("sm_89", "half", 64): (128, 64, 32, 8, 3, None),
        ("sm_89", "half", 128): (128, 32, 16, 8, 3, None),
        ("sm_90", "half", 32): (128, 64, 32, 8, 3, None),
        ("sm_90", "half", 64): (128, 128, 32, 8, 3, 128),
        ("sm_90", "half", 128): (128, 64, 32, 8, 3, None),
        ("sm_100", "half", 32): (128, 64, 32, 8, 3, None),
        ("sm_100", "half", 64): (128, 64, 32, 8, 3, None),
        ("sm_100", "half", 128): (128, 64, 32, 8, 2, None),
        ("gfx942", "half", 32): (128, 64, 32, 4, 1, None),
        ("gfx942", "half", 64): (128, 64, 32, 4, 1, None),
        ("gfx942", "half", 128): (128, 64, 32, 4, 1, None),
        ("any", "float32", 32): (32, 32, 16, 4, 1, 255),
        ("any", "float32", 64): (32, 32, 16, 4, 1, 255),
        ("any", "float32", 128): (16, 16, 16, 4, 1, 255),
        ("gfx942", "float32", 32): (32, 32, 16, 4, 1, None),
        ("gfx942", "float32", 64): (32, 32, 16, 4, 1, None),
        ("gfx942", "float32", 128): (32, 16, 16, 4, 1, None),
        ("interpreter", "any", 32): (64, 32, 16, 4, 1, None),
        ("interpreter", "any", 64): (64, 32, 16, 4, 1, None),
        ("interpreter", "any", 128): (64, 32, 16, 4, 1, None),
    },
    # block_m, block_n, tail, num_warps, num_stages, maxnreg
    "attn_bwd_dkdv": {
        ("sm_80", "half", 32): (64, 64, 32, 4, 3, None),
        ("sm_80", "half", 64): (32, 128, 16, 8, 3, None),
        ("sm_80", "half", 128): (64, 64, 16, 8, 2, None),
        ("sm_86", "half", 32): (64, 64, 32, 4, 3, None),
        ("sm_86", "half", 64): (32, 128, 16, 8, 3, None),
        ("sm_86", "half", 128): (64, 64, 16, 8, 2, None),
        ("sm_89", "half", 32): (64, 64, 32, 4, 3, None),
        ("sm_89", "half", 64): (32, 128, 16, 8, 3, None),
        ("sm_89", "half", 128): (64, 64, 16, 8, 2, None),
        ("sm_90", "half", 32): (64, 128, 32, 8, 3, None),
        ("sm_90", "half", 64): (32, 128, 32, 8, 3, None),
        ("sm_90", "half", 128): (32, 64, 16, 8, 2, None),
        ("sm_100", "half", 32): (64, 64, 16, 4, 3, 168),
        ("sm_100", "half", 64): (64, 128, 32, 8, 2, None),
        ("sm_100", "half", 128): (32, 64, 16, 8, 2, None),
        ("gfx942", "half", 32): (32, 64, 16, 4, 1, None),
        ("gfx942", "half", 64): (64, 64, 16, 4, 1, None),
        ("gfx942", "half", 128): (32, 64, 16, 4, 1, None),
        ("any", "float32", 32): (16, 32, 16, 4, 1, 255),
        ("any", "float32", 64): (16, 32, 16, 4, 1, 255),
        ("any", "float32", 128): (16, 16, 16, 4, 1, 255),
        ("gfx942", "float32", 32): (32, 32, 16, 4, 1, None),
        ("gfx942", "float32", 64): (32, 32, 16, 4, 1, None),
        ("gfx942", "float32", 128): (16, 16, 16, 4, 1, None),
        ("interpreter", "any", 32): (32, 64, 16, 4, 1, None),
        ("interpreter", "any", 64): (32, 64, 16, 4, 1, None),
        ("interpreter", "any", 128): (32, 64, 16, 4, 1, None),
    },
    # block_m, block_n, tail, num_warps, num_stages, maxnreg
    "attn_bwd_dq": {
        ("sm_80", "half", 32): (128, 64, 16, 8, 2, 168),
        ("sm_80", "half", 64): (128, 64, 16, 8, 3, None),
        ("sm_80", "half", 128): (128, 32, 16, 8, 2, None),
        ("sm_86", "half", 32): (128, 64, 16, 8, 2, 168),
        ("sm_86", "half", 64): (128, 64, 32, 8, 3, None),
        ("sm_86", "half", 128): (128, 32, 16, 8, 2, None),
        ("sm_89", "half", 32): (128, 64, 16, 8, 2, 168),
        ("sm_89", "half", 64): (128, 64, 32, 8, 3, None),
        ("sm_89", "half", 128): (128, 32, 16, 8, 2, None),
        ("sm_90", "half", 32): (128, 64, 32, 8, 3, None),
        ("sm_90", "half", 64): (128, 64, 32, 8, 3, 128),
        ("sm_90", "half", 128): (128, 64, 16, 8, 2, None),
        ("sm_100", "half", 32): (128, 64, 32, 8, 2, 128),
        ("sm_100", "half", 64): (128, 64, 32, 8, 2, None),
        ("sm_100", "half", 128): (128, 64, 16, 8, 2, None),
        ("gfx942", "half", 32): (64, 64, 16, 4, 1, None),
        ("gfx942", "half", 64): (64, 64, 16, 4, 1, None),
        ("gfx942", "half", 128): (64, 64, 16, 4, 1, None),
        ("any", "float32", 32): (32, 16, 16, 4, 1, 255),
        ("any", "float32", 64): (32, 16, 16, 4, 1, 255),
        ("any", "float32", 128): (16, 16, 16, 4, 1, 255),
        ("sm_100", "float32", 64): (16, 16, 16, 4, 1, 255),
        ("gfx942", "float32", 32): (32, 32, 16, 4, 1, None),
        ("gfx942", "float32", 64): (32, 32, 16, 4, 1, None),
        ("gfx942", "float32", 128): (16, 16, 16, 4, 1, None),
        ("interpreter", "any", 32): (64, 32, 16, 4, 1, None),
        ("interpreter", "any", 64): (64, 32, 16, 4, 1, None),
        ("interpreter", "any", 128): (64, 32, 16, 4, 1, None),
    },
    # block_s, num_warps
    "attn_bwd_delta": {
        ("any", "any", 1048576): (64, 4),
    },
}

# milliseconds are medians: of the row before, and of this row
MEASURED: dict[str, dict[Key, dict[str, Any]]] = {
    "attn_fwd": {
        ("sm_90", "half", 64): {
            "launch_before": (128, 128, 32, 8, 3, 128),
            "ms_before_after": {
                "5b-480x720-b1": (0.2592, 0.2592),
                "5b-1024x1024-b1": (1.82118, 1.82118),
            },
            "looked_at": 47,
            "device": "NVIDIA H100 80GB HBM3",
            "versions": "driver 580.159.04, CUDA 13.0, torch 2.11.0+cu130, Triton 3.6.0",
            "commit": "e767243abb1228e03bd56d30c4f91f7e7cee8b28",
            "dirty": False,
            "date": "2026-11-26T15:14:27+00:00",
        },
    },
    "attn_bwd_dkdv": {
        ("sm_90", "half", 64): {
            "launch_before": (32, 128, 32, 8, 3, None),
            "ms_before_after": {
                "5b-480x720-b1": (0.5817, 0.5817),
                "5b-1024x1024-b1": (3.88578, 3.88578),
            },
            "looked_at": 46,
            "device": "NVIDIA H100 80GB HBM3",
            "versions": "driver 580.159.04, CUDA 13.0, torch 2.11.0+cu130, Triton 3.6.0",
            "commit": "e767243abb1228e03bd56d30c4f91f7e7cee8b28",
            "dirty": False,
            "date": "2026-11-26T15:14:54+00:00",
        },
    },
    "attn_bwd_dq": {
        ("sm_90", "half", 64): {
            "launch_before": (128, 64, 32, 8, 3, 128),
            "ms_before_after": {
                "5b-480x720-b1": (0.30482, 0.30482),
                "5b-1024x1024-b1": (2.09058, 2.09058),
            },
            "looked_at": 47,
            "device": "NVIDIA H100 80GB HBM3",
            "versions": "driver 580.159.04, CUDA 13.0, torch 2.11.0+cu130, Triton 3.6.0",
            "commit": "e767243abb1228e03bd56d30c4f91f7e7cee8b28",
            "dirty": False,
            "date": "2026-11-26T15:15:11+00:00",
        },
    },
    "adaln_bwd": {
        ("sm_90", "half", 4096): {
            "launch_before": (1, 8, 3, 1, 128),
            "ms_before_after": {
                "5b-480x720-b1": (0.05078, 0.05078),
                "5b-1024x1024-b1": (0.11771, 0.11771),
            },
            "looked_at": 28,
            "device": "NVIDIA H100 80GB HBM3",
            "versions": "driver 580.159.04, CUDA 13.0, torch 2.11.0+cu130, Triton 3.6.0",
            "commit": "e767243abb1228e03bd56d30c4f91f7e7cee8b28",
            "dirty": False,
            "date": "2026-11-26T15:15:14+00:00",
        },
        ("sm_90", "half", 2048): {
            "launch_before": (1, 8, 3, 2, None),
            "ms_before_after": {
                "2b-480x720-b1": (0.03933, 0.03933),
                "2b-1024x1024-b1": (0.08318, 0.08318),
            },
            "looked_at": 28,
            "device": "NVIDIA H100 80GB HBM3",
            "versions": "driver 580.159.04, CUDA 13.0, torch 2.11.0+cu130, Triton 3.6.0",
            "commit": "e767243abb1228e03bd56d30c4f91f7e7cee8b28",
            "dirty": False,
            "date": "2026-11-26T15:15:21+00:00",
        },
    },
    "adaln_fwd": {
        ("sm_90", "half", 4096): {
            "launch_before": (2, 4),
            "ms_before_after": {
                "5b-480x720-b1": (0.03003, 0.03003),
                "5b-1024x1024-b1": (0.07498, 0.07498),
            },
            "looked_at": 6,
            "device": "NVIDIA H100 80GB HBM3",
            "versions": "driver 580.159.04, CUDA 13.0, torch 2.11.0+cu130, Triton 3.6.0",
            "commit": "e767243abb1228e03bd56d30c4f91f7e7cee8b28",
            "dirty": False,
            "date": "2026-11-26T15:15:16+00:00",
        },
        ("sm_90", "half", 2048): {
            "launch_before": (2, 4),
            "ms_before_after": {
                "2b-480x720-b1": (0.02048, 0.02048),
                "2b-1024x1024-b1": (0.04883, 0.04883),
            },
            "looked_at": 6,
            "device": "NVIDIA H100 80GB HBM3",
            "versions": "driver 580.159.04, CUDA 13.0, torch 2.11.0+cu130, Triton 3.6.0",
            "commit": "e767243abb1228e03bd56d30c4f91f7e7cee8b28",
            "dirty": False,
            "date": "2026-11-26T15:15:22+00:00",
        },
    },
    "qk_norm_rope_bwd": {
        ("sm_90", "half", 64): {
            "launch_before": (2048, 16, 4, 2, 3),
            "ms_before_after": {
                "5b-480x720-b1": (0.046, 0.046),
                "5b-1024x1024-b1": (0.11669, 0.11669),
            },
            "looked_at": 12,
            "device": "NVIDIA H100 80GB HBM3",
            "versions": "driver 580.159.04, CUDA 13.0, torch 2.11.0+cu130, Triton 3.6.0",
            "commit": "e767243abb1228e03bd56d30c4f91f7e7cee8b28",
            "dirty": False,
            "date": "2026-11-26T15:15:18+00:00",
        },
    },
    "qk_norm_rope_fwd": {
        ("sm_90", "half", 64): {
            "launch_before": (2048, 16, 4, 1, 1),
            "ms_before_after": {
                "5b-480x720-b1": (0.03066, 0.03066),
                "5b-1024x1024-b1": (0.07712, 0.07712),
            },
            "looked_at": 6,
            "device": "NVIDIA H100 80GB HBM3",
            "versions": "driver 580.159.04, CUDA 13.0, torch 2.11.0+cu130, Triton 3.6.0",
            "commit": "e767243abb1228e03bd56d30c4f91f7e7cee8b28",
            "dirty": False,
            "date": "2026-11-26T15:15:19+00:00",
        },
    },
}
