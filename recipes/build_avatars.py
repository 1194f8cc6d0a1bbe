"""Recipe: draw seeded avatars, each with six faces, into `assets/avatars.parquet`.

    pip install "realgeneral[nano]"
    python -m recipes.build_avatars

The drawings are DiceBear's styles of `KINDS`, CC0 1.0 both. A seed gives the shape and the colours; the faces of one
avatar differ in eyes and mouth, each of which is used once.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from realgeneral.nano.avatars import AVATARS_PARQUET, EYES, FACES, MOUTHS, SIZE, pack_faces
from recipes.common import log

PACKAGES = {"dicebear-core": "10.7.0", "dicebear-styles": "10.6.0"}


class Kind(NamedTuple):
    """A DiceBear style: its word in captions, share of the avatars, the square of the drawing (left, top, side; of 1) that is
    shown, the options that make another shape, and those of the faces in the order of `EYES` and `MOUTHS`.
    """

    word: str
    share: float
    view: tuple[float, float, float]
    shape: tuple[str, ...]
    eyes: tuple[str, ...]
    mouths: tuple[str, ...]


# Views are near enough for a face to be seen at 64 px.
KINDS = {
    "critters": Kind(
        "monster", 0.65, (0.13, 0.08, 0.74), ("bodyVariant", "topVariant"),
        ("round", "happy", "closedLine", "wink", "sleepy", "angry"),
        ("smile", "grin", "open", "line", "frown", "wavy"),
    ),
    "moods": Kind(
        "face", 0.35, (0.06, 0.06, 0.88), ("faceVariant", "faceColor"),
        ("pupils", "happy", "closed", "wink", "sleepy", "angry"),
        ("smile", "laugh", "open", "line", "frown", "wavy"),
    ),
}  # fmt: skip


# Options that are in every avatar; the background is added when a picture is made.
COMMON = {"animationVariant": "none", "backgroundColor": "ffffff00"}


def draw(style: Any, kind: Kind, options: dict[str, Any]) -> tuple[Image.Image, dict[str, Any]]:
    """An avatar, RGBA of `SIZE`, and the options that its seed stands for."""
    import resvg_py
    from dicebear import Avatar

    avatar = Avatar(style, {**COMMON, **options})
    left, top, side = kind.view
    whole = round(SIZE / side)
    png = bytes(resvg_py.svg_to_bytes(svg_string=avatar.to_string(), width=whole, height=whole))
    x, y = round(left * whole), round(top * whole)
    picture = Image.open(io.BytesIO(png)).convert("RGBA").crop((x, y, x + SIZE, y + SIZE))
    return picture, avatar.to_json()["options"]


def held_out(shape: str, share: float) -> bool:
    """Whether avatars of a shape (a combination of parts) are kept from training: by a hash, so that none is on both sides."""
    return int.from_bytes(hashlib.sha256(shape.encode()).digest()[:4], "big") < share * 2**32


def avatars_of(name: str, counts: dict[str, int], share: float) -> list[dict[str, Any]]:
    """Rows of one style, `counts` of them by split, from the seeds "NAME-0", "NAME-1", ..."""
    from dicebear import Style

    kind, rows, seen, number = KINDS[name], [], set(), 0
    style = Style(json.loads((files("dicebear_styles") / f"{name}.json").read_text(encoding="utf-8")))
    left = dict(counts)
    while any(left.values()):
        if number == 100 * sum(counts.values()):
            raise SystemExit(f"{name} must have {counts} avatars that differ, got {left} too few of them in {number} seeds")
        seed, number = f"{name}-{number}", number + 1
        look, options = draw(style, kind, {"seed": seed, "eyesVariant": kind.eyes[0], "mouthVariant": kind.mouths[0]})
        shape = " ".join([name, *(str(options.get(key)) for key in kind.shape)])
        split = "held_out" if held_out(shape, share) else "train"
        if not left[split] or look.tobytes() in seen:
            continue
        seen.add(look.tobytes())
        left[split] -= 1
        rng = random.Random(seed)
        eyes, mouths = rng.sample(range(len(EYES)), FACES), rng.sample(range(len(MOUTHS)), FACES)
        faces = [
            draw(style, kind, {"seed": seed, "eyesVariant": kind.eyes[e], "mouthVariant": kind.mouths[m]})[0]
            for e, m in zip(eyes, mouths, strict=True)
        ]
        rows.append(
            {
                "seed": seed,
                "kind": kind.word,
                "shape": shape,
                "split": split,
                "eyes": [EYES[e] for e in eyes],
                "mouths": [MOUTHS[m] for m in mouths],
                "faces": pack_faces(faces),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    """Build the parquet file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=AVATARS_PARQUET)
    parser.add_argument("--train", type=int, default=700, help="avatars to train on")
    parser.add_argument("--held-out", type=int, default=200, help="avatars kept from training")
    parser.add_argument("--held-out-shapes", type=float, default=0.25, help="share of the shapes kept from training")
    args = parser.parse_args(argv)

    rows: list[dict[str, Any]] = []
    for name, kind in KINDS.items():
        counts = {"train": round(args.train * kind.share), "held_out": round(args.held_out * kind.share)}
        rows += avatars_of(name, counts, args.held_out_shapes)
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"sources": json.dumps(PACKAGES)})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, args.out, compression="zstd", use_dictionary=False)
    held = sum(row["split"] == "held_out" for row in rows)
    log(f"{len(rows)} avatars, {held} held out, {args.out.stat().st_size / 1e6:.2f} MB -> {args.out.name}")


if __name__ == "__main__":
    main()
