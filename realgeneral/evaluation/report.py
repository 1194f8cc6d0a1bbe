"""Tables of a protocol: this run's rows with intervals, and below them the paper's, marked as such."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageOps

from realgeneral.evaluation.metrics import RESAMPLES, Score
from realgeneral.pictures import picture_grid

PAPER_SOURCE = (
    "RealGeneral, arXiv 2503.10406, tables as on the authors' project page (github.com/Lyne1/RealGeneral, 2025-03-14)"
)


# not published, so nobody can say how far these rows compare with those of a run
PAPER_UNKNOWN = {
    "customization": "which CLIP and DINO, which real pictures, how many pictures per prompt, sampler",
    "canny": "FID implementation, number of pictures, size, sampler; presumably as OminiControl: COCO val2017 at 512 px",
}


PAPER_UNKNOWN["depth"] = PAPER_UNKNOWN["canny"]


PAPER_COLUMNS = {"customization": ("CLIP-I", "DINO", "CLIP-T"), "canny": ("FID", "SSIM"), "depth": ("FID", "SSIM")}
# strings: as printed
PAPER_ROWS: dict[str, dict[str, tuple[str, ...]]] = {
    "customization": {
        "BLIP-Diffusion": ("0.768", "0.535", "0.278"),
        "ELITE": ("0.762", "0.533", "0.291"),
        "SSR-Encoder": ("0.767", "0.524", "0.303"),
        "IP-Adapter (SDXL)": ("0.790", "0.570", "0.289"),
        "EMU2": ("0.795", "0.583", "0.298"),
        "MS-Diffusion": ("0.772", "0.540", "0.312"),
        "RealGeneral": ("0.849", "0.668", "0.314"),
    },
    "canny": {
        "ControlNet (SD1.5)": ("18.79", "0.28"),
        "ControlNet (FLUX)": ("98.68", "0.25"),
        "OmniGen": ("22.51", "0.34"),
        "OminiControl": ("20.63", "0.40"),
        "RealGeneral": ("17.50", "0.44"),
    },
    "depth": {
        "ControlNet (SD1.5)": ("25.12", "0.24"),
        "ControlNet (FLUX)": ("62.20", "0.26"),
        "OmniGen": ("21.62", "0.25"),
        "OminiControl": ("27.26", "0.39"),
        "RealGeneral": ("23.40", "0.35"),
    },
}


LOWER_IS_BETTER = ("FID", "Fréchet", "depth MSE")


def markdown(protocol: str, results: dict[str, dict[str, Score]], count: int, setting: str) -> str:
    """The report: a table of this run, then the paper's.

    Args:
        protocol: "customization", "canny" or "depth".
        results: Scores by method and metric.
        count: Pictures per method.
        setting: What was run, one line.
    """
    metrics = list(next(iter(results.values())))
    lines = [f"# {protocol}", "", setting, "", "| method | n | " + " | ".join(map(_header, metrics)) + " |"]
    lines.append("|---" * (2 + len(metrics)) + "|")
    for method, scores in results.items():
        lines.append(f"| {method} | {count} | " + " | ".join(_cell(m, scores[m]) for m in metrics) + " |")
    over = "subjects" if protocol == "customization" else "pictures"
    lines += ["", f"In brackets: 95 % interval, bootstrap over {over} ({RESAMPLES} draws)."]
    if any(_is_distance(m) for m in metrics):
        lines.append("A Fréchet distance depends on n and has no interval here: compare it at equal n, size and features;")
        lines.append("it means little while n is not well above the number of features.")
    lines += ["", f"## Of the paper, not of this run: {PAPER_SOURCE}", "", f"Not published: {PAPER_UNKNOWN[protocol]}.", ""]
    columns = PAPER_COLUMNS[protocol]
    lines += ["| method (paper) | " + " | ".join(map(_header, columns)) + " |", "|---" * (1 + len(columns)) + "|"]
    for method, row in PAPER_ROWS[protocol].items():
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def paper_record(protocol: str) -> dict[str, Any]:
    """The paper's rows for results.json."""
    columns = PAPER_COLUMNS[protocol]
    rows = {m: dict(zip(columns, map(float, row), strict=True)) for m, row in PAPER_ROWS[protocol].items()}
    return {"source": PAPER_SOURCE, "not published": PAPER_UNKNOWN[protocol], "rows": rows}


def grid(rows: list[list[Image.Image]], header: tuple[str, ...], labels: list[str]) -> Image.Image:
    """A contact sheet with pictures of 128 to 256 px on their longer side."""
    side = max(rows[0][0].size)
    if side > 256:
        rows = [[ImageOps.contain(picture, (256, 256)) for picture in row] for row in rows]
    return picture_grid(rows, header, labels, max(1, 128 // side))


def _is_distance(metric: str) -> bool:
    return metric.startswith(("FID", "Fréchet"))


def _header(metric: str) -> str:
    return f"{metric} {'↓' if metric.startswith(LOWER_IS_BETTER) else '↑'}"


def _number(metric: str, value: float) -> str:
    return f"{value:.2f}" if metric.startswith(LOWER_IS_BETTER) else f"{value:.3f}"


def _cell(metric: str, score: Score) -> str:
    text = _number(metric, score.mean)
    if score.low is None or score.high is None:
        return text
    return f"{text} [{_number(metric, score.low)}, {_number(metric, score.high)}]"
