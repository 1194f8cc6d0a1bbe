"""More pictures to train the base on: open icon sets, and emoji sets that draw the training concepts once more.

They do not ship. `python -m recipes.icons --packages DIR --out DIR` renders what npm tarballs hold (missing ones are
fetched) into `icons.parquet`; `train_base --icons` takes that file.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from realgeneral.nano.emoji import load_emoji
from recipes.build_data import SIZE, clean_words, on_white, read_iconify, read_members, svg_document, tarball
from recipes.common import log

# package: what its pictures are called in captions; licences as in each package's info.json
TWEMOJI = "@iconify-json/twemoji@1.2.5"
EMOJI_SETS = {
    "@iconify-json/noto-v1@1.2.5": "old cartoon",  # Apache-2.0
    TWEMOJI: "simple cartoon",  # CC-BY-4.0
    "@iconify-json/fxemoji@1.2.2": "round cartoon",  # Apache-2.0
}


ICON_SETS = {
    "@iconify-json/vscode-icons@1.2.97": "file icon",  # MIT
    "@iconify-json/material-icon-theme@1.2.70": "file icon",  # MIT
    "@iconify-json/flat-color-icons@1.2.3": "flat icon",  # MIT
    "@iconify-json/fluent-color@1.2.21": "glossy icon",  # MIT
    "@iconify-json/marketeq@1.2.2": "two colour icon",  # MIT
    "@iconify-json/meteocons@1.2.4": "weather icon",  # MIT
    "@iconify-json/skill-icons@1.2.4": "badge",  # MIT
    "@iconify-json/circle-flags@1.2.11": "round flag",  # MIT
    "@iconify-json/devicon@1.2.68": "logo",  # MIT
    "@iconify-json/logos@1.2.19": "logo",  # CC0-1.0
    "@iconify-json/token-branded@1.2.45": "coin",  # MIT
    "@iconify-json/cryptocurrency-color@1.2.4": "coin",  # CC0-1.0
}


MOST_OF_A_SET = 1200
SAME = 0.06


@dataclass(frozen=True)
class Icon:
    """A drawing to render: `concept` is the code point of the training concept that it shows, if any."""

    name: str
    word: str
    concept: str
    svg: str


def read_icons(path: Path) -> Iterator[tuple[str, str]]:
    """(name, svg) of an iconify package, aliases left out."""
    (data,) = read_members(path, r"icons\.json$").values()
    icons = json.loads(data)
    for name, icon in icons["icons"].items():
        w, h = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
        left, top, side = icon.get("left", 0), icon.get("top", 0), max(w, h)
        # square, as pictures in training are
        box = f"{left - (side - w) / 2} {top - (side - h) / 2} {side} {side}"
        yield name, svg_document(icon["body"], box)


def collect(folder: Path) -> list[Icon]:
    """All drawings of the sets; of emoji only those of training concepts, of icons none named like a held-out one."""
    train, held_out = ({c.codepoint: c.name for c in load_emoji(split)} for split in ("train", "held_out"))
    found = []
    # two of the sets have no code points, but the names of the third
    twemoji, _ = read_iconify(tarball(folder, TWEMOJI))
    codepoints = {_letters(name): key for key, (name, _) in twemoji.items()}
    for package, word in EMOJI_SETS.items():
        for name, svg in read_icons(tarball(folder, package)):
            key = codepoints.get(_letters(name))
            if key in train:
                found.append(Icon(train[key], word, key, svg))
    for package, word in ICON_SETS.items():
        icons = [Icon(clean_words(name), word, "", svg) for name, svg in read_icons(tarball(folder, package))]
        icons = [icon for icon in icons if icon.name and icon.name not in held_out.values()]
        order = np.random.default_rng(0).permutation(len(icons))[:MOST_OF_A_SET]
        found += [icons[i] for i in sorted(order)]
    return found


def render(icon: Icon) -> tuple[bytes, np.ndarray] | None:
    """PNG bytes and a thumbnail; None if it cannot be rendered or is nearly empty, full, or without colours."""
    import resvg_py

    try:
        raw = bytes(resvg_py.svg_to_bytes(svg_string=icon.svg, width=SIZE, height=SIZE))
    except (ValueError, RuntimeError):
        return None
    image = on_white(Image.open(io.BytesIO(raw)))
    pixels = np.asarray(image)
    inked = (pixels.min(-1) < 235).mean()
    coloured = (np.ptp(pixels, axis=-1) > 40).mean()
    _, counts = np.unique((pixels // 43).reshape(-1, 3), axis=0, return_counts=True)
    if not 0.12 < inked < 0.9 or coloured < 0.05 or (counts > 0.01 * SIZE * SIZE).sum() < 3:
        return None
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue(), np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float32).ravel() / 255


def distinct(thumbs: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which thumbnails [N, D] are farther than `SAME` (RMS) from all of `known` and from every earlier one that is kept."""
    kept, count = np.zeros(len(thumbs), bool), len(known)
    matrix = np.empty((len(known) + len(thumbs), thumbs.shape[1]), np.float32)
    matrix[:count] = known
    for i, thumb in enumerate(thumbs):
        if ((matrix[:count] - thumb) ** 2).mean(1).min(initial=np.inf) > SAME**2:
            kept[i], matrix[count] = True, thumb
            count += 1
    return kept


def _letters(name: str) -> str:
    return "".join(clean_words(name).split())


def main(argv: list[str] | None = None) -> None:
    """Build the parquet file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--packages", type=Path, default=Path("npm"), help="folder of npm tarballs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)
    icons = collect(args.packages)
    with ProcessPoolExecutor(args.workers) as pool:
        rendered = list(pool.map(render, icons, chunksize=64))
    made = [(icon, result) for icon, result in zip(icons, rendered, strict=True) if result is not None]
    held_out = [c.image(style).resize((16, 16), Image.Resampling.BOX) for c in load_emoji("held_out") for style in c.encoded]
    known = np.stack([np.asarray(picture, np.float32).ravel() / 255 for picture in held_out])
    keep = distinct(np.stack([thumb for _, (_, thumb) in made]), known)
    rows = [
        {"name": icon.name, "word": icon.word, "concept": icon.concept, "picture": png}
        for (icon, (png, _)), kept in zip(made, keep, strict=True)
        if kept
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), args.out / "icons.parquet", compression="zstd")
    log(f"{len(icons)} drawings, {len(made)} with colours, {len(rows)} distinct from each other and the held-out ones")


if __name__ == "__main__":
    main()
