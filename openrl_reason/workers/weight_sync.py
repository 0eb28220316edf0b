"""New policy weights, from the trainer to the engines: packed once, sent as a whole, loaded by vLLM.

A sync is: the trainer's rank 0 copies every tensor once, converted to the engines' dtype, into one buffer (``Sender.send``), which gives a
`Manifest`; each engine gets the manifest in a single call and hands views of the buffer to vLLM (`received_tensors`). The manifest names a
version; the buffer carries it too, and both ends check it.

Transports:

* Shared memory (one node): an anonymous file in memory (``memfd_create``) that the trainer keeps mapped between syncs and engines open
  through ``/proc/<pid>/fd``. It has no name, so nothing can be left behind by a killed run; it needs no room in ``/dev/shm`` (64 MB in a
  default container); only processes of the same user can open it.
* Ray object store (any nodes): one object per bucket of tensors, read without a copy on the node where it lies.
* Broadcast over gloo or NCCL: see `weight_broadcast`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from openrl_reason.errors import ConfigError, WorkerError

ALIGNMENT = 64
HEADER_BYTES = 4096
BEING_WRITTEN = -1
BUCKET_BYTES = 256 << 20
BROADCASTS = ("gloo", "nccl")

NamedTensors = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class PackedTensor:
    """Where one tensor lies."""

    name: str
    """Name in the Hugging Face state dict."""
    shape: tuple[int, ...]
    """Shape."""
    dtype: str
    """For instance "bfloat16"."""
    bucket: int
    """Index of the bucket that holds it."""
    offset: int
    """First byte in the bucket."""
    nbytes: int
    """Bytes."""
    checksum: int | None = None
    """CRC-32 of its bytes, if asked for."""


@dataclass(frozen=True)
class Manifest:
    """What an engine needs to find and check one version of the weights."""

    version: int
    """Version of the policy."""
    transport: str
    """shared_memory, object_store, gloo or nccl."""
    tensors: tuple[PackedTensor, ...]
    """Every tensor, in the order sent."""
    location: dict[str, Any] = field(default_factory=dict)
    """Of the transport: path and host of the shared memory; references of the objects; address of the group."""
    seconds: float = 0.0
    """What packing took, including the trainer's gathering."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


class Sender(Protocol):
    """The trainer's half of a transport. Made by the driver, pickled to the process of the trainer's rank 0 for each sync."""

    def send(self, tensors: NamedTensors, version: int) -> Manifest:
        """Packs and publishes the weights; returns when ``tensors`` may change again."""
        ...


def make_sender(transport: str, *, dtype: str, checksum: bool = False, engine_hosts: Iterable[str] = ()) -> Sender:
    """The sender of a transport.

    Args:
        transport: "shared_memory", "object_store", or "auto": the first if every engine is on the trainer's host, else the second.
        dtype: floating-point tensors are sent in this dtype (the engines').
        checksum: send a CRC-32 per tensor.
        engine_hosts: `host_identity` of each engine.
    """
    if transport == "shared_memory":
        return SharedMemorySender(dtype, checksum)
    if transport == "object_store":
        return ObjectStoreSender(dtype, checksum)
    if transport == "auto":
        return AutoSender(dtype, checksum, frozenset(engine_hosts))
    raise ConfigError(f"weight transport {transport!r}: use auto, shared_memory or object_store")


def host_identity() -> str:
    """Equal in two processes that can share memory through /proc: same boot, same PID namespace."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()}/{os.readlink('/proc/self/ns/pid')}"


def wire_dtype(tensor: torch.Tensor, dtype: str) -> torch.dtype:
    """The dtype a tensor is sent in: the engines' for floating-point tensors, its own for others."""
    return getattr(torch, dtype) if tensor.is_floating_point() else tensor.dtype


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor_view(buffer: Any, entry: PackedTensor) -> torch.Tensor:
    """The tensor that lies in a buffer, without a copy."""
    dtype = getattr(torch, entry.dtype)
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nobody writes to what was received
        return torch.frombuffer(buffer, dtype=dtype, count=entry.nbytes // dtype.itemsize, offset=entry.offset).view(entry.shape)


def _crc(buffer: Any, entry: PackedTensor) -> int:
    return zlib.crc32(memoryview(buffer)[entry.offset : entry.offset + entry.nbytes])


def verify_checksum(buffer: Any, entry: PackedTensor, version: int) -> None:
    """Raises WorkerError if the entry brought a checksum and its bytes in ``buffer`` have another."""
    if entry.checksum is not None and (found := _crc(buffer, entry)) != entry.checksum:
        raise WorkerError(
            f"weights version {version}: the checksum of {entry.name!r} is {found:#010x} here and {entry.checksum:#010x} at the sender:"
            " its bytes changed on the way"
        )


# --- shared memory ---


class _MemoryFile:
    """An anonymous file in memory that grows, mapped for writing. Its first page holds the version; tensors follow."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("openrl-weights", os.MFD_CLOEXEC)
        os.fchmod(self.fd, 0o600)
        self.size = 0
        self.reserve(HEADER_BYTES)

    def reserve(self, size: int) -> None:
        """Makes room for ``size`` bytes in all; what is there stays."""
        if size > self.size:
            self.size = max(size, 2 * self.size)
            os.ftruncate(self.fd, self.size)
            self.map = mmap.mmap(self.fd, self.size)  # the old mapping goes with the last view of it

    def mark(self, version: int) -> None:
        self.map[:8] = version.to_bytes(8, "little", signed=True)


_memory_files: dict[str, _MemoryFile] = {}
"""Files that this process sends through, by sender: kept between syncs, so that their pages are allocated and mapped once."""


def _memory_file(key: str) -> _MemoryFile:
    if key not in _memory_files:
        for old in list(_memory_files)[:-1]:  # of pools that are gone, in all likelihood: two are kept
            os.close(_memory_files.pop(old).fd)
        _memory_files[key] = _MemoryFile()
    return _memory_files[key]


_mappings: dict[str, tuple[tuple[int, int, int], mmap.mmap]] = {}
"""Files of others that this process has mapped: sender -> ((device, inode, size), mapping)."""


class SharedMemorySender:
    """Packs into a file in memory that both sides keep mapped between syncs."""

    def __init__(self, dtype: str, checksum: bool = False) -> None:
        self.dtype, self.checksum, self.key = dtype, checksum, os.urandom(8).hex()

    def send(self, tensors: NamedTensors, version: int) -> Manifest:
        started = time.perf_counter()
        file = _memory_file(self.key)
        file.mark(BEING_WRITTEN)
        entries, offset = [], HEADER_BYTES
        for name, tensor in tensors:
            dtype = wire_dtype(tensor, self.dtype)
            entry = PackedTensor(name, tuple(tensor.shape), _name_of(dtype), 0, offset, tensor.numel() * dtype.itemsize)
            file.reserve(offset + entry.nbytes)
            tensor_view(file.map, entry).copy_(tensor.detach())
            entries.append(replace(entry, checksum=_crc(file.map, entry)) if self.checksum else entry)
            offset = _aligned(offset + entry.nbytes)
        file.mark(version)
        location = {"key": self.key, "path": f"/proc/{os.getpid()}/fd/{file.fd}", "host": host_identity()}
        return Manifest(version, "shared_memory", tuple(entries), location, time.perf_counter() - started)


def _map_shared(manifest: Manifest) -> mmap.mmap:
    location = manifest.location
    if location["host"] != host_identity():
        raise WorkerError(
            f"weights version {manifest.version} lie in shared memory of another host: use rollout.weight_transport object_store (or auto)"
        )
    try:
        status = os.stat(location["path"])
        identity = (status.st_dev, status.st_ino, status.st_size)
        if _mappings.get(location["key"], (None,))[0] != identity:
            with open(location["path"], "rb") as file:
                _mappings[location["key"]] = (identity, mmap.mmap(file.fileno(), status.st_size, access=mmap.ACCESS_READ))
    except OSError as error:
        raise WorkerError(
            f"weights version {manifest.version}: cannot open the trainer's memory: {error}. Did its process end? Where processes may not"
            " open each other's memory, use rollout.weight_transport object_store"
        ) from error
    return _mappings[location["key"]][1]


@contextlib.contextmanager
def _from_shared_memory(manifest: Manifest) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
    memory = _map_shared(manifest)

    def check() -> None:
        written = int.from_bytes(memory[:8], "little", signed=True)
        if written != manifest.version:
            state = "is being written" if written == BEING_WRITTEN else f"holds version {written}"
            raise WorkerError(f"the manifest says weights version {manifest.version}, but the shared memory {state}")

    check()
    for entry in manifest.tensors:
        verify_checksum(memory, entry, manifest.version)
    yield ((entry.name, tensor_view(memory, entry)) for entry in manifest.tensors)
    check()  # the trainer did not start on the next version while these were being read


# --- buckets, through Ray's object store ---


def pack_buckets(
    tensors: NamedTensors, dtype: str, *, checksum: bool = False, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[torch.Tensor, list[PackedTensor]]]:
    """Copies tensors into buckets (uint8, on the tensors' device) of at most ``bucket_bytes``; a larger tensor has one of its own.

    Each tensor is copied before the next one is asked for, so an iterator may free what it gave. A bucket is valid until the next one is
    asked for: they share one buffer.
    """
    buffer, entries, end, index = torch.empty(0, dtype=torch.uint8), [], 0, 0
    for name, tensor in tensors:
        wire = wire_dtype(tensor, dtype)
        nbytes = tensor.numel() * wire.itemsize
        if entries and end + nbytes > bucket_bytes:
            yield buffer[:end], entries
            entries, end, index = [], 0, index + 1
        if end + nbytes > len(buffer):  # the bucket is empty then
            buffer = torch.empty(max(bucket_bytes, nbytes), dtype=torch.uint8, device=tensor.device)
        entry = PackedTensor(name, tuple(tensor.shape), _name_of(wire), index, end, nbytes)
        bucket_view(buffer, entry).copy_(tensor.detach())
        entries.append(replace(entry, checksum=_crc(buffer.cpu().numpy(), entry)) if checksum else entry)
        end = min(_aligned(end + nbytes), len(buffer))
    if entries:
        yield buffer[:end], entries


def bucket_view(bucket: torch.Tensor, entry: PackedTensor) -> torch.Tensor:
    """The tensor that lies in a uint8 bucket, on any device."""
    return bucket[entry.offset : entry.offset + entry.nbytes].view(getattr(torch, entry.dtype)).view(entry.shape)


class ObjectStoreSender:
    """Puts each bucket into Ray's object store."""

    def __init__(self, dtype: str, checksum: bool = False) -> None:
        self.dtype, self.checksum = dtype, checksum

    def send(self, tensors: NamedTensors, version: int) -> Manifest:
        import ray

        started = time.perf_counter()
        entries: list[PackedTensor] = []
        references = []
        for bucket, packed in pack_buckets(((name, tensor.cpu()) for name, tensor in tensors), self.dtype, checksum=self.checksum):
            references.append(ray.put((version, bucket.numpy())))
            entries += packed
        return Manifest(version, "object_store", tuple(entries), {"buckets": references}, time.perf_counter() - started)


@contextlib.contextmanager
def _from_object_store(manifest: Manifest) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
    import ray

    buckets = []
    for index, reference in enumerate(manifest.location["buckets"]):
        version, bucket = ray.get(reference)
        if version != manifest.version:
            raise WorkerError(f"the manifest says weights version {manifest.version}, but bucket {index} holds version {version}")
        buckets.append(bucket)
    for entry in manifest.tensors:
        verify_checksum(buckets[entry.bucket], entry, manifest.version)
    yield ((entry.name, tensor_view(buckets[entry.bucket], entry)) for entry in manifest.tensors)


class AutoSender:
    """Shared memory if every engine is on the host where this is called, else the object store."""

    def __init__(self, dtype: str, checksum: bool, engine_hosts: frozenset[str]) -> None:
        self.engine_hosts = engine_hosts
        self.shared_memory, self.object_store = SharedMemorySender(dtype, checksum), ObjectStoreSender(dtype, checksum)

    def send(self, tensors: NamedTensors, version: int) -> Manifest:
        near = self.engine_hosts <= {host_identity()}
        return (self.shared_memory if near else self.object_store).send(tensors, version)


# --- the engines' half ---


@contextlib.contextmanager
def received_tensors(manifest: Manifest, version: int, worker: int = 0) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
    """The tensors of a manifest, as read-only views, valid inside the ``with`` block.

    Checksums are verified before the first tensor is given (of a broadcast: bucket by bucket).

    Args:
        worker: index of the calling worker in its engine (tensor parallelism).

    Raises:
        WorkerError: the manifest or the bytes are of another version than ``version``, a checksum differs, or the bytes cannot be reached.
    """
    if manifest.version != version:
        raise WorkerError(f"asked to load weights version {version}, but the manifest says version {manifest.version}")
    if manifest.transport in BROADCASTS:
        from openrl_reason.workers.weight_broadcast import receive_broadcast

        yield receive_broadcast(manifest, worker)
        return
    receive = {"shared_memory": _from_shared_memory, "object_store": _from_object_store}[manifest.transport]
    with receive(manifest) as tensors:
        yield tensors
