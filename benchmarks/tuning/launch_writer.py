"""Write `rgkernels/_triton/launch_data.py`: what the tuner emits, in the form that ruff gives it.

The tuner runs where ruff is not installed, so the text has to come out formatted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rgkernels._triton.launch_table import KINDS

Key = tuple[str, str, int]
Launches = Mapping[str, Mapping[Key, tuple[int | None, ...]]]
Measured = Mapping[str, Mapping[Key, Mapping[str, Any]]]

HEADER = '''"""Launch parameters of every kernel, as data; see `launch_table.py` for how a row is found and what fields mean.

A key is (architecture, dtype, size class); 1048576 is Triton's widest block. `python -m benchmarks.tune` writes this file anew,
with the measurement behind each row that it looked at. Rows without one were chosen from counts of registers, spills and shared
memory in binaries (docs/kernels.md, docs/kernels-attention.md).
"""

from typing import Any

Key = tuple[str, str, int]

'''
LAUNCHES_LINE = "LAUNCHES: dict[str, dict[Key, tuple[int | None, ...]]] = {\n"
MEASURED_LINE = (
    "# milliseconds are medians: of the row before, and of this row\nMEASURED: dict[str, dict[Key, dict[str, Any]]] = "
)


def render(launches: Launches, measured: Measured) -> str:
    """The text of launch_data.py."""
    lines = [HEADER, LAUNCHES_LINE]
    for kernel, rows in launches.items():
        fields = ", ".join(KINDS[kernel]._fields)
        body = "".join(f"        {_literal(key, 8)}: {_literal(row, 8)},\n" for key, row in rows.items())
        lines.append(f'    # {fields}\n    "{kernel}": {{\n{body}    }},\n')
    lines.append("}\n\n" + MEASURED_LINE + _literal(measured, 0) + "\n")
    return "".join(lines)


def write(path: Path, launches: Launches, measured: Measured) -> None:
    """Replace the file at once: a reader sees the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(render(launches, measured), encoding="utf-8")
    partial.replace(path)


def _literal(value: Any, indent: int) -> str:
    """A literal in double quotes: dicts of dicts one key per line, everything else on its line."""
    if isinstance(value, Mapping):
        if not value:
            return "{}"
        inner = " " * (indent + 4)
        body = "".join(f"{inner}{_literal(k, indent + 4)}: {_literal(v, indent + 4)},\n" for k, v in value.items())
        return "{\n" + body + " " * indent + "}"
    if isinstance(value, tuple):
        inside = ", ".join(_literal(item, indent) for item in value)
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
