"""Static report: what the compiled kernels use, on any machine, compared with the committed baseline.

    python -m benchmarks.static_report                      table of every variant, then the comparison; exit 1 on a regression
    python -m benchmarks.static_report --write              make this the baseline for the installed Triton
    python -m benchmarks.static_report --match sm_90 adaln  only names that hold all these words
    python -m benchmarks.static_report --json FILE          the figures as JSON

Every kernel variant is compiled ahead of time for sm_80, sm_86, sm_89, sm_90, sm_100 and gfx942. Figures are read from the
binaries and are those of the whole kernel. Another version of Triton gives other figures: the baseline is keyed by the version,
and a version without one is reported, not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BASELINE = Path(__file__).parent / "static_baseline.json"

# figure -> what a regression is
MUST_NOT_GROW = ("spills", "stack", "registers", "shared", "narrow_loads", "narrow_stores")
MUST_NOT_FALL = ("programs_per_sm", "mma", "wgmma", "tma", "async_loads")
COLUMNS = (
    "registers", "spills", "stack", "shared", "programs_per_sm", "loads", "narrow_loads", "stores", "narrow_stores",
    "async_loads", "barriers", "mma", "wgmma", "tma", "mufu", "instructions",
)  # fmt: skip

# per multiprocessor: registers, warps, programs, shared memory of which each program takes 1 KiB more than it asks for
LIMITS = {
    "sm_80": (65536, 64, 32, 164 * 1024),
    "sm_86": (65536, 48, 16, 100 * 1024),
    "sm_89": (65536, 48, 24, 100 * 1024),
    "sm_90": (65536, 64, 32, 228 * 1024),
    "sm_100": (65536, 64, 32, 228 * 1024),
}

Report = dict[str, dict[str, int]]


def collect(match: tuple[str, ...] = ()) -> Report:
    """Compile every variant whose name holds all of `match`: "target/variant/kernel" -> figures."""
    from benchmarks.launches.binaries import compile_launch, figures

    report: Report = {}
    for name, target, launch in named_launches(match):
        found = figures(compile_launch(launch, target), target)
        found["narrow_loads"] = found["loads"] - found.pop("loads_16b")
        found["narrow_stores"] = found["stores"] - found.pop("stores_16b")
        if target in LIMITS:
            found["programs_per_sm"] = programs_per_sm(target, found, launch.options.get("num_warps", 4))
        report[name] = found
    return report


def named_launches(match: tuple[str, ...] = ()) -> Iterator[tuple[str, str, Any]]:
    """(name, target, launch) of every variant."""
    from benchmarks.launches import variants, variants_attention

    for module in (variants, variants_attention):
        for variant, target, launches in module.variants():
            seen: dict[str, int] = {}
            for launch in launches:
                seen[launch.name] = seen.get(launch.name, 0) + 1
                suffix = f"#{seen[launch.name]}" if seen[launch.name] > 1 else ""
                name = f"{target}/{variant}/{launch.name}{suffix}"
                if all(word in name for word in match):
                    yield name, target, launch


def programs_per_sm(target: str, figures: dict[str, int], num_warps: int) -> int:
    """Programs that fit a multiprocessor by registers (allocated in eights, per warp), warps and shared memory."""
    registers, warps, programs, shared = LIMITS[target]
    per_warp = -(-max(figures["registers"], 1) // 8) * 8 * 32
    by_shared = shared // (figures["shared"] + 1024)
    return min(registers // (per_warp * num_warps), warps // num_warps, programs, by_shared)


def compare(current: Report, baseline: Report, *, whole: bool = True) -> list[str]:
    """Regressions against a baseline, one message per figure that moved the wrong way.

    Args:
        current: Figures of this build.
        baseline: Figures of the committed one, by the same version of Triton.
        whole: Also report variants of the baseline that are gone, and new ones; False for a partial report.
    """
    messages = []
    for name, was in baseline.items():
        if name not in current:
            messages += [f"{name}: in the baseline, but not compiled any more"] if whole else []
            continue
        for figure in (*MUST_NOT_GROW, *MUST_NOT_FALL):
            old, new = was.get(figure, 0), current[name].get(figure, 0)
            if new > old and figure in MUST_NOT_GROW:
                messages.append(f"{name}: {figure} grew from {old} to {new}")
            elif new < old and figure in MUST_NOT_FALL:
                messages.append(f"{name}: {figure} fell from {old} to {new}")
    if whole:
        messages += [f"{name}: new, not in the baseline (run with --write)" for name in current if name not in baseline]
    return messages


def read_baseline(triton_version: str, path: Path = BASELINE) -> Report | None:
    """The committed figures of one version of Triton, or None if that version has none."""
    if not path.exists():
        return None
    report: Report | None = json.loads(path.read_text())["triton"].get(triton_version)
    return report


def write_baseline(report: Report, triton_version: str, path: Path = BASELINE) -> None:
    """Replace one version's figures, one line per variant so that a diff names what moved."""
    versions = json.loads(path.read_text())["triton"] if path.exists() else {}
    versions[triton_version] = report
    lines = []
    for version, rows in sorted(versions.items()):
        body = ",\n".join(f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items()))
        lines.append(f'  "{version}": {{\n{body}\n  }}')
    path.write_text('{\n "triton": {\n' + ",\n".join(lines) + "\n }\n}\n")


def table(report: Report) -> str:
    """The figures as a Markdown table."""
    lines = ["| variant | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in report.items():
        lines.append(f"| {name} | " + " | ".join(str(row.get(column, "")) for column in COLUMNS) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the report; 1 if a figure regressed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", nargs="+", default=[], metavar="WORD", help="only names that hold all these words")
    parser.add_argument("--write", action="store_true", help="make this the baseline of the installed Triton")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args(argv)
    # the interpreter does not compile, and the choice is made when triton is imported
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    version = triton.__version__
    report = collect(tuple(args.match))
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps({"triton": version, "variants": report}, indent=1) + "\n")
    if args.write:
        kept = {} if not args.match else read_baseline(version) or {}
        write_baseline(kept | report, version)
        print(f"\nwrote {len(report)} variants to {BASELINE.name} for Triton {version}")
        return 0
    baseline = read_baseline(version)
    if baseline is None:
        print(f"\nnot compared: the baseline has no figures for Triton {version}")
        return 0
    messages = compare(report, baseline, whole=not args.match)
    kept = f"{len(report.keys() & baseline.keys())} of {len(report)} variants are in the baseline, and keep it"
    print("\n" + ("\n".join(f"REGRESSION {message}" for message in messages) or kept))
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())
