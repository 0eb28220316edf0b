"""Where actors live: one Ray placement group for a whole run, colocated or separate, on CPUs or GPUs.

Colocated: bundle ``i`` holds actor ``i`` of every role, which take turns on it (the driver is synchronous; on GPUs the engine sleeps while the
models train). Separate: every actor has a bundle of its own. A bundle is one GPU (and its share of CPUs) where there are GPUs, else one CPU.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from openrl_reason.environment import device_kind, runtime_variables
from openrl_reason.errors import ConfigError
from openrl_reason.workers.network import private_cluster, private_folder, write_token_file


@dataclass(frozen=True)
class PlacementConfig:
    """Cluster and placement."""

    address: str = ""
    """Ray cluster to join ("auto" or host:port). Empty: the one in RAY_ADDRESS (`ray job submit` sets it), else a private one on this machine."""
    device: str = "auto"
    """cpu, gpu, or auto: GPUs if this machine has any. On a cluster whose head node has none, say gpu."""
    colocate: bool = True
    """All roles share the same bundles and take turns, instead of one bundle per actor."""
    start_timeout_s: float = 120.0
    """Seconds to wait for the cluster to grant the bundles."""


@dataclass(frozen=True)
class Role:
    """A group of equal actors, for instance eight policy ranks."""

    name: str
    num_actors: int
    gpus_per_actor: int = 1


@dataclass(frozen=True)
class Bundle:
    """One reservation; ``actors`` are (role, index) pairs that run in it."""

    resources: Mapping[str, float]
    actors: tuple[tuple[str, int], ...]


def plan_bundles(roles: list[Role], *, colocate: bool, gpu: bool) -> list[Bundle]:
    """The bundles of a run.

    Raises:
        ConfigError: colocated roles want GPU groups of different sizes (tensor parallelism above 1).
    """
    roles = [role for role in roles if role.num_actors]
    if not colocate:
        return [
            Bundle({"GPU": role.gpus_per_actor, "CPU": 1} if gpu else {"CPU": 1}, ((role.name, index),))
            for role in roles
            for index in range(role.num_actors)
        ]
    wide = [role for role in roles if gpu and role.gpus_per_actor > 1]
    if wide:
        raise ConfigError(
            f"--placement.colocate is true, but an actor of {wide[0].name} spans {wide[0].gpus_per_actor} GPUs (tensor parallelism):"
            " use --placement.colocate false, or tensor_parallel 1"
        )
    return [
        Bundle({"GPU": 1, "CPU": 1} if gpu else {"CPU": 1}, tuple((role.name, index) for role in roles if index < role.num_actors))
        for index in range(max(role.num_actors for role in roles))
    ]


class Placement:
    """Owns the connection to Ray and the placement group of one run. Use as a context manager."""

    def __init__(self, config: PlacementConfig, roles: list[Role]) -> None:
        self.config = config
        self.gpu = detect_gpu(config)
        self.bundles = plan_bundles(roles, colocate=config.colocate, gpu=self.gpu)
        self._seat = {actor: (index, bundle) for index, bundle in enumerate(self.bundles) for actor in bundle.actors}
        self._group: Any = None
        self._owns_ray = False

    def __enter__(self) -> Placement:
        import ray
        from ray.util import placement_group

        if not ray.is_initialized():
            self._owns_ray = True
            _connect(self.config, sum(int(bundle.resources["CPU"]) for bundle in self.bundles), gpu=self.gpu)
        self._group = placement_group([dict(bundle.resources) for bundle in self.bundles], strategy="PACK")
        if not self._group.wait(self.config.start_timeout_s):
            wanted, there = _total(self.bundles), {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU")}
            self.close()
            raise ConfigError(
                f"the run needs {wanted} but the cluster has {there} (waited --placement.start_timeout_s {self.config.start_timeout_s:g} s):"
                " lower num_ranks / num_engines, use --placement.colocate true, or add nodes"
            ) from None
        return self

    def actor_options(self, role: str, index: int) -> dict[str, Any]:
        """Options for ``ActorClass.options(...)`` that put actor ``index`` of ``role`` on its seat."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle_index, bundle = self._seat[(role, index)]
        share = 1.0 / len(bundle.actors)
        return {
            "num_cpus": bundle.resources["CPU"] * share,
            "num_gpus": bundle.resources.get("GPU", 0) * share,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle_index),
        }

    def close(self) -> None:
        """Gives the bundles back, and ends Ray if this object started it."""
        import ray
        from ray.util import remove_placement_group

        if self._group is not None and ray.is_initialized():
            remove_placement_group(self._group)
            self._group = None
        if self._owns_ray and ray.is_initialized():
            ray.shutdown()

    def __exit__(self, *_: object) -> None:
        self.close()


def _connect(config: PlacementConfig, num_cpus: int, *, gpu: bool) -> None:
    """Joins the cluster that the settings or RAY_ADDRESS name, or starts a private one with at least ``num_cpus``."""
    import ray

    variables = runtime_variables("gpu" if gpu else "cpu")
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    if address:
        _check_reachable(address)
        try:
            with _sigterm_handler_kept():
                ray.init(address=address, runtime_env={"env_vars": variables}, log_to_driver=False)
        except ConnectionError as error:
            raise ConfigError(f"--placement.address is {address!r}, but no Ray cluster answers there: {error}") from None
        return
    cores = os.cpu_count() or 1
    if num_cpus > 4 * cores:
        raise ConfigError(
            f"the run needs {num_cpus} CPU bundles, this machine has {cores} cores: lower num_ranks and num_engines, use"
            " --placement.colocate true, or join a cluster with --placement.address"
        )
    if gpu and device_kind() == "cpu":
        raise ConfigError("--placement.device is 'gpu', but this machine has none: use cpu, or join a cluster with --placement.address")
    write_token_file()
    folder = private_folder()
    with _sigterm_handler_kept(), private_cluster(variables):
        ray.init(
            address="local",
            num_cpus=max(num_cpus, cores),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _temp_dir=folder,
        )


@contextlib.contextmanager
def ray_session(config: PlacementConfig) -> Iterator[None]:
    """Ray within the block, for tasks without bundles: the one that is connected, or one found or started as a run does, that ends with it."""
    import ray

    if ray.is_initialized():
        yield
        return
    _connect(config, 0, gpu=detect_gpu(config))
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _sigterm_handler_kept() -> Iterator[None]:
    """``ray.init`` replaces the driver's SIGTERM handler by one that exits in the middle of whatever runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _check_reachable(address: str) -> None:
    """Ray itself takes minutes to find out that nobody listens."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(f"--placement.address is {address!r}, but no Ray cluster answers there: {error}") from None


def _total(bundles: list[Bundle]) -> dict[str, float]:
    kinds = {kind for bundle in bundles for kind in bundle.resources}
    return {kind: sum(bundle.resources.get(kind, 0) for bundle in bundles) for kind in sorted(kinds)}


def detect_gpu(config: PlacementConfig) -> bool:
    """Whether the run uses GPUs: what ``device`` says, or what this machine has."""
    if config.device not in ("auto", "cpu", "gpu"):
        raise ConfigError(f"--placement.device is {config.device!r}: use auto, cpu or gpu")
    return (device_kind() if config.device == "auto" else config.device) == "gpu"
