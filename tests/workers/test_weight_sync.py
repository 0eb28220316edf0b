"""Properties of the weight transports alone: no engine."""

import os
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openrl_reason.errors import ConfigError, WorkerError
from openrl_reason.workers import weight_sync
from openrl_reason.workers.weight_broadcast import BroadcastSender
from openrl_reason.workers.weight_sync import ALIGNMENT, bucket_view, make_sender, pack_buckets, received_tensors


def weights(seed=0):
    """Odd sizes, a scalar, an empty and a non-contiguous tensor, a parameter, and several dtypes."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "a.weight": torch.nn.Parameter(random(7, 13)),
        "b.weight": random(3, 5, 2).transpose(0, 2),
        "c.scale": random(1)[0],
        "d.empty": torch.zeros(0, 4),
        "e.half": random(33).bfloat16(),
        "f.count": torch.arange(5),
        "g.last": random(301),
    }


def read(manifest, version=None):
    with received_tensors(manifest, manifest.version if version is None else version) as tensors:
        return {name: tensor.clone() for name, tensor in tensors}


def assert_same(received, sent, dtype):
    assert list(received) == list(sent)
    for name, tensor in sent.items():
        expected = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
        assert received[name].dtype == expected.dtype and received[name].shape == expected.shape
        assert torch.equal(received[name], expected), name


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_arrives_through_shared_memory_is_what_was_sent(dtype, checksum):
    sent = weights()
    manifest = make_sender("shared_memory", dtype=dtype, checksum=checksum).send(sent.items(), 3)
    assert_same(read(manifest), sent, getattr(torch, dtype))
    assert all(entry.offset % ALIGNMENT == 0 for entry in manifest.tensors)
    assert manifest.nbytes == sum(entry.nbytes for entry in manifest.tensors)


@pytest.mark.parametrize("bucket_bytes", [1, 200, 1 << 20])
def test_buckets_hold_every_tensor_once_and_no_more_than_they_may(bucket_bytes):
    sent = weights()
    received = {}
    for index, (bucket, entries) in enumerate(pack_buckets(sent.items(), "float32", bucket_bytes=bucket_bytes)):
        assert len(bucket) <= bucket_bytes or sum(entry.nbytes > 0 for entry in entries) == 1
        assert all(entry.bucket == index for entry in entries)
        received |= {entry.name: bucket_view(bucket, entry).clone() for entry in entries}
    assert_same(received, sent, torch.float32)


def test_a_tensor_is_copied_before_the_next_is_asked_for():
    sent = weights()

    def iterator():
        for name, tensor in sent.items():
            lent = tensor.detach().clone()
            yield name, lent
            lent.fill_(0)  # as a gathered parameter that is released

    ((bucket, entries),) = pack_buckets(iterator(), "float32")
    received = {entry.name: bucket_view(bucket, entry).clone() for entry in entries}
    assert_same(received, sent, torch.float32)
    assert_same(read(make_sender("shared_memory", dtype="float32").send(iterator(), 1)), sent, torch.float32)


def test_memory_is_kept_between_syncs_and_grows_when_needed():
    sender = make_sender("shared_memory", dtype="float32")
    first = sender.send(weights(0).items(), 1)
    read(first)
    second = sender.send(weights(1).items(), 2)
    assert first.location == second.location
    assert_same(read(second), weights(1), torch.float32)
    larger = weights(2) | {"h.big": torch.randn(200_000)}
    third = sender.send(larger.items(), 3)
    assert third.location == first.location
    assert_same(read(third), larger, torch.float32)


def test_versions_are_checked_on_both_ends():
    sender = make_sender("shared_memory", dtype="float32")
    old = sender.send(weights().items(), 1)
    with pytest.raises(WorkerError, match="load weights version 2, but the manifest says version 1"):
        read(old, 2)
    sender.send(weights().items(), 2)
    with pytest.raises(WorkerError, match="manifest says weights version 1, but the shared memory holds version 2"):
        read(old)
    with pytest.raises(ZeroDivisionError):
        sender.send(((name, tensor / (1 // (index < 3))) for index, (name, tensor) in enumerate(weights().items())), 3)
    with pytest.raises(WorkerError, match="version 2, but the shared memory is being written"):
        read(replace(old, version=2))


def test_weights_that_change_while_they_are_read_are_noticed():
    sender = make_sender("shared_memory", dtype="float32")
    manifest = sender.send(weights().items(), 1)
    with pytest.raises(WorkerError, match="version 1, but the shared memory holds version 2"), received_tensors(manifest, 1) as tensors:
        next(tensors)
        sender.send(weights().items(), 2)


def test_a_flipped_bit_fails_the_checksum_by_name():
    sender = make_sender("shared_memory", dtype="float32", checksum=True)
    manifest = sender.send(weights().items(), 1)
    entry = manifest.tensors[1]
    weight_sync._memory_files[sender.key].map[entry.offset] ^= 1
    with pytest.raises(WorkerError, match="checksum of 'b.weight' is 0x[0-9a-f]+ here and 0x[0-9a-f]+ at the sender"):
        read(manifest)


def test_another_host_is_told_which_transport_to_use():
    manifest = make_sender("shared_memory", dtype="float32").send(weights().items(), 1)
    elsewhere = replace(manifest, location=manifest.location | {"host": "another"})
    with pytest.raises(WorkerError, match="another host.*object_store"):
        read(elsewhere)


def receive_in_threads(sender, count, version=1):
    """What each of ``count`` receivers got, or the error it raised."""
    results = [None] * count

    def receive(index):
        try:
            results[index] = read(sender.announce(version, index))
        except WorkerError as error:
            results[index] = error

    threads = [threading.Thread(target=receive, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    return threads, results


@pytest.mark.parametrize(("dtype", "checksum"), [("float32", True), ("bfloat16", False)])
def test_what_arrives_by_broadcast_is_what_was_sent(dtype, checksum, monkeypatch):
    monkeypatch.setattr(weight_sync.pack_buckets, "__kwdefaults__", {"checksum": False, "bucket_bytes": 600})
    sender = BroadcastSender("gloo", dtype, checksum, num_receivers=2, timeout_s=30)
    for version in (1, 2):
        sent = weights(version)
        threads, results = receive_in_threads(sender, 2, version)
        manifest = pickle.loads(pickle.dumps(sender)).send(sent.items(), version)
        for thread in threads:
            thread.join()
        assert manifest.tensors[-1].bucket > 0 and manifest.version == version
        for received in results:
            assert_same(received, sent, getattr(torch, dtype))


def test_a_broadcast_of_another_version_is_an_error():
    sender = BroadcastSender("gloo", "float32", False, num_receivers=1, timeout_s=30)
    threads, results = receive_in_threads(sender, 1, version=1)
    sender.send([("w", torch.ones(3))], 2)
    threads[0].join(10)
    assert "manifest says weights version 1, but version 2 arrived" in str(results[0])


def test_an_unknown_transport_is_refused():
    with pytest.raises(ConfigError, match="'pigeon'"):
        make_sender("pigeon", dtype="float32")


SENDER = """
import sys, time, torch
from openrl_reason.workers.weight_sync import make_sender
manifest = make_sender("shared_memory", dtype="float32").send([("w", torch.arange(1000.0))], 1)
print(manifest.location["path"], manifest.location["key"], manifest.tensors[0].offset, flush=True)
time.sleep(60)
"""


def test_nothing_is_left_when_the_trainer_is_killed():
    process = subprocess.Popen([sys.executable, "-c", SENDER], stdout=subprocess.PIPE, text=True)
    path, key, offset = process.stdout.readline().split()
    location = {"path": path, "key": key, "host": weight_sync.host_identity()}
    entry = weight_sync.PackedTensor("w", (1000,), "float32", 0, int(offset), 4000)
    manifest = weight_sync.Manifest(1, "shared_memory", (entry,), location)
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert torch.equal(read(manifest)["w"], torch.arange(1000.0))
    opened = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
    assert "/dev/shm/" not in "\n".join(opened) + Path(f"/proc/{process.pid}/maps").read_text(), "what has a name there would stay"
    process.kill()
    process.wait()
    with pytest.raises(WorkerError, match="Did its process end"):
        read(manifest)


def test_a_process_keeps_the_memory_of_two_senders_only():
    senders = [make_sender("shared_memory", dtype="float32") for _ in range(4)]
    for sender in senders:
        sender.send(weights().items(), 1)
    assert set(weight_sync._memory_files) == {senders[2].key, senders[3].key}
