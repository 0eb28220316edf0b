"""Who can reach the processes of a run. A private cluster keeps to the loopback interface and to its owner, and so does all that runs in it.

Ray, torch and gloo listen on every interface unless told otherwise, and Ray runs whatever code reaches it. On a cluster of several nodes they
have to: there Ray's token authentication and the network's own walls are what protects (docs/security.md).
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import socket
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from openrl_reason.errors import ConfigError

_SINGLE_NODE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

_LOOPBACK_VARIABLES = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}


@contextlib.contextmanager
def private_cluster(variables: Mapping[str, str]) -> Iterator[None]:
    """A Ray cluster that is started inside listens on the loopback interface only, and starts only what a run uses.

    * Ray keeps to the loopback interface where its node's address is the loopback one, and that it is where clusters of several nodes are
      switched off: by an environment variable, on Linux too. Ray may have read it at import already, hence the constant.
    * No autoscaler, log monitor, dashboard or metrics agent: a private cluster has one node, actors' logs are files, and nobody looks. They
      are half of Ray's start, and ``ray.init`` has no switches for them: these are the places where it decides (Ray 2.60, which is pinned).
    * ``variables`` are in the environment of all its processes. They are inherited, which costs nothing; a runtime environment would make
      Ray throw away the workers that it starts in advance.
    """
    from ray._private import node, parameter, ray_constants, utils

    def no_dashboard(self: Any, **_: object) -> None:
        self._webui_url = None
        # The node's agent looks for a dashboard to send events to, once a second, and logs each time that there is none.
        name, nowhere = ray_constants.DASHBOARD_ADDRESS.encode(), b"127.0.0.1:0"
        self.get_gcs_client().internal_kv_put(name, nowhere, True, namespace=ray_constants.KV_NAMESPACE_DASHBOARD)

    fewer = functools.partial(parameter.RayParams, no_monitor=True, include_log_monitor=False)
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (ray_constants, "ENABLE_RAY_CLUSTER", False),
            (parameter, "RayParams", fewer),
            (node.Node, "start_api_server", no_dashboard),
            (utils, "get_dashboard_dependency_error", lambda: ImportError("private clusters have no dashboard")),  # agents without extras
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        for name, value in {**variables, _SINGLE_NODE: "0"}.items():
            stack.callback(_set_variable, name, os.environ.get(name))
            os.environ[name] = value
        yield


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def write_token_file() -> None:
    """Writes Ray's token for private clusters where there is none yet, so that nobody but its owner can read it (Ray leaves that to the umask)."""
    path = Path.home() / ".ray" / "auth_token"
    if path.exists() or any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # another run was quicker
        temporary = path.with_name(f"auth_token.{os.getpid()}")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        try:
            os.link(temporary, path)  # appears whole, and never replaces one that is in use
        finally:
            temporary.unlink()


def private_folder() -> str:
    """A path for Ray's sessions where nobody else can enter. Ray makes its folders writable for everybody, its sockets and the code of jobs included.

    Raises:
        ConfigError: there is one of that name, and it is another user's or open to others.
    """
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / f"ray-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(f"{folder}, where Ray would keep its sessions, is not yours alone: remove it, or set RAY_TMPDIR to another (short) path")
    return str(folder / "ray")  # which Ray opens to everybody; the folder around it stays closed


def node_address() -> str:
    """The address of this process's Ray node. Where it is the loopback one, gloo, NCCL and vLLM are told to listen there only."""
    import ray

    address = ray.util.get_node_ip_address()
    if address in ("127.0.0.1", "::1", "localhost"):
        for name, value in _LOOPBACK_VARIABLES.items():
            os.environ.setdefault(name, value)
    return address


def listening_store(address: str) -> Any:
    """A TCPStore that listens on a free port of ``address`` alone; left to itself it would listen on every interface."""
    import torch

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind((address, 0))
        listener.listen(128)
        port, descriptor = listener.getsockname()[1], listener.detach()
    return torch.distributed.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)
