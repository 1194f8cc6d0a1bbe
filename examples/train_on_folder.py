"""Train an adapter on a folder of captioned pictures, and make a picture with it.

python examples/train_on_folder.py --data pictures/ --output outputs/mine --steps 200

The folder holds pictures with a .txt caption of the same name beside each. nano trains on a CPU; another base takes --base.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from realgeneral import RealGeneralPipeline
from realgeneral.pictures import load_picture, save_picture
from realgeneral.settings.train import TrainConfig
from realgeneral.tasks import get_task
from realgeneral.training.train import train


def main() -> None:
    """Train, load what came out, generate from the first picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of captioned pictures")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--base", default="nano", help="CogVideoX checkpoint, or nano")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    arguments = parser.parse_args()

    result = train(
        TrainConfig(
            base=arguments.base,
            data=str(arguments.data),
            output=str(arguments.output),
            tasks=["colouring"],
            truncate_prompts=True,
            steps=arguments.steps,
            batch_size=4,
            rank=16,
            warmup_steps=min(10, arguments.steps - 1),
            sample_count=0,
        )
    )
    print(f"loss {result['loss']:.4f} after {result['steps']} steps; adapter in {result['adapter']}")

    pipe = RealGeneralPipeline.from_pretrained(arguments.base, adapter=result["adapter"])
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    first = next(path for path in sorted(arguments.data.iterdir()) if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    grey = get_task("colouring").condition(load_picture(first), 0)
    image = pipe("", grey, task="colouring", num_inference_steps=10, guidance_scale=1.0).images[0]
    save_picture(image, arguments.output / "coloured.png")
    print(f"{first} in new colours: {arguments.output / 'coloured.png'}")


if __name__ == "__main__":
    main()
