"""The core is pure: torch, numpy and the standard library."""

import subprocess
import sys


def test_importing_all_of_core_loads_no_cluster_no_engine_and_no_trainer():
    code = """
import importlib, pkgutil, sys
import openrl_reason.core as core
for module in pkgutil.iter_modules(core.__path__):
    importlib.import_module(f"openrl_reason.core.{module.name}")
heavy = ["ray", "vllm", "deepspeed", "transformers", "peft", "pandas", "pyarrow", "datasets", "wandb"]
print([name for name in heavy if name in sys.modules], len(list(pkgutil.iter_modules(core.__path__))))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, count = run.stdout.strip().rsplit(" ", 1)
    assert loaded == "[]" and int(count) >= 10
