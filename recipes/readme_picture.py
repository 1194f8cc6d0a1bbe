"""The README's picture: two held-out pairs of every task, with the base beside the adapter.

python -m recipes.readme_picture --out docs/images/tasks.png

The pairs are the first two of the held-out order in which `realgeneral evaluate` draws them: nobody chose them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import torch

from realgeneral.evaluation.nano_table import FACE_CHANGE, as_base, generate_all, table_pairs
from realgeneral.generation.bases import load_pipeline
from realgeneral.pictures import picture_grid, save_picture, to_picture

PAIRS = 2
HEADER = ("condition", "base", "adapter", "truth")


def main() -> None:
    """Generate with nano on a CPU, half a minute."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images/tasks.png"))
    arguments = parser.parse_args()
    adapted, base = (load_pipeline("nano", torch.float32, adapter=adapter) for adapter in ("nano", None))
    for pipe in (adapted, base):
        pipe.set_progress_bar_config(disable=True)
    assert adapted.adapter is not None
    as_base(base, adapted.adapter.task_names)
    sampling = SimpleNamespace(steps=None, guidance_scale=None, image_guidance_scale=None, batch_size=PAIRS, seed=0)
    rows, labels = [], []
    for name, pairs in table_pairs(adapted.adapter.tasks, PAIRS, (64, 64), 0):
        if name == FACE_CHANGE:
            continue  # the same characters again
        images = generate_all(adapted, pairs, sampling), generate_all(base, pairs, sampling, adapted=False)
        columns = pairs.conditions, images[1], images[0], pairs.truth
        rows.append([to_picture(column[i] * 2 - 1) for i in range(PAIRS) for column in columns])
        labels.append(name + "".join(f"\n\n{sample.prompt}" for sample in pairs.samples))
    save_picture(picture_grid(rows, HEADER * PAIRS, labels), arguments.out)


if __name__ == "__main__":
    main()
