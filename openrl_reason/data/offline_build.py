"""Building a token store: what it depends on, which stretches of which files are read, and by whom."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openrl_reason import errors
from openrl_reason.atomic import atomic_folder, naming_disk_errors, remove_unfinished, sole_writer
from openrl_reason.config import require
from openrl_reason.data.offline_config import OfflineDataConfig
from openrl_reason.data.offline_formats import KEYS, Layout, detect_layout
from openrl_reason.data.offline_rows import RowEncoder
from openrl_reason.data.readers import Part, iter_rows
from openrl_reason.data.sources import Source, expand, first_row, first_rows, plan_parts, source_bytes, source_identity
from openrl_reason.data.store_writer import ShardWriter, finish_store, total
from openrl_reason.data.token_store import VERSION, TokenStore, is_store, read_manifest
from openrl_reason.errors import ConfigError, DataError, OpenRLError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_LOOKED_AT = 100
_PART_BYTES = 8 << 20
_WORTH_RAY = 16 << 20
"""Bytes of files from which on tasks are started: less is read and tokenised before they would have started."""
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "tekken.json",
)  # fmt: skip
_NOT_IN_KEY = ("path", "store", "parallel")
_SAY_EVERY_S = 15.0


@dataclass(frozen=True)
class Job:
    """All that a task needs to write the shards of a part."""

    config: OfflineDataConfig
    tokenizer_path: str
    folder: str
    parts: tuple[tuple[Source, Layout, Part], ...]
    trust_remote_code: bool = False

    def __call__(self, number: int) -> dict[str, Any]:
        """Writes the shards of part ``number``; ``{"shards", "counts", "error"}``. A mistake in the data is a result, so that the first one in the
        order of the files is told, whichever task finds one first."""
        source, layout, part = self.parts[number]
        rows = RowEncoder(self.config, _tokenizer(self.tokenizer_path, self.trust_remote_code), layout)
        writer = ShardWriter(Path(self.folder), number)
        error = None
        try:
            for record in rows.records(iter_rows(source.path, split=self.config.split, part=part, on_bad=rows.unread)):
                writer.add(record)
            writer.flush()
        except OpenRLError as found:
            error = [type(found).__name__, str(found)]
        return {"shards": writer.shards, "counts": dict(rows.counts), "error": error}


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Loaded once in each process."""
    from openrl_reason.models.loading import load_tokenizer

    return load_tokenizer(path, trust_remote_code=trust_remote_code)


def build_store(
    config: OfflineDataConfig,
    tokenizer_path: str,
    folder: str | Path,
    *,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> TokenStore:
    """The token store of ``config``, in ``config.store`` or else ``folder``: opened if it is there and was made of the same files with the same
    tokenizer and settings, else (re)built, which ``say`` tells together with the reason.

    Uses the Ray that is connected, or starts one for the time of the build. Raises DataError for bad rows (file and line), for files of
    different layouts and where no row is left; ConfigError for settings that cannot work with this tokenizer."""
    require(bool(config.path), "data.path", "", "name a file, a folder of files or a hub name")
    folder = Path(os.path.realpath(config.store or folder))
    tokenizer_path = str(Path(tokenizer_path).absolute()) if Path(tokenizer_path).exists() else tokenizer_path
    sources = expand(config.path)
    inside = [source.path for source in sources if folder in Path(source.path).parents]
    require(not inside, "data.store", str(folder), f"the data {', '.join(inside[:1])} lie in it: name another folder")
    layouts = _layouts(sources, config)
    key = store_key(config, sources, tokenizer_path)
    store = _present(folder, key, say)
    if store is not None:
        return store
    parts = tuple(
        (source, layout, part) for source, layout in zip(sources, layouts, strict=True) for part in plan_parts(source, config.split, _PART_BYTES)
    )
    started = time.perf_counter()
    with sole_writer(folder) as is_sole:
        if is_sole:
            with naming_disk_errors(folder):
                remove_unfinished(folder.parent, folder.name)
            store = _present(folder, key, lambda _: None)
            if store is not None:
                say(f"token store {folder}: another run has built it meanwhile")
                return store
        with atomic_folder(folder) as temporary:
            job = Job(config, tokenizer_path, str(temporary), parts, trust_remote_code)
            shards, counts = _run(job, sum(map(source_bytes, sources)), say)
            if not shards:
                remedy = f"see --data.max_length {config.max_length}, --data.overlong, --data.empty and --data.bad_rows"
                raise DataError(f"{', '.join(config.path)}: no row is left ({_described(counts)}): {remedy}")
            finish_store(temporary, shards, counts, layouts[0].kind, key)
    store = TokenStore.open(folder)
    twice = f"{store.statistics['duplicates']} equal to an earlier one; " if store.statistics["duplicates"] else ""
    say(f"token store: {_described(counts)}; {twice}{store.num_tokens} tokens, {time.perf_counter() - started:.1f} s, in {folder}")
    return store


def _run(job: Job, size: int, say: Callable[[str], None]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """All parts' shards in order, and the sum of their counts."""
    results: Generator[dict[str, Any]]
    if job.config.parallel == "always" or (job.config.parallel == "auto" and size > _WORTH_RAY):
        from openrl_reason.workers.loader import map_parts

        results = map_parts(job, len(job.parts))
    else:
        results = (job(number) for number in range(len(job.parts)))
    shards: list[dict[str, Any]] = []
    counts: Counter[str] = total(())
    said = time.perf_counter()
    with contextlib.closing(results):
        for number, result in enumerate(results, start=1):
            if result["error"]:
                kind, message = result["error"]
                raise getattr(errors, kind, DataError)(message)
            shards += result["shards"]
            counts.update(result["counts"])
            if time.perf_counter() - said > _SAY_EVERY_S:
                said = time.perf_counter()
                say(f"token store: {number} of {len(job.parts)} parts, {counts['rows']} rows")
    missing = [shard["name"] for shard in shards if not (Path(job.folder) / "shards" / shard["name"]).is_dir()]
    if missing:
        raise DataError(f"{len(missing)} of {len(shards)} shards that tasks wrote are not seen here: --data.store must be on a shared disk")
    return shards, counts


def _described(counts: Counter[str]) -> str:
    others = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(counts.items()) if count and name not in ("rows", "kept"))
    return f"{counts['kept']} of {counts['rows']} rows kept" + (f" ({others})" if others else "")


def _layouts(sources: list[Source], config: OfflineDataConfig) -> list[Layout]:
    """Of each source. Raises DataError, naming two files and their columns, where a folder mixes layouts or the whole mixes kinds."""
    layouts: list[Layout] = []
    seen: dict[str, tuple[str, list[str], Layout]] = {}
    own = {name for name in (getattr(config, f"{purpose}_key") for purpose in KEYS) if name}
    for source in sources:
        names = list(first_row(source, config.split).values)
        # A first row that lacks its reward, or another column that is asked for, must not cost all others theirs.
        lacks = not own <= set(names) or detect_layout(names, config, source.path).format == "sft"
        if lacks and not source.path.endswith(".json"):
            names = list(dict.fromkeys(name for row in first_rows(source, config.split, _ROWS_LOOKED_AT) for name in row.values))
        layout = detect_layout(names, config, source.path)
        here = source.path, list(map(str, names)), layout
        layouts.append(layout)
        _check_same(seen.setdefault("", here), here, what=lambda layout: layout.kind)
        if source.folder:
            _check_same(seen.setdefault(source.folder, here), here, what=lambda layout: layout)
    return layouts


def _check_same(first: tuple[str, list[str], Layout], other: tuple[str, list[str], Layout], *, what: Callable[[Layout], Any]) -> None:
    if what(first[2]) != what(other[2]):
        raise DataError(
            f"{first[0]} and {other[0]} do not belong together: the one has the columns {', '.join(first[1])} ({first[2].format}), the other"
            f" {', '.join(other[1])} ({other[2].format})"
        )


# ---- what a store depends on -------------------------------------------------------------------------------------------------------------


def store_key(config: OfflineDataConfig, sources: list[Source], tokenizer_path: str) -> dict[str, Any]:
    """JSON that is equal only where the same store would come out: the files' identity, the tokenizer, the settings, the code that tokenises."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_IN_KEY}
    key = {
        "files": [source_identity(source, config.split) for source in sources],
        "tokenizer": _tokenizer_identity(tokenizer_path),
        "settings": settings,
        "versions": {"store": VERSION, **{name: importlib.metadata.version(name) for name in ("tokenizers", "transformers")}},
    }
    return json.loads(json.dumps(key))


def _tokenizer_identity(path: str) -> str:
    if not Path(path).is_dir():
        return path
    digest = hashlib.blake2b(digest_size=16)
    for name in _TOKENIZER_FILES:
        file = Path(path) / name
        if file.is_file():
            digest.update(name.encode() + b"\0" + file.read_bytes())
    if (Path(path) / "config.json").is_file():  # transformers chooses the tokenizer's class by it
        digest.update(str(json.loads((Path(path) / "config.json").read_bytes()).get("model_type")).encode())
    return digest.hexdigest()


def _present(folder: Path, key: dict[str, Any], say: Callable[[str], None]) -> TokenStore | None:
    """The store that is there, if it is this one. Raises ConfigError if the folder holds anything but a token store."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not is_store(folder):
        raise ConfigError(f"--data.store: {folder} is there and is no token store: name another folder")
    manifest = read_manifest(folder)
    if manifest is None:
        say(f"token store {folder}: of another version, built again")
        return None
    before = manifest.get("key")
    changed = _changes(before if isinstance(before, dict) else {}, key)
    if changed:
        say(f"token store {folder}: built again, since it was made with other {', '.join(changed)}")
        return None
    try:
        store = TokenStore.open(folder)
    except DataError:
        say(f"token store {folder}: damaged, built again")
        return None
    say(f"token store {folder}: {len(store)} sequences, {store.num_tokens} tokens, from an earlier run")
    return store


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    changed = []
    for name, value in now.items():
        if before.get(name) != value:
            old = before.get(name) if isinstance(value, dict) else None
            inner = [entry for entry in value if (old or {}).get(entry) != value[entry]] if isinstance(value, dict) else []
            changed.append(f"{name} ({', '.join(inner)})" if inner else name)
    return changed
