"""Make a picture with nano: derive edges from a picture, and draw another one along them.

python examples/generate.py --picture fox.png --prompt "fox, orange, 3d render" --output fox_again.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

from realgeneral import RealGeneralPipeline
from realgeneral.pictures import fit_picture, load_picture
from realgeneral.tasks import get_task


def main() -> None:
    """Load, derive the condition, generate, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, required=True, help="picture whose edges are kept")
    parser.add_argument("--prompt", required=True, help="what to make, at most 16 tokens for nano")
    parser.add_argument("--output", type=Path, default=Path("generated.png"), help="PNG to write")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    arguments = parser.parse_args()

    pipe = RealGeneralPipeline.from_pretrained("nano", adapter="nano")
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    height, width = pipe.image_size()
    # the adapter knows with which options of the task it was trained
    assert pipe.adapter is not None
    task = get_task(pipe.adapter.task_spec("canny"))
    edges: Image.Image = task.condition(fit_picture(load_picture(arguments.picture), width, height), arguments.seed)
    image = pipe(
        arguments.prompt,
        edges,
        task="canny",
        num_inference_steps=10,
        guidance_scale=1.5,
        image_guidance_scale=1.5,
        generator=torch.Generator().manual_seed(arguments.seed),
    ).images[0]
    image.save(arguments.output)
    print(f"edges of {arguments.picture} with {arguments.prompt!r}: {arguments.output}")


if __name__ == "__main__":
    main()
