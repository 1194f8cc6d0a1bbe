"""Compile a recorded launch ahead of time, for any target and without its GPU, and read figures from the binary.

NVIDIA figures come from the cubin, through the cuobjdump and nvdisasm that ship inside the Triton wheel; AMD figures from the
assembly text. Not usable under TRITON_INTERPRET=1, where kernels are not compiled at all.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton._utils import find_paths_if, get_iterable_path
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.launches.record import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

Figures = dict[str, int]


def specialise(launch: Launch, target: str) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """(signature, constants, attributes) of a launch, asked of Triton's own launcher: what its kernel cache is keyed by."""
    kernel, backend = launch.kernel, make_backend(TARGETS[target])
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, found, _ = binder(**launch.arguments)
    types, keys = [kind for kind, _ in found], [key for _, key in found]
    signature = dict(zip((p.name for p in kernel.params), types, strict=True))
    values = list(bound.values())
    constants = {path: get_iterable_path(values, path) for path in find_paths_if(types, lambda _, kind: kind == "constexpr")}
    paths = find_paths_if(keys, lambda _, key: isinstance(key, str))
    attributes = {path: backend.parse_attr(get_iterable_path(keys, path)) for path in paths}
    return signature, constants, attributes


def compile_launch(launch: Launch, target: str) -> Any:
    """Compile a launch for a target, specialised as Triton's JIT would."""
    source = triton.compiler.ASTSource(launch.kernel, *specialise(launch, target))
    return triton.compile(source, target=TARGETS[target], options={k: v for k, v in launch.options.items() if v is not None})


def figures(compiled: Any, target: str) -> Figures:
    """Registers, spills, shared memory, access widths and instruction counts of one binary."""
    if target.startswith("gfx"):
        return _amd_figures(compiled)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", cubin)
        code = _tool("nvdisasm", "-c", cubin)
    return _nvidia_figures(compiled, usage, code)


def _tool(name: str, *args: Any) -> str:
    command = [str(_TOOLS / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _nvidia_figures(compiled: Any, usage: str, code: str) -> Figures:
    resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", code, re.MULTILINE)
    loads = [_width(op) for op in opcodes if op.startswith(("LDG.", "LDGSTS."))]
    stores = [_width(op) for op in opcodes if op.startswith("STG")]
    return {
        "registers": resources.get("REG", 0),
        "stack": resources.get("STACK", 0) + resources.get("LOCAL", 0),
        "spills": sum(op.startswith(("LDL", "STL")) for op in opcodes),
        "shared": int(compiled.metadata.shared),
        "barriers": sum(op.startswith("BAR.") for op in opcodes),
        "loads_16b": sum(width == 16 for width in loads),
        "loads": len(loads),
        "stores_16b": sum(width == 16 for width in stores),
        "stores": len(stores),
        "async_loads": sum(op.startswith("LDGSTS.") for op in opcodes),
        "mma": sum(op.startswith(("HMMA", "HGMMA", "UTCHMMA", "UTCOMMA")) for op in opcodes),
        "wgmma": sum(op.startswith("HGMMA") for op in opcodes),
        "tma": sum(op.startswith(("UTMA", "UBLKCP")) for op in opcodes),
        "mufu": sum(op.startswith("MUFU") for op in opcodes),
        "instructions": len(opcodes),
    }


def _width(opcode: str) -> int:
    for suffix, width in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1), (".256", 32)):
        if suffix in opcode:
            return width
    return 4


def _amd_figures(compiled: Any) -> Figures:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    loads = re.findall(r"\b(?:global|buffer)_load_\w+", text)
    stores = re.findall(r"\b(?:global|buffer)_store_\w+", text)
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "shared": int(compiled.metadata.shared),
        "barriers": len(re.findall(r"\bs_barrier\b", text)),
        "loads_16b": sum("dwordx4" in op for op in loads),
        "loads": len(loads),
        "stores_16b": sum("dwordx4" in op for op in stores),
        "stores": len(stores),
        "mma": len(re.findall(r"\bv_mfma_\w+", text)),
        "mufu": len(re.findall(r"\bv_(?:exp|log|rsq|sqrt|rcp|sin|cos)_f32", text)),
        "instructions": len(re.findall(r"^\s+(?:v|s|global|buffer|ds|flat)_\w+", text, re.MULTILINE)),
    }
