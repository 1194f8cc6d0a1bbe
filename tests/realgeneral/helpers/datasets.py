"""Training data as users have it, written to disk: folders, parquet and tar, of good rows and of every kind of bad one."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from realgeneral.data.samples import PairDataset
from realgeneral.data.sources.open import open_source
from tests.realgeneral.helpers.pictures import bomb, encoded, make_photo

SIZE = (32, 16)
Rows = list[dict[str, Any]]
Writer = Callable[[Path, Rows], str]


def write_folder(root: Path, rows: Rows) -> str:
    """metadata.jsonl beside the pictures; bytes become files."""
    root.mkdir(parents=True)
    lines = []
    for i, row in enumerate(rows):
        record = {}
        for key, value in row.items():
            values = value if isinstance(value, list) else [value]
            if values and isinstance(values[0], bytes):
                names = [f"{key}-{i}-{k}.png" for k in range(len(values))]
                for name, data in zip(names, values, strict=True):
                    (root / name).write_bytes(data)
                record[key] = names if isinstance(value, list) else names[0]
            else:
                record[key] = value
        lines.append(json.dumps(record))
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(root)


def write_parquet(root: Path, rows: Rows) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir(parents=True)
    keys = dict.fromkeys(key for row in rows for key in row)
    table = pa.table({key: [row.get(key) for row in rows] for key in keys})
    pq.write_table(table, root / "data.parquet")
    return str(root / "data.parquet")


def write_tar(root: Path, rows: Rows) -> str:
    root.mkdir(parents=True)
    with tarfile.open(root / "data.tar", "w") as tar:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        for i, row in enumerate(rows):
            described = {k: v for k, v in row.items() if k not in ("target", "condition")}
            add(f"{i:05d}.json", json.dumps(described).encode())
            if "target" in row:
                add(f"{i:05d}.target.png", row["target"])
            condition = row.get("condition", [])
            for k, data in enumerate(condition if isinstance(condition, list) else [condition]):
                add(f"{i:05d}.condition.{k}.png", data)
    return str(root / "data.tar")


WRITERS = {"folder": write_folder, "parquet": write_parquet, "tar": write_tar}


def picture(seed: int) -> bytes:
    return encoded(make_photo(40, 24, seed))


def good_rows(count: int = 4) -> Rows:
    return [{"target": picture(i), "prompt": f"a red pot {i}"} for i in range(count)]


def dataset(path: str, tasks: tuple[str, ...] = ("canny", "colouring"), **kwargs: Any) -> PairDataset:
    options: dict[str, Any] = {"weights": [], "size": SIZE, "seed": 0, "strict": False, **kwargs}
    return PairDataset(open_source(path), tasks, **options)


TRUNCATED_PNG = picture(0)[:-40]
TRUNCATED_JPEG = encoded(make_photo(), "JPEG")[:-200]
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "truncated PNG": ({"target": TRUNCATED_PNG}, "complete picture file"),
    "truncated JPEG": ({"target": TRUNCATED_JPEG}, "complete picture file"),
    "text renamed .png": ({"target": b"hello, I am text"}, "not an image"),
    "empty file": ({"target": b""}, "picture"),
    "bomb": ({"target": bomb(30_000, 30_000)}, "at most 100000000 pixels"),
    "bad condition": ({"condition": [b"hello"], "task": "canny"}, "not an image"),
    "no prompt": ({"prompt": None}, "must have a prompt string, got None"),
    "unknown task": ({"task": "cany"}, r"task must be one of \['canny', 'colouring'\], got 'cany'"),
}
