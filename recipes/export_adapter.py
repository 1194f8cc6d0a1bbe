"""Recipe, last step: store a trained nano adapter in float16 beside the packaged base.

realgeneral train --data realgeneral/nano/mixture.json --output outputs/nano ...
python -m recipes.export_adapter outputs/nano
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from realgeneral.generation.pipeline import RealGeneralPipeline
from realgeneral.model.adapter import read_adapter_info, save_adapter
from realgeneral.model.adapter_info import signature_of
from realgeneral.nano.assets import ASSETS


def main() -> None:
    """Read RUN/adapter and RUN/metrics.jsonl, write assets/adapter and RUN/adapter_loss.csv (means of 25 steps)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="output folder of realgeneral train")
    parser.add_argument("--base", default="nano", help="base that the run was trained on")
    arguments = parser.parse_args()
    adapter = arguments.run / "adapter"
    pipe = RealGeneralPipeline.from_pretrained(arguments.base, adapter=adapter)
    info = replace(read_adapter_info(adapter), base="nano", signature=signature_of(pipe.transformer))
    save_adapter(pipe.transformer, ASSETS / "adapter", info, dtype=torch.float16)
    rows = [json.loads(line) for line in (arguments.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    means = [(rows[i + 24]["step"], sum(row["loss"] for row in rows[i : i + 25]) / 25) for i in range(0, len(rows) - 24, 25)]
    lines = ["step,loss", *(f"{step},{loss:.5f}" for step, loss in means)]
    (arguments.run / "adapter_loss.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
