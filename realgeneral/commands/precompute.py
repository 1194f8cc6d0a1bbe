"""`realgeneral precompute`: encode the pictures and prompts of a data set once.

Every entry is found by the hash of what it depends on (file contents, prompt, task with its options, size, the encoders' files,
dtype), so that a second run adds what is missing and a stale entry cannot be met. Several processes write shards of one store.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from realgeneral.data.samples import Fitted, PairDataset, Part, variant_seed
from realgeneral.data.sources.open import open_source
from realgeneral.data.store import Store, StoreSettings, StoreWriter
from realgeneral.data.workers import from_workers
from realgeneral.errors import Failure, UsageError
from realgeneral.generation.bases import fingerprints, load_encoders, load_for_data
from realgeneral.pictures import to_pixels
from realgeneral.settings.data import PrecomputeConfig
from realgeneral.training.features import TextCache
from realgeneral.training.plan import Plan

# what a kill loses at most
FLUSH_SECONDS = 60.0


def parse_shard(spec: str) -> tuple[int, int]:
    """(i, n) of "i/n", or of torchrun's RANK and WORLD_SIZE."""
    given = spec or f"{os.environ.get('RANK', '0')}/{os.environ.get('WORLD_SIZE', '1')}"
    part, _, count = given.partition("/")
    if not (part.isdecimal() and count.isdecimal() and len(count) < 10 and int(part[:10]) < int(count)):
        raise UsageError(f'shard must be "i/n" with 0 <= i < n, got {given!r}')
    return int(part), int(count)


@dataclass
class RowWork:
    """What a row needs: pixels by key, keys of pictures that cannot be made with the reason, its prompts; or why it is bad."""

    pixels: dict[str, Tensor] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    prompts: set[str] = field(default_factory=set)
    problem: str | None = None
    known: list[str] = field(default_factory=list)


class RowsToEncode(Dataset[RowWork]):
    """Rows start, start + 1, ... of a data set as work; keys that are stored already are hashed but not decoded."""

    def __init__(self, pairs: PairDataset, rows: range, store: Store) -> None:
        self.pairs, self.rows, self.store = pairs, rows, store

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> RowWork:
        index = self.rows[position]
        work = RowWork()
        try:
            for part in self._parts(index, work):
                key = self._key(part, index)
                if key in self.store.bad:
                    work.bad[key] = self.store.bad[key]
                elif key in self.store:
                    work.known.append(key)
                elif key not in work.pixels and key not in work.bad:
                    self._make(part, key, work)
        except Failure as error:
            work.problem = str(error)
        if work.problem is None and work.bad:
            work.problem = f"{self.pairs.source.row_name(index)}: {next(iter(work.bad.values()))}"
        return work

    def _key(self, part: Part, index: int) -> str:
        try:
            return self.store.latents_key(part.identity())
        except Failure as error:
            raise Failure(f"{self.pairs.source.row_name(index)}: {error}") from None

    def _parts(self, index: int, work: RowWork) -> Iterator[Part]:
        """All frames that training can ask of a row: of each task it can be of, and of each draw if anything is drawn."""
        source, size = self.pairs.source, self.pairs.order.size(index)
        for variant in range(self.store.settings.variants):
            seed = variant_seed(source.row_name(index), variant)
            record = source.record(index, seed)
            if variant == 0 or source.seeded:
                target = Fitted(record.target, size)  # decoded once for all that is made of it
                if self.pairs.check is not None:
                    record = self.pairs.check(record)
                work.prompts.add(record.prompt)
            for task, weight in self.pairs.choices(record):
                if weight and (variant == 0 or task.seeded or source.seeded):
                    yield from self.pairs.parts(record, task, target, seed)
            if not source.seeded and not any(task.seeded for task in self.pairs.tasks):
                return

    @staticmethod
    def _make(part: Part, key: str, work: RowWork) -> None:
        try:
            work.pixels[key] = to_pixels(part.image())
        except (Failure, ValueError) as error:
            work.bad[key] = str(error)


def precompute(config: PrecomputeConfig) -> dict[str, Any]:
    """Run one process's part.

    Returns:
        "encoded" and "kept" entries, "rows", "bad" rows by reason.

    Raises:
        UsageError: A setting does not fit the base or the store.
        Failure: Data or store cannot be read or written, or `strict` and a row is bad.
    """
    part, count = parse_shard(config.shard)
    source = open_source(config.data, config.columns, repeats=False, allow_outside=config.allow_outside)
    pipe = load_for_data(config.base)
    plan = Plan.of(config, pipe)
    pairs = plan.dataset(source)
    settings = StoreSettings(*fingerprints(config.base), plan.dtype, plan.window, config.variants)
    writer = StoreWriter(Path(config.output), settings, f"{part:03d}-of-{count:03d}", config.shard_megabytes * 2**20)

    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a depth model of a task takes it too
    load_encoders(pipe, config.base, getattr(torch, settings.dtype), device)
    rows = range(part * len(source) // count, (part + 1) * len(source) // count)
    work = DataLoader(RowsToEncode(pairs, rows, writer.store), None, num_workers=config.num_workers)
    encoder = _Encoder(pipe, writer, device, config.encode_batch)
    bad: list[str] = []
    flushed = time.monotonic()
    with from_workers(), writer.writing():
        encoder.text("")  # prompts are dropped in training
        for row in tqdm(work, desc=f"precompute {part}/{count}", unit="row", file=sys.stderr):
            encoder.row(row)
            if time.monotonic() > flushed + FLUSH_SECONDS:  # on a small model one shard may be the whole store
                writer.flush()
                flushed = time.monotonic()
            if row.problem is not None:
                bad.append(row.problem)
                if config.strict:
                    encoder.finish()
                    raise Failure(row.problem)
                print(f"bad row: {row.problem}", flush=True)
        encoder.finish()
    if bad and len(bad) == len(source):
        raise Failure(f"data must hold good rows, got {len(bad)} bad ones; the first: {bad[0]}")
    return {"encoded": writer.written, "kept": len(encoder.used) - writer.written, "rows": len(rows), "bad": bad}


class _Encoder:
    """Puts rows through the encoders: each picture and prompt by itself, as training does, or `batch` of them together.

    The bits of a result may depend on what it is computed with, so that only with a batch of 1 they are those of training.
    """

    def __init__(self, pipe: Any, writer: StoreWriter, device: torch.device, batch: int = 1) -> None:
        self.pipe, self.writer, self.device, self.batch = pipe, writer, device, batch
        self.texts = TextCache(pipe, capacity_bytes=0)
        self.used: set[str] = set()
        self.pixels: dict[str, Tensor] = {}
        self.prompts: dict[str, str] = {}

    def text(self, prompt: str) -> None:
        key = self.writer.store.text_key(prompt)
        self.used.add(key)
        if key not in self.writer and key not in self.prompts:
            self.prompts[key] = prompt
            if len(self.prompts) == self.batch:
                self._encode_prompts()

    @torch.no_grad()
    def row(self, row: RowWork) -> None:
        self.used.update(row.known, row.pixels)
        for prompt in sorted(row.prompts):
            self.text(prompt)
        for key, pixels in row.pixels.items():
            if key not in self.writer and key not in self.pixels:  # another row may have the same picture
                if self.pixels and next(iter(self.pixels.values())).shape != pixels.shape:
                    self._encode_pictures()
                self.pixels[key] = pixels
                if len(self.pixels) == self.batch:
                    self._encode_pictures()
        for key, reason in row.bad.items():
            if key not in self.writer:
                self.writer.add_bad(key, reason)

    @torch.no_grad()
    def finish(self) -> None:
        """Encode what waits, and write."""
        self._encode_prompts()
        self._encode_pictures()
        self.writer.flush()

    def _encode_prompts(self) -> None:
        prompts, self.prompts = self.prompts, {}
        if prompts:
            for key, features in zip(prompts, self.texts.encoded(list(prompts.values())), strict=True):
                self.writer.add(key, features)

    def _encode_pictures(self) -> None:
        pixels, self.pixels = self.pixels, {}
        if pixels:
            latents = self.pipe.transformer.images.encode(self.pipe.vae, torch.stack(list(pixels.values())).to(self.device))
            for key, tensor in zip(pixels, latents, strict=True):
                self.writer.add(key, tensor)
