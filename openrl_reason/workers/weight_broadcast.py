"""Weights by broadcast, from the trainer's rank 0 to every worker of every engine: gloo between CPUs, NCCL between GPUs.

A process group of its own lives beside those of DeepSpeed and vLLM. The driver hosts its rendezvous; trainer and engines join at the first
sync. A sync is a series of buckets, each with a header that says what lies in it and of which version; an empty header ends it. The
engines have to be receiving before the trainer sends, so their calls are made first (`announce`).

The gloo backend is tested. The NCCL backend differs from it in one constructor and in the device of the buckets, and has **not been run**:
no GPU was at hand.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import astuple, replace
from datetime import timedelta
from typing import Any

import torch

from openrl_reason.errors import WorkerError
from openrl_reason.workers.network import listening_store, node_address
from openrl_reason.workers.weight_sync import Manifest, NamedTensors, PackedTensor, bucket_view, pack_buckets, verify_checksum

_groups: dict[tuple[str, int], Any] = {}
"""The group that this process has joined, by (key, rank), kept between syncs."""


class BroadcastSender:
    """Made by the driver, where it hosts the rendezvous as long as it lives; a pickled copy sends.

    Args:
        backend: "gloo" or "nccl".
        dtype: floating-point tensors are sent in this dtype.
        checksum: send a CRC-32 per tensor (copies every tensor to the host).
        num_receivers: workers of all engines together.
        timeout_s: after this long without an answer, joining or sending fails.
    """

    def __init__(self, backend: str, dtype: str, checksum: bool, num_receivers: int, timeout_s: float) -> None:
        self.backend, self.dtype, self.checksum = backend, dtype, checksum
        address = _own_address()
        self._store = listening_store(address)
        self.location = {
            "address": address, "port": self._store.port, "key": os.urandom(8).hex(),
            "world_size": 1 + num_receivers, "timeout_s": timeout_s, "checksum": checksum,
        }  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_store": None}

    def announce(self, version: int, first_receiver: int) -> Manifest:
        """What an engine needs before the trainer sends. ``first_receiver``: how many workers the engines before it have."""
        return Manifest(version, self.backend, (), self.location | {"rank": 1 + first_receiver})

    def send(self, tensors: NamedTensors, version: int) -> Manifest:
        """Sends every bucket to every receiver; blocks until all have them."""
        started = time.perf_counter()
        group, device = _join(self.backend, self.location, rank=0)
        sent: list[PackedTensor] = []
        on_device = ((name, tensor.to(device)) for name, tensor in tensors)
        for bucket, entries in pack_buckets(on_device, self.dtype, checksum=self.checksum):
            header = torch.frombuffer(bytearray(json.dumps([version, [astuple(entry) for entry in entries]]).encode()), dtype=torch.uint8)
            _broadcast(group, torch.tensor([len(header), len(bucket)], device=device))
            _broadcast(group, header.to(device))
            _broadcast(group, bucket)
            sent += entries
        _broadcast(group, torch.zeros(2, dtype=torch.int64, device=device))
        return Manifest(version, self.backend, tuple(sent), dict(self.location), time.perf_counter() - started)


def receive_broadcast(manifest: Manifest, worker: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors as they arrive at worker ``worker`` of an engine. Views stay valid; a bucket is freed with its last view.

    Raises:
        WorkerError: a bucket is of another version than the manifest, or a checksum differs.
    """
    group, device = _join(manifest.transport, manifest.location, manifest.location["rank"] + worker)
    other_version = None
    while True:
        sizes = torch.zeros(2, dtype=torch.int64, device=device)
        _broadcast(group, sizes)
        header_size, bucket_size = sizes.tolist()
        if not header_size:
            break
        header = torch.empty(header_size, dtype=torch.uint8, device=device)
        _broadcast(group, header)
        bucket = torch.empty(bucket_size, dtype=torch.uint8, device=device)
        _broadcast(group, bucket)
        version, entries = json.loads(bytes(header.cpu().numpy()))
        if version != manifest.version:  # received to the end all the same: the others must not wait for this one
            other_version = version
            continue
        host = bucket.cpu().numpy() if manifest.location["checksum"] else None
        for fields in entries:
            entry = replace(PackedTensor(*fields), shape=tuple(fields[1]))
            if host is not None:
                verify_checksum(host, entry, version)
            yield entry.name, bucket_view(bucket, entry)
    if other_version is not None:
        raise WorkerError(f"the manifest says weights version {manifest.version}, but version {other_version} arrived")


def _broadcast(group: Any, tensor: torch.Tensor) -> None:
    from torch.distributed import BroadcastOptions

    options = BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    group.broadcast([tensor], options).wait()
    if tensor.is_cuda:
        torch.cuda.current_stream().synchronize()  # the caller reads or overwrites the tensor next


def _join(backend: str, location: dict[str, Any], rank: int) -> tuple[Any, torch.device]:
    import torch.distributed as dist

    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", torch.cuda.current_device())
    identity = (location["key"], rank)
    if identity not in _groups:
        for old in list(_groups):
            if old[0] != location["key"]:  # of engines that are gone
                _groups.pop(old, None)
        timeout = timedelta(seconds=location["timeout_s"])
        store = dist.TCPStore(location["address"], location["port"], is_master=False, timeout=timeout)
        prefixed = dist.PrefixStore(location["key"], store)
        if backend == "gloo":
            group = dist.ProcessGroupGloo(prefixed, rank, location["world_size"], timeout)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            group = dist.ProcessGroupNCCL(prefixed, rank, location["world_size"], options)
        _groups[identity] = group
    return _groups[identity], device


def _own_address() -> str:
    """The address under which the other processes reach this one: that of its Ray node, or else of the default route (no packet is sent)."""
    import ray

    if ray.is_initialized():
        return node_address()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"
