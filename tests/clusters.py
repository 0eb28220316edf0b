"""A Ray of the tests' own, started as runs start theirs."""

import contextlib
import os
import tempfile
from pathlib import Path

from openrl_reason.environment import runtime_variables
from openrl_reason.workers.network import private_cluster

ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def local_ray(num_cpus=2):
    """``ray``, connected to a cluster of this machine with that many (logical) CPUs, which ends with the block. Actors can import the tests."""
    import ray

    variables = {**runtime_variables("cpu"), "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    # Ray's sockets live in its folder, and their paths may not be long.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        with private_cluster(variables):
            ray.init(
                address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level="error", _temp_dir=folder,
                object_store_memory=200 << 20,
            )  # fmt: skip
        try:
            yield ray
        finally:
            ray.shutdown()
