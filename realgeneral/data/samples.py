"""Samples of a run, made from a source's rows.

Sample n of a run is a pure function of (data, settings, n), whatever the number of workers: that makes a resumed run equal to
an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from realgeneral.data.order import OneSize, Order
from realgeneral.data.rows import Picture, Record, Source
from realgeneral.data.shapes import Size
from realgeneral.data.store import Store, StoreFailure
from realgeneral.errors import Failure, UsageError
from realgeneral.files import file_stamp, folder_fingerprint
from realgeneral.pictures import fit_picture, to_pixels
from realgeneral.prompts import cut_prompt, subject_span_mask, token_count
from realgeneral.tasks import DepthTask, Task, depth_revision, get_task


@dataclass(frozen=True)
class Sample:
    """What the trainer needs of one pair; `skipped` names the bad rows that were passed over to get it.

    `target` and `conditions` are pixels, [3, H, W] and [K, 3, H, W]; if `encoded`, latents [C, h, w] and [K, C, h, w].
    `number` is the place in the run, from which its noise is drawn.
    """

    number: int
    name: str
    target: Tensor
    conditions: Tensor
    prompt: str
    task: str
    subject: str | None
    skipped: tuple[str, ...] = ()
    encoded: bool = False


class Fitted:
    """A row's picture at its final size, decoded when it is first asked for."""

    def __init__(self, picture: Picture, size: Size) -> None:
        self.picture, self.size = picture, size

    @cached_property
    def image(self) -> Image.Image:
        """RGB, of `size`."""
        return fit_picture(self.picture.load(), *self.size)

    @cached_property
    def identity(self) -> list[Any]:
        """What its pixels depend on."""
        return [self.picture.digest(), *self.size]


@dataclass(frozen=True)
class Part:
    """One frame of a sample: a fitted picture, or what a task makes of it (`role` "condition" or "target") with a seed."""

    fitted: Fitted
    task: Task | None = None
    role: str = ""
    seed: int = 0

    def image(self) -> Image.Image:
        """Make it; Failure or ValueError if it cannot be."""
        if self.task is None:
            return self.fitted.image
        if self.role == "target":
            return self.task.target(self.fitted.image, self.seed)
        return fit_picture(self.task.condition(self.fitted.image, self.seed), *self.fitted.size)

    def identity(self) -> list[Any]:
        """What its pixels depend on, as JSON types."""
        if self.task is None:
            return self.fitted.identity
        return [*self.fitted.identity, self.role, task_fingerprint(self.task), self.seed if self.task.seeded else None]


def task_fingerprint(task: Task) -> str:
    """The task with all its options; of a depth model, its files too, or its commit on the hub.

    Raises:
        UsageError: The commit cannot be known.
    """
    if not isinstance(task, DepthTask) or not task.model:
        return repr(task)
    folder = Path(task.model)
    if not folder.is_dir():
        return f"{task!r} {depth_revision(task.model)}"
    return f"{task!r} {_model_fingerprint(folder, file_stamp(sorted(p for p in folder.rglob('*') if p.is_file())))}"


@lru_cache(maxsize=16)
def _model_fingerprint(folder: Path, stamp: str) -> str:
    # asked for with every sample, but its files are read again only if their stamp changed
    return folder_fingerprint(folder)


def variant_seed(name: str, variant: int) -> int:
    """Seed of one of a row's stored draws: a function of the row alone, so that runs with any seed can share a store."""
    return int.from_bytes(hashlib.sha256(f"{name}/{variant}".encode("utf-8", "surrogateescape")).digest()[:4], "big") >> 1


def check_tasks(source: Source, specs: Sequence[str]) -> None:
    """UsageError if the source says that some of its rows are of a task that is not among these."""
    names = [get_task(spec).name for spec in specs]
    if missing := source.tasks - set(names):
        raise UsageError(f"tasks must hold {sorted(missing)}, which the data names, got {sorted(names)}")


class TextCheck:
    """Failure for a row whose prompt is longer than the text window, unless it is to be cut, or does not name its subject."""

    def __init__(self, tokenizer: Any, window: int, truncate: bool = False) -> None:
        self.tokenizer, self.window, self.truncate = tokenizer, window, truncate

    def tokens(self, prompt: str) -> int:
        """Length of a prompt."""
        return token_count(self.tokenizer, prompt)

    def __call__(self, row: Record) -> Record:
        """The row, with its prompt cut if that was asked for."""
        if self.truncate:
            row = replace(row, prompt=cut_prompt(self.tokenizer, row.prompt, self.window))
        if (length := self.tokens(row.prompt)) > self.window:
            raise Failure(
                f"{row.name} must have a prompt of at most {self.window} tokens, got {length}: {row.prompt[:60]!r}; "
                "--truncate-prompts cuts it"
            )
        try:
            subject_span_mask(self.tokenizer, [row.prompt], [row.subject], self.window)
        except ValueError as error:
            raise Failure(f"{row.name}: {error}") from None
        return row


class PairDataset(Dataset[Sample]):
    """Sample n of an endless run over a source: shuffled each epoch, its task and its condition drawn from (seed, n).

    Args:
        source: Rows.
        tasks: Specs to choose from for rows that do not name one.
        weights: Relative frequency of each task, for those rows; empty = equal.
        size: (width, height) in pixels.
        seed: Seed of order, tasks and conditions.
        strict: Raise at a bad row instead of taking the next one.
        check: Called with each record; gives what is to be trained on, or raises Failure for a bad one.
        order: Rows and sizes of the samples; default: every row once per epoch at `size`.
        variants: Draws of what is random per row; 0 = a new one each time.
        store: Take latents from here instead of making pixels; `variants` must be the store's.

    Raises:
        UsageError: A task is missing that the source says some of its rows are of.
    """

    def __init__(
        self,
        source: Source,
        tasks: Sequence[str],
        weights: Sequence[float],
        size: Size,
        seed: int,
        strict: bool,
        check: Callable[[Record], Record] | None = None,
        *,
        order: Order | None = None,
        variants: int = 0,
        store: Store | None = None,
    ) -> None:
        self.source, self.size, self.seed, self.strict, self.check = source, size, seed, strict, check
        self.tasks = [get_task(spec) for spec in tasks]
        self.by_name = {task.name: task for task in self.tasks}
        check_tasks(source, tasks)
        self.weights = list(weights) or [1.0] * len(self.tasks)
        self.order: Order = order or OneSize(source.blocks, seed, size)
        self.variants, self.store = variants, store
        for task in self.tasks:
            if isinstance(task, DepthTask) and task.model:
                depth_revision(task.model)  # that there is no such model is no row's fault

    def __getitem__(self, n: int) -> Sample:
        rng = random.Random(f"{self.seed}/{n}")
        skipped: list[str] = []
        for attempt in range(min(self.order.choices(n), 1000)):
            index, size = self.order.place(n, attempt)
            try:
                return self.sample(index, rng.randrange(2**31), tuple(skipped), size, n)
            except StoreFailure:
                raise
            except Failure as error:
                if self.strict:
                    raise
                skipped.append(str(error))
        raise Failure(f"data must hold good rows, got {len(skipped)} bad ones in a row; the first: {skipped[0]}")

    def sample(self, index: int, seed: int, skipped: tuple[str, ...] = (), size: Size | None = None, number: int = 0) -> Sample:
        """Make the sample of one row; Failure if the row is bad."""
        drawn = variant_seed(self.source.row_name(index), seed % self.variants) if self.variants else seed
        record = self.source.record(index, drawn)
        if self.check is not None:
            record = self.check(record)
        task = self._task(record, seed)
        try:
            target = Fitted(record.target, size or self.size)
            frames = [self._frame(part, record) for part in self.parts(record, task, target, drawn)]
        except StoreFailure:
            raise
        except (Failure, ValueError) as error:
            raise Failure(f"{record.name}: {error}") from None
        encoded = self.store is not None
        conditions = torch.stack(frames[1:])
        return Sample(number, record.name, frames[0], conditions, record.prompt, task.name, record.subject, skipped, encoded)

    def parts(self, record: Record, task: Task, target: Fitted, seed: int) -> list[Part]:
        """The frames of a sample, target first."""
        if record.conditions:
            return [Part(target), *(Part(Fitted(c, target.size)) for c in record.conditions)]
        if record.reference is not None and task.of_subject:
            return [Part(target), Part(Fitted(record.reference, target.size))]
        made = Part(target) if type(task).target is Task.target else Part(target, task, "target", seed)
        return [made, Part(target, task, "condition", seed)]

    def choices(self, record: Record) -> list[tuple[Task, float]]:
        """The tasks that a row can be of, with their weights; Failure if there is none, UsageError if it should be named."""
        if record.task is not None:
            if record.task not in self.by_name:
                raise Failure(f"{record.name}: task must be one of {sorted(self.by_name)}, got {record.task!r}")
            task = self.by_name[record.task]
            if not (record.conditions or self._made(task, record)):
                raise Failure(f"{record.name} must have a condition, since task {task.name!r} derives none")
            return [(task, 1.0)]
        if record.conditions:
            if len(self.tasks) > 1:
                raise UsageError(
                    f"{record.name} must name its task (column task), since it has its own condition and tasks are "
                    f"{sorted(self.by_name)}, got none"
                )
            return [(self.tasks[0], 1.0)]
        # one whose condition can be had
        able = [w if self._made(task, record) else 0.0 for task, w in zip(self.tasks, self.weights, strict=True)]
        if not any(able):
            wanted = sorted(task.name for task, weight in zip(self.tasks, self.weights, strict=True) if weight)
            raise Failure(f"{record.name} must have a condition, since none of {wanted} derives one")
        return list(zip(self.tasks, able, strict=True))

    @staticmethod
    def _made(task: Task, record: Record) -> bool:
        """Whether the condition of a row without its own can be had."""
        return task.derives or (task.of_subject and record.reference is not None)

    def _task(self, record: Record, seed: int) -> Task:
        choices = self.choices(record)
        tasks, weights = zip(*choices, strict=True)
        return tasks[0] if len(tasks) == 1 else random.Random(seed).choices(tasks, weights)[0]

    def _frame(self, part: Part, record: Record) -> Tensor:
        if self.store is not None:
            return self.store.latents(part.identity(), record.name)
        return to_pixels(part.image())


@dataclass
class Batch:
    """A micro-batch of samples.

    `target` and `conditions` are pixels, [B, 3, H, W] and [B, K, 3, H, W]; if `encoded`, latents [B, C, h, w] and
    [B, K, C, h, w].
    """

    numbers: list[int]
    target: Tensor
    conditions: Tensor
    prompts: list[str]
    tasks: list[str]
    subjects: list[str | None]
    names: list[str]
    skipped: list[str]
    encoded: bool = False

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        return replace(self, target=self.target.to(device), conditions=self.conditions.to(device))


def collate(samples: list[Sample]) -> Batch:
    """Stack samples; Failure if their numbers of condition images differ."""
    counts = {len(s.conditions) for s in samples}
    if len(counts) != 1:
        raise Failure(
            f"rows of one batch must have the same number of conditions, got {sorted(counts)}; --buckets groups such rows"
        )
    return Batch(
        [s.number for s in samples],
        torch.stack([s.target for s in samples]),
        torch.stack([s.conditions for s in samples]),
        [s.prompt for s in samples],
        [s.task for s in samples],
        [s.subject for s in samples],
        [s.name for s in samples],
        [name for s in samples for name in s.skipped],
        samples[0].encoded,
    )
