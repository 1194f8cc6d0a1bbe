"""What the documents promise to be: short, linked, and true to their numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "realgeneral").rglob("*.md")],
    key=lambda path: str(path.relative_to(ROOT)),
)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def sentences(text: str) -> list[str]:
    """Of prose: no code, tables, pictures or headings; a list item or paragraph ends a sentence."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", FENCE.sub("", text))
    blocks = re.split(r"\n\s*\n|\n(?=- |\d+\. |\|)", text)
    prose = [" ".join(block.split()) for block in blocks if not block.lstrip().startswith(("|", "#", "<!--"))]
    return [sentence for block in prose for sentence in re.split(r"(?<=[.:;?!])\s+(?=[A-Z0-9`*\"(])", block) if sentence]


def broken_links(path: Path) -> list[str]:
    """Relative targets, of links and pictures, that are not there."""
    found = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text(encoding="utf-8")))
    relative = [target.partition("#")[0] for target in found if not re.match(r"[a-z]+:|#", target)]
    return [target for target in relative if not (path.parent / target).exists()]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(path: Path) -> None:
    """Every relative link leads somewhere."""
    assert broken_links(path) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    """The check can fail."""
    (tmp_path / "a.md").write_text("[here](b.md) [there](a.md#x) [web](https://x.y) ![p](p.png)\n```\n[code](c.md)\n```\n")
    assert broken_links(tmp_path / "a.md") == ["b.md", "p.png"]


def test_readme_is_short() -> None:
    """Under 150 lines; no sentence over 30 words."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    assert [sentence for sentence in sentences(text) if len(sentence.split()) > 30] == []


def test_long_sentences_are_found() -> None:
    """The check can fail."""
    assert (
        max(len(sentence.split()) for sentence in sentences("One. Word " + "word " * 30 + "end. Two.\n\n- three\n- four")) == 32
    )
    assert sentences("One, two. Three `x.y` four.\n\n| a | b |\n\n- five\n- six") == [
        "One, two.", "Three `x.y` four.", "- five", "- six",
    ]  # fmt: skip


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_headings(path: Path) -> None:
    """At most ten words."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    assert [heading for heading in headings if len(heading.split()) > 10] == []


def test_results_are_an_index() -> None:
    """One row an entry with a verdict of at most 15 words, newest first; every folder has its row."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d{4}-\d\d-\d\d) \| \[[^\]]+\]\(results/([^/]+)/README.md\) \| (.*) \|$", text, re.MULTILINE)
    assert rows
    assert [verdict for _, _, verdict in rows if len(verdict.split()) > 15] == []
    assert [date for date, _, _ in rows] == sorted((date for date, _, _ in rows), reverse=True)
    assert all(folder.startswith(date) for date, folder, _ in rows)
    folders = {path.name for path in (ROOT / "docs" / "results").iterdir()}
    assert folders == {folder for _, folder, _ in rows}


def test_readme_table_is_that_of_the_results() -> None:
    """nano's scores in the README are those of the newest table's raw file."""
    raw = json.loads((ROOT / "docs/results/2026-11-27-nano-adapter-10/nano-held-out-10.json").read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    rows = {cells[0].strip(): [cell.strip() for cell in cells] for cells in lines}
    kinds = {
        "asked state found": ("concept in asked state R@1", 2),
        "SSIM": ("SSIM", 3),
        "PSNR": ("PSNR dB", 1),
        "edge F1": ("edge F1", 3),
    }
    for task in ("customization", "canny", "inpainting", "colouring", "deblurring", "image-to-sketch"):
        _, measures, *columns = rows[task]
        scores = raw["results"][task]["scores"]
        for method, column in zip(("adapter", "base", "copy condition"), columns, strict=True):
            wanted = []
            for measure in measures.split(", "):
                metric, digits = kinds[measure]
                value = scores[method][metric]
                wanted.append(f"{value[0]:.{digits}f}" + (" dB" if measure == "PSNR" else ""))
            assert column == ", ".join(wanted), (task, method)
