"""Recipe: join four open emoji sets by code point into `assets/emoji.parquet`.

    python -m recipes.build_data --packages DIR

`DIR` holds the npm tarballs of `PACKAGES`; missing ones are fetched with `npm pack name@version`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from realgeneral.nano.assets import ASSETS
from recipes.common import log

PACKAGES = {
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "high_contrast": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "noto": "@iconify-json/noto@1.2.9",
    "names": "emojilib@4.0.3",
}


STYLES = ("flat", "high_contrast", "3d", "noto")
SIZE = 64
_SKIN = {f"{c:x}" for c in range(0x1F3FB, 0x1F400)}
# Words that separate variants of one drawing; concepts that differ only in these stay in one split.
_VARIANT_WORDS = set(
    "man woman men women person people boy girl male female prince princess king queen face facing"
    " right left up down upwards downwards upper lower red orange yellow green blue purple brown black"
    " white grey gray light pink small medium large first second third last quarter new full crescent"
    " waxing waning gibbous mr mrs mx santa claus with of the in and a on no not heavy old older"
    " st nd rd button mark sign symbol medal 1st 2nd 3rd open closed arrow arrows".split()
)


def tarball(folder: Path, spec: str) -> Path:
    """Return the tarball of `spec` (name@version) in `folder`, fetching it if it is missing."""
    name, version = spec.rsplit("@", 1)
    path = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", spec], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return path


def read_members(path: Path, pattern: str) -> dict[str, bytes]:
    """Read the members of a tarball whose name matches `pattern`."""
    found = {}
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member) if re.search(pattern, member.name) else None
            if file is not None:
                found[member.name.removeprefix("package/")] = file.read()
    return found


def clean_key(codepoint: str) -> str | None:
    """Normalise a code point key; None for skin tones and flags, which add no concept."""
    parts = [p.lower().lstrip("0") for p in re.split(r"[-_ ]", codepoint) if p.lower() != "fe0f"]
    if any(p in _SKIN for p in parts):
        return None
    if any(0x1F1E6 <= int(p, 16) <= 0x1F1FF or p == "e007f" for p in parts):
        return None
    return "-".join(parts)


def svg_document(body: str, box: str) -> str:
    """An iconify body as a file of `SIZE` pixels; `box` is its viewBox, what has no colour of its own becomes black."""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="{box}">{body.replace("currentColor", "#000")}</svg>'
    )


def read_iconify(path: Path) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """Return {code point: (icon name, svg)} and {icon name: category} of an iconify package."""
    files = {n: json.loads(b) for n, b in read_members(path, r"(chars|icons|metadata)\.json$").items()}
    icons = files["icons.json"]
    width, height = icons.get("width", 16), icons.get("height", 16)
    out: dict[str, tuple[str, str]] = {}
    for codepoint, name in files["chars.json"].items():
        key = clean_key(codepoint)
        icon = icons["icons"].get(icons.get("aliases", {}).get(name, {}).get("parent", name))
        if key is None or icon is None:
            continue
        w, h = icon.get("width", width), icon.get("height", height)
        out.setdefault(key, (name, svg_document(icon["body"], f"0 0 {w} {h}")))
    groups = {n: g for g, names in files["metadata.json"]["categories"].items() for n in names}
    return out, groups


def read_emojilib(path: Path) -> dict[str, list[str]]:
    """Return {code point: [name, keyword, ...]} of emojilib."""
    (data,) = read_members(path, r"emoji-en-US\.json$").values()
    out = {}
    for emoji, words in json.loads(data).items():
        key = clean_key("-".join(f"{ord(c):x}" for c in emoji))
        if key is not None:
            out[key] = [clean_words(w) for w in words]
    return out


def clean_words(text: str) -> str:
    """Lower-case words of letters and digits: `red_fox`, `red-fox` -> `red fox`."""
    return " ".join(re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower()))


def on_white(image: Image.Image) -> Image.Image:
    """Composite an RGBA image on white at 64 px, averaging with premultiplied alpha."""
    rgba = image.convert("RGBA")
    if rgba.size != (SIZE, SIZE):
        # PIL resizes RGBA premultiplied, so no dark fringe appears.
        rgba = rgba.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def render(job: dict[str, Any]) -> dict[str, Any]:
    """Render the four styles of one concept: WebP bytes and a thumbnail for de-duplication."""
    import resvg_py

    out: dict[str, Any] = {}
    thumbs = []
    for style in STYLES:
        raw = job[style]
        if style != "3d":
            raw = bytes(resvg_py.svg_to_bytes(svg_string=raw, width=SIZE, height=SIZE))
        image = on_white(Image.open(io.BytesIO(raw)))
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=85, method=6)
        out[style] = buffer.getvalue()
        if style != "noto":
            thumbs.append(np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float32) / 255)
    out["thumb"] = np.concatenate([t.ravel() for t in thumbs])
    return out


def stem(name: str) -> str:
    """What is left of a name without the words that separate variants of one drawing."""
    if re.search(r"o'?clock|thirty", name):
        return "clock face"
    words = [w.rstrip("s") for w in name.split() if w not in _VARIANT_WORDS and not w.isdigit()]
    return " ".join(words) or "variant"


def cluster(names: list[str], thumbs: np.ndarray, threshold: float) -> list[int]:
    """Union-find over equal name stems and near-equal thumbnails; returns each item's root."""
    parent = list(range(len(names)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def union(i: int, j: int) -> None:
        a, b = find(i), find(j)
        parent[max(a, b)] = min(a, b)

    first: dict[str, int] = {}
    for i, name in enumerate(names):
        union(i, first.setdefault(stem(name), i))
    square = (thumbs**2).sum(1)
    distance = (square[:, None] + square[None] - 2 * thumbs @ thumbs.T) / thumbs.shape[1]
    for i, j in zip(*np.nonzero(np.triu(distance < threshold**2, 1)), strict=True):
        union(int(i), int(j))
    return [find(i) for i in range(len(names))]


def split_by_cluster(keys: list[str], roots: list[int], held_out: int) -> list[str]:
    """Mark whole clusters, in the order of a hash, as held out until `held_out` concepts are."""
    members: dict[int, list[int]] = {}
    for i, root in enumerate(roots):
        members.setdefault(root, []).append(i)
    order = sorted(members, key=lambda r: hashlib.sha256(keys[r].encode()).hexdigest())
    split = ["train"] * len(keys)
    count = 0
    for root in order:
        # Large clusters (clocks, faces, people at work) stay in training: they would crowd the held-out set.
        if len(members[root]) <= 4 and count + len(members[root]) <= held_out:
            count += len(members[root])
            for i in members[root]:
                split[i] = "held_out"
    return split


def collect(folder: Path) -> list[dict[str, Any]]:
    """Join the packages: one job per concept that has all four styles."""
    paths = {k: tarball(folder, spec) for k, spec in PACKAGES.items()}
    flat, groups = read_iconify(paths["flat"])
    contrast, _ = read_iconify(paths["high_contrast"])
    noto, _ = read_iconify(paths["noto"])
    words = read_emojilib(paths["names"])
    three_d: dict[str, bytes] = {}
    for name, data in read_members(paths["3d"], r"\.webp$").items():
        key = clean_key(Path(name).stem)
        if key is not None:
            three_d.setdefault(key, data)
    jobs = []
    for key in sorted(set(flat) & set(contrast) & set(three_d) & set(noto)):
        icon_name = clean_words(flat[key][0])
        terms = words.get(key, [icon_name])
        name = terms[0] or icon_name
        keywords = list(dict.fromkeys(w for w in [*terms[1:], icon_name] if w and w != name))
        jobs.append({"codepoint": key, "name": name, "keywords": keywords,
                     "group": groups.get(flat[key][0], "Symbols"),
                     "flat": flat[key][1], "high_contrast": contrast[key][1],
                     "3d": three_d[key], "noto": noto[key][1]})  # fmt: skip
    return jobs


def unique_names(jobs: list[dict[str, Any]]) -> None:
    """Keep only the first concept of each name: a caption must mean one thing."""
    seen: set[str] = set()
    kept = [j for j in jobs if not (j["name"] in seen or seen.add(j["name"]))]  # type: ignore[func-returns-value]
    log(f"{len(jobs) - len(kept)} concepts dropped for a repeated name")
    jobs[:] = kept


def main(argv: list[str] | None = None) -> None:
    """Build the parquet file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--packages", type=Path, default=Path("npm"), help="folder of npm tarballs")
    parser.add_argument("--out", type=Path, default=ASSETS / "emoji.parquet")
    parser.add_argument("--held-out", type=int, default=200, help="concepts kept from training")
    parser.add_argument("--threshold", type=float, default=0.10, help="RMS thumbnail distance of duplicates")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)

    jobs = collect(args.packages)
    unique_names(jobs)
    with ProcessPoolExecutor(args.workers) as pool:
        rendered = list(pool.map(render, jobs, chunksize=16))
    keys = [j["codepoint"] for j in jobs]
    roots = cluster([j["name"] for j in jobs], np.stack([r["thumb"] for r in rendered]), args.threshold)
    split = split_by_cluster(keys, roots, args.held_out)
    columns: dict[str, Any] = {
        "codepoint": keys,
        "name": [j["name"] for j in jobs],
        "keywords": [j["keywords"] for j in jobs],
        "group": [j["group"] for j in jobs],
        "split": split,
        "cluster": [keys[r] for r in roots],
    }
    for style in STYLES:
        columns[style] = [r[style] for r in rendered]
    table = pa.table(columns, metadata={"styles": ",".join(STYLES), "sources": json.dumps(PACKAGES)})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, args.out, compression="zstd", use_dictionary=False)
    held = split.count("held_out")
    log(f"{len(keys)} concepts, {held} held out, {args.out.stat().st_size / 1e6:.2f} MB -> {args.out.name}")


if __name__ == "__main__":
    main()
