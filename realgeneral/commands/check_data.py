"""`realgeneral check-data`: read a data set as training would, and report what is in it and what is wrong with it."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from realgeneral.data.order import Bucketed
from realgeneral.data.rows import Record, Source
from realgeneral.data.samples import PairDataset, TextCheck
from realgeneral.data.shapes import Shape, Size
from realgeneral.data.sources.open import open_source
from realgeneral.data.workers import from_workers
from realgeneral.errors import Failure
from realgeneral.files import write_text
from realgeneral.generation.bases import load_for_data
from realgeneral.settings.data import CheckDataConfig
from realgeneral.training.plan import Plan

LISTED = 10  # examples of each thing that a person sees; the JSON has all bad rows
REASONS = (
    ("not an image", "picture is not an image"),
    ("complete picture file", "picture is truncated"),
    ("no such file", "picture file is missing"),
    ("got a folder", "picture file is missing"),
    ("pixels, got", "picture is too large"),
    ("prompt of at most", "prompt is longer than the text window"),
    ("prompt string", "prompt is missing"),
    ("caption", "caption is missing"),
    ("subject must", "subject does not occur in its prompt"),
    ("task must be one of", "task is not one of the run"),
    ("as the list says", "task is not that of its data set"),
    ("must have a condition", "condition is missing"),
    ("target picture", "target is missing"),
    ("row group", "row group is damaged"),
)


@dataclass(frozen=True)
class Finding:
    """What was found in a row; `problem` says why it is bad."""

    name: str
    problem: str | None = None
    size: Size | None = None
    conditions: int = 0
    tasks: tuple[str, ...] = ()
    tokens: int = 0
    empty: bool = False
    digest: str = ""


class RowsToCheck(Dataset[Finding]):
    """Finding i is that of row i."""

    def __init__(self, pairs: PairDataset, decode: bool) -> None:
        self.pairs, self.decode = pairs, decode

    def __len__(self) -> int:
        return len(self.pairs.source)

    def __getitem__(self, index: int) -> Finding:
        name = self.pairs.source.row_name(index)
        try:
            record = self.pairs.source.record(index, 0)
            size = self._pictures(record)
            assert isinstance(self.pairs.check, TextCheck)
            tokens = self.pairs.check.tokens(record.prompt)
            record = self.pairs.check(record)
            tasks = tuple(task.name for task, weight in self.pairs.choices(record) if weight)
            digest = "/".join(
                [record.target.digest(), *(c.digest() for c in record.conditions), record.task or "", record.prompt]
            )
        except Failure as error:
            return Finding(name, str(error))
        empty = not record.prompt.strip()
        return Finding(name, None, size, max(1, len(record.conditions)), tasks, tokens, empty, digest)

    def _pictures(self, record: Record) -> Size:
        try:
            for picture in (record.target, *record.conditions):
                _ = picture.load() if self.decode else picture.size()
            return record.target.size()
        except Failure as error:
            raise Failure(f"{record.name}: {error}") from None


def check_data(config: CheckDataConfig) -> dict[str, Any]:
    """Check every row, print the report, and write it as JSON if asked to.

    Returns:
        The report.

    Raises:
        Failure: At least one row is bad, training would stop at a batch, or the data cannot be opened.
        UsageError: A setting does not fit the base.
    """
    source = open_source(config.data, config.columns, repeats=False)
    pipe = load_for_data(config.base)
    plan = Plan.of(config, pipe)
    pairs = plan.dataset(source, one_size=True)
    rows = DataLoader(RowsToCheck(pairs, not config.headers_only), None, num_workers=config.num_workers)
    with from_workers():
        found = list(tqdm(rows, desc="check", unit="row", file=sys.stderr))
    # without buckets nothing is grouped: an epoch's last batch goes on with the next epoch's rows
    sizes, batch_size = (plan.buckets, config.batch_size) if plan.buckets else ((plan.size,), 1)
    report = summary(found, source, sizes, batch_size, plan.window)
    stops = mixed_conditions(report) if not plan.buckets and config.batch_size > 1 else ""
    print(as_text(report, config.data))
    if config.report:
        _write(Path(config.report), {"config": asdict(config), **report})
    bad = report["bad_rows"]
    told = f"{len(bad)} of {len(found)} rows of {config.data} are bad; training skips them, or stops with --strict"
    if bad or stops:
        raise Failure("; ".join(filter(None, [told if bad else "", stops])))
    return report


def mixed_conditions(report: dict[str, Any]) -> str:
    """Why training without buckets would stop, if rows differ in their number of conditions."""
    counts = sorted(map(int, report["conditions"]))
    if len(counts) < 2:
        return ""
    return f"rows of one batch must have the same number of conditions, got {counts}: training stops without --buckets"


def summary(found: list[Finding], source: Source, sizes: tuple[Size, ...], batch_size: int, window: int) -> dict[str, Any]:
    """The report as JSON types; batches of one size and number of conditions are filled up to `batch_size`."""
    good = [f for f in found if f.problem is None]
    shapes = [Shape(*f.size, f.conditions) if f.size else None for f in found]
    order = Bucketed(shapes, sizes, source.blocks, batch_size, 0)
    assigned = Counter(order.buckets[i] for i, f in enumerate(found) if f.problem is None)
    twins: dict[str, list[str]] = defaultdict(list)
    for finding in good:
        twins[finding.digest].append(finding.name)
    smallest = sorted(good, key=lambda f: (_area(f.size), f.name))[:LISTED]
    return {
        "rows": len(found),
        "not_rows": list(source.notes),
        "bad_rows": [{"row": f.name, "reason": reason(f.problem), "message": f.problem} for f in found if f.problem],
        "buckets": [
            {"size": _described(size), "conditions": k, "rows": rows, "repeated_to_fill": -rows % batch_size}
            for (size, k), rows in sorted(assigned.items())
        ],
        "sizes": _counted(_described(f.size) for f in good if f.size),
        "enlarged": sum(_enlarged(f.size, order.size(i)) for i, f in enumerate(found) if f.problem is None),
        "smallest": [{"row": f.name, "size": _described(f.size)} for f in smallest if f.size],
        "conditions": _counted(str(f.conditions) for f in good),
        "tasks": _counted(task for f in good for task in f.tasks),
        "text_window": window,
        "longest_prompt": max((f.tokens for f in good), default=0),
        "prompts_cut": sum(f.tokens > window for f in good),
        "prompts_empty": [f.name for f in good if f.empty],
        "duplicates": [names for names in twins.values() if len(names) > 1],
    }


def reason(problem: str | None) -> str:
    """The kind of a bad row's message."""
    return next((kind for words, kind in REASONS if words in (problem or "")), "row cannot be read")


def _area(size: Size | None) -> int:
    return size[0] * size[1] if size else 0


def _enlarged(size: Size | None, wanted: Size) -> bool:
    return size is not None and (size[0] < wanted[0] or size[1] < wanted[1])


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))


def as_text(report: dict[str, Any], data: str) -> str:
    """The report for a person."""
    bad, twins = report["bad_rows"], report["duplicates"]
    lines = [f"{data}: {report['rows']} rows, {len(bad)} bad, {sum(map(len, twins)) - len(twins)} duplicates"]
    if bad:
        lines.append("bad rows")
        by_reason: dict[str, list[str]] = defaultdict(list)
        for row in bad:
            by_reason[row["reason"]].append(row["message"])
        for kind, messages in sorted(by_reason.items(), key=lambda item: -len(item[1])):
            lines.append(f"  {len(messages):7d}  {kind}")
            lines += _some([f"             {message}" for message in messages])
    lines.append("buckets (height x width, conditions: rows)")
    for b in report["buckets"]:
        filled = f", {b['repeated_to_fill']} repeated to fill the last batch" if b["repeated_to_fill"] else ""
        lines.append(f"  {b['rows']:7d}  {b['size']}, {b['conditions']}{filled}")
    lines.append("picture sizes (height x width: rows)")
    lines += _some([f"  {rows:7d}  {size}" for size, rows in report["sizes"].items()])
    if report["enlarged"]:
        lines.append(f"  {report['enlarged']:7d}  smaller than their bucket, to be enlarged; the smallest:")
        lines += [f"             {s['size']}  {s['row']}" for s in report["smallest"][:3]]
    lines.append("tasks that rows can be of")
    lines += [f"  {rows:7d}  {task}" for task, rows in report["tasks"].items()]
    cut = f"; {report['prompts_cut']} are cut" if report["prompts_cut"] else ""
    lines.append(f"prompts: the longest has {report['longest_prompt']} of {report['text_window']} tokens{cut}")
    if empty := report["prompts_empty"]:
        lines.append(f"  {len(empty):7d}  empty, as training without text; the first: {empty[0]}")
    if twins:
        lines.append("duplicates (same pictures, task and prompt)")
        lines += _some([f"             {' = '.join(names[:4])}" for names in twins])
    return "\n".join(lines)


def _some(lines: list[str]) -> list[str]:
    more = len(lines) - LISTED
    return lines[:LISTED] + ([f"             ... and {more} more (--report has all)"] if more > 0 else [])


def _write(path: Path, report: dict[str, Any]) -> None:
    try:
        write_text(path, json.dumps(report, indent=1))
    except OSError as error:
        raise Failure(f"report must be a file that can be written, got {path}: {error.strerror}") from None


def _described(size: Size) -> str:
    """HEIGHTxWIDTH of a (width, height)."""
    return f"{size[1]}x{size[0]}"
