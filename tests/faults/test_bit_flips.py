"""One bit of a file flips: it is refused by name, or what is read is what was written."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from realgeneral import RealGeneralTransformer3DModel
from realgeneral.commands.precompute import precompute
from realgeneral.data.store import SETTINGS_FILE, Store
from realgeneral.errors import Failure, UsageError
from realgeneral.model.adapter import CONDITION_FILE, LORA_FILE, load_adapter
from realgeneral.settings.data import PrecomputeConfig
from realgeneral.settings.train import TrainConfig
from realgeneral.training import checkpoint
from realgeneral.training.train import train
from tests.realgeneral.helpers.datasets import good_rows, write_folder
from tests.realgeneral.helpers.nano_like import save_nano_like

FLIPS = 200
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_accelerate")]


@dataclass
class Written:
    """Files of every kind, and what reads the folders they are in."""

    root: Path
    transformer: Any
    config: TrainConfig

    def adapter(self) -> Any:
        model = copy.deepcopy(self.transformer)
        info = load_adapter(model, self.root / "nano" / "adapter")
        lora = {name: tensor for name, tensor in model.state_dict().items() if "lora" in name}
        return asdict(info), lora, dict(model.condition_parameters())

    def checkpoint(self) -> Any:
        folder = checkpoint.start_or_resume(replace(self.config, resume=True), Path(self.config.output))
        assert folder is not None
        return checkpoint._read_state(folder), sorted(path.name for path in folder.iterdir())

    def store(self) -> Any:
        store = Store(self.root / "store")
        return asdict(store.settings), store.bad, {key: store._get(key, key) for key in sorted(store.places)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    root = tmp_path_factory.mktemp("written")
    save_nano_like(root / "nano")
    base = root / "nano" / "base"
    rows = [*good_rows(3), {"target": b"no picture", "prompt": "a red pot"}]
    for row in rows:
        row["prompt"] = "a red pot"
    data = write_folder(root / "data", rows)
    shared: dict[str, Any] = {"base": str(base), "data": data, "tasks": ["canny"], "height": 16, "width": 16}
    precompute(PrecomputeConfig(**shared, output=str(root / "store"), variants=1))
    config = TrainConfig(
        **shared, output=str(root / "run"), rank=2, alpha=4.0, steps=2, batch_size=1, warmup_steps=1, save_every=2,
        sample_count=0, ema_decay=0.9,
    )  # fmt: skip
    train(config)
    return Written(root, RealGeneralTransformer3DModel.from_pretrained(base, subfolder="transformer"), config)


FILES: dict[str, tuple[str, Callable[[Written], Any]]] = {
    "LoRA": (f"nano/adapter/{LORA_FILE}", Written.adapter),
    "condition": (f"nano/adapter/{CONDITION_FILE}", Written.adapter),
    "training state": (f"run/checkpoints/step-000002/{checkpoint.STATE_FILE}", Written.checkpoint),
    "LoRA of a checkpoint": (f"run/checkpoints/step-000002/{LORA_FILE}", Written.checkpoint),
    "digests": (f"run/checkpoints/step-000002/{checkpoint.DIGESTS_FILE}", Written.checkpoint),
    "shard": ("store/shards/000-of-001-00000.safetensors", Written.store),
    "index": ("store/shards/000-of-001-00000.json", Written.store),
    "settings of a store": (f"store/{SETTINGS_FILE}", Written.store),
}


@pytest.mark.parametrize("kind", FILES)
def test_flipped_bits(written: Written, kind: str, record_property: Callable[[str, object], None]) -> None:
    """200 flips: none is read as something else, and what is refused is a named error."""
    name, read = FILES[kind]
    path, rng = written.root / name, random.Random(kind)
    whole, wanted = path.read_bytes(), read(written)
    counts: Counter[str] = Counter()
    try:
        for _ in range(FLIPS):
            place, bit = rng.randrange(len(whole)), rng.randrange(8)
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                assert same(read(written), wanted), f"bit {bit} of byte {place} is read as something else"
                counts["accepted, as written"] += 1
            except (Failure, UsageError):
                counts["refused"] += 1
    finally:
        path.write_bytes(whole)
    print(f"{kind}: {dict(counts)} of {FLIPS} flips")
    record_property(kind, dict(counts))
    assert counts["refused"] > FLIPS // 2


def same(a: Any, b: Any) -> bool:
    """Equal values, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
