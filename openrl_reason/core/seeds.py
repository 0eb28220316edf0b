"""Seeds from identities. A sample's randomness depends on what it is, never on when its request arrived."""

from __future__ import annotations

import hashlib


def derive_seed(*identity: int | str) -> int:
    """A 63-bit seed from an identity such as ``(run_seed, "train", task_id, sample_index, step)``.

    Hashing, unlike arithmetic on counters, cannot make two purposes collide (``seed + 1`` of one is ``seed`` of the next).
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in identity)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def content_id(*parts: str) -> str:
    """A stable 16-hex-digit identity of some content (BLAKE2b); used for task, group and trajectory ids."""
    return hashlib.blake2b("\x1f".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
