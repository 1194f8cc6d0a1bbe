"""Recipe: draw seeded avatars, each with eight faces, into `assets/avatars.parquet`.

    pip install "realgeneral[nano]"
    python -m realgeneral.nano.build_avatars

The drawings are DiceBear's styles of `KINDS`, CC0 1.0 all three. A seed gives the shape and the colours; the faces of one
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

from realgeneral.nano.avatars import EYES, FACES, MOUTHS, PARQUET, SIZE, pack_faces
from realgeneral.nano.common import log

PACKAGES = {"dicebear-core": "10.7.0", "dicebear-styles": "10.6.0"}


class Kind(NamedTuple):
    """A DiceBear style: its word in captions, share of the avatars, the options that make another shape, and those of the
    faces in the order of `EYES` and `MOUTHS`.
    """

    word: str
    share: float
    shape: tuple[str, ...]
    eyes: tuple[str, ...]
    mouths: tuple[str, ...]


KINDS = {
    "critters": Kind(
        "monster", 0.45, ("bodyVariant", "topVariant"),
        ("round", "bigPupils", "happy", "closedLine", "wink", "sleepy", "angry", "sideeye"),
        ("smile", "grin", "ooh", "line", "frown", "wavy", "tongue", "open", "catMouth"),
    ),
    "sprouts": Kind(
        "potted plant", 0.35, ("plantVariant", "potVariant"),
        ("round", "bigPupils", "happy", "closedLine", "wink", "sleepy", "angry", "sideeye"),
        ("smile", "grin", "ooh", "line", "frown", "wavy", "tongue", "open", "catMouth"),
    ),
    "moods": Kind(
        "face", 0.2, ("faceVariant", "faceColor"),
        ("pupils", "bigPupils", "happy", "closed", "wink", "sleepy", "angry", "lookSide"),
        ("smile", "laugh", "gasp", "line", "frown", "wavy", "tongue", "open", "cat"),
    ),
}  # fmt: skip
# Options that are in every avatar; the background is added when a picture is made.
COMMON = {"animationVariant": "none", "backgroundColor": "ffffff00"}


def draw(style: Any, options: dict[str, Any]) -> tuple[Image.Image, dict[str, Any]]:
    """An avatar, RGBA of `SIZE`, and the options that its seed stands for."""
    import resvg_py
    from dicebear import Avatar

    avatar = Avatar(style, {**COMMON, **options})
    png = bytes(resvg_py.svg_to_bytes(svg_string=avatar.to_string(), width=SIZE, height=SIZE))
    return Image.open(io.BytesIO(png)).convert("RGBA"), avatar.to_json()["options"]


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
        look, options = draw(style, {"seed": seed, "eyesVariant": kind.eyes[0], "mouthVariant": kind.mouths[0]})
        shape = " ".join([name, *(str(options.get(key)) for key in kind.shape)])
        split = "held_out" if held_out(shape, share) else "train"
        if not left[split] or look.tobytes() in seen:
            continue
        seen.add(look.tobytes())
        left[split] -= 1
        rng = random.Random(seed)
        eyes, mouths = rng.sample(range(len(EYES)), FACES), rng.sample(range(len(MOUTHS)), FACES)
        faces = [
            draw(style, {"seed": seed, "eyesVariant": kind.eyes[e], "mouthVariant": kind.mouths[m]})[0]
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
    parser.add_argument("--out", type=Path, default=PARQUET)
    parser.add_argument("--train", type=int, default=600, help="avatars to train on")
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
