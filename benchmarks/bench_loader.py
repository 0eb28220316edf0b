"""What offline data cost: reading and tokenising into a token store, feeding it to a trainer, and the memory of the process that trains.

    python benchmarks/bench_loader.py [--rows 10000,100000,1000000] [--skip_trainer]

Generated rows {prompt, response, reward} of about 100 tokens (a byte-level BPE tokenizer trained on the spot), four responses to a prompt, steps cut
at line feeds. Prints a table and writes ``benchmarks/results/loader.json``.

* Rates, in CPU-seconds of one process, so that a busy machine disturbs little: rows and tokens per CPU-second of building (10 000 rows) and of
  feeding (batches of 256 rows in random order, as packed tensors), against the tokens per CPU-second that this library's trainer consumes in the
  same minutes (supervised, 7.9 M parameters, packed, one thread: what ``bench_sft_throughput.py`` measures; OREO's three models take longer, and so
  does every larger model). The bar: 5 times the trainer's rate.
* Memory of the driver at each number of rows, in a process of its own, with Ray Data tasks doing the work: its peak until the store is finished,
  then while 200 batches are fed, each above what it was before the build. Anonymous memory is what counts; pages of files that are mapped can be
  dropped at any time. The bar: from the smallest to the largest number of rows it grows by less than 64 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from _record import write

ROOT = Path(__file__).resolve().parents[1]
BATCH_SIZE = 256
FED_BATCHES = 200
SIBLINGS = 4
WORDS = (
    "first we add the two numbers then multiply by three so there are remaining apples in each basket which gives total cost of dollars per week "
    "because half were sold on Monday and twice as many again Natalia therefore answer is left over after sharing with friends minus equals"
).split()


def make_rows(path: Path, count: int) -> None:
    source = random.Random(0)

    def words(number: int) -> str:
        return " ".join(source.choice(WORDS) for _ in range(number))

    with path.open("w") as file:
        for number in range(count):
            if number % SIBLINGS == 0:
                prompt = f"{words(24)} {source.randrange(10_000)}?\n"
            lines = [f"{words(source.randint(6, 14))} = {source.randrange(1000)}." for _ in range(source.randint(2, 7))]
            response = "\n".join([*lines, f"#### {source.randrange(1000)}"])
            file.write(json.dumps({"prompt": prompt, "response": response, "reward": source.randint(0, 1)}) + "\n")


def make_tokenizer(folder: Path, rows: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    with rows.open() as lines:
        tokenizer.train_from_iterator((json.loads(line)["response"] for line, _ in zip(lines, range(2000), strict=False)), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")


def memory() -> dict[str, float]:
    """Resident memory of this process in MB: anonymous and all of it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("VmRSS", "VmHWM", "RssAnon"))}
    return {"anonymous": values["RssAnon"], "resident": values["VmRSS"], "peak": values["VmHWM"]}


class Peak:
    """The largest anonymous and resident memory seen by a thread that looks every 20 ms."""

    def __enter__(self) -> Peak:
        import threading

        self.anonymous = self.resident = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            now = memory()
            self.anonymous, self.resident = max(self.anonymous, now["anonymous"]), max(self.resident, now["resident"])

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def feed(store, batches: int) -> tuple[int, float]:
    """(tokens, CPU seconds) of reading and packing that many batches."""
    from openrl_reason.core.batch import TokenBatch
    from openrl_reason.core.states import state_mask
    from openrl_reason.data.offline import OfflineLoader

    loader, tokens = OfflineLoader(store, BATCH_SIZE, seed=0), 0
    started = time.process_time()
    for step in range(batches):
        batch = TokenBatch.from_trajectories(loader.trajectories(step))
        state_mask(batch, "step")
        tokens += batch.num_tokens
    loader.close()
    return tokens, time.process_time() - started


def run_rates(path: Path, model: Path, folder: Path) -> dict:
    """Building and feeding in this process."""
    from openrl_reason.data.offline import OfflineDataConfig, build_store
    from openrl_reason.data.offline_build import _tokenizer

    _tokenizer(str(model), False)  # loaded once in a process, whatever the number of rows
    started = time.process_time()
    store = build_store(OfflineDataConfig(path=(str(path),), parallel="never"), str(model), folder, say=lambda text: None)
    seconds = time.process_time() - started
    tokens, fed_seconds = feed(store, 40)
    return {
        "rows_per_cpu_second": len(store) / seconds, "build_tokens_per_cpu_second": store.num_tokens / seconds,
        "feed_tokens_per_cpu_second": tokens / fed_seconds, "tokens_per_row": store.num_tokens / len(store),
    }  # fmt: skip


def run_memory(path: Path, model: Path, folder: Path) -> dict:
    """The driver's memory while tasks build and while it feeds."""
    import torch  # noqa: F401  part of every driver, so part of what it has before

    from openrl_reason.data.offline import OfflineDataConfig, build_store
    from openrl_reason.workers.loader import map_parts
    from openrl_reason.workers.placement import PlacementConfig, ray_session

    with ray_session(PlacementConfig(device="cpu")):
        list(map_parts(_nothing, 4))  # Ray Data and its machinery are there
        before = memory()
        started = time.perf_counter()
        with Peak() as build:
            store = build_store(OfflineDataConfig(path=(str(path),), parallel="always"), str(model), folder, say=lambda text: None)
        seconds = time.perf_counter() - started
    with Peak() as fed:
        feed(store, FED_BATCHES)
    return {
        "rows": len(store), "tokens": store.num_tokens, "build_wall_seconds": seconds, "rows_per_second": len(store) / seconds,
        "driver_mb_before": before["anonymous"], "build_adds_mb": build.anonymous - before["anonymous"],
        "feed_adds_mb": fed.anonymous - before["anonymous"], "feed_resident_adds_mb": fed.resident - before["resident"],
        "store_mb": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20,
    }  # fmt: skip


def _nothing(number: int) -> dict:
    return {}


def trainer_rate(folder: Path) -> float:
    """Tokens per CPU-second of the supervised trainer."""
    import torch
    from bench_sft_throughput import make_model, run_ours, sequences

    torch.set_num_threads(1)
    make_model(folder)
    steps = sequences(4)
    times = run_ours(str(folder), steps, 0, 4096, "float32")
    return sum(len(sequence) for step in steps[1:] for sequence in step) / sum(times[1:])


def in_process(what: str, *words: str) -> dict:
    """Runs a part of this script in a process of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__, "--part", what, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="10000,100000,1000000")
    parser.add_argument("--skip_trainer", action="store_true", help="leave out the trainer's rate, and so the ratios")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        what, *paths = args.part
        result = {"trainer": lambda folder: {"tokens_per_cpu_second": trainer_rate(folder)}, "rates": run_rates, "memory": run_memory}[what]
        print(json.dumps(result(*map(Path, paths))))
        return
    counts = [int(count) for count in args.rows.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        make_rows(folder / "rates.jsonl", 10_000)
        make_tokenizer(folder / "model", folder / "rates.jsonl")
        rates = in_process("rates", str(folder / "rates.jsonl"), str(folder / "model"), str(folder / "rates"))
        if not args.skip_trainer:
            rates["trainer_tokens_per_cpu_second"] = in_process("trainer", str(folder / "trainer"))["tokens_per_cpu_second"]
            for part in ("build", "feed"):
                rates[f"{part}_over_trainer"] = rates[f"{part}_tokens_per_cpu_second"] / rates["trainer_tokens_per_cpu_second"]
        print(json.dumps(rates, indent=1), flush=True)
        rows = []
        for count in counts:
            make_rows(folder / f"{count}.jsonl", count)
            rows.append(in_process("memory", str(folder / f"{count}.jsonl"), str(folder / "model"), str(folder / f"store-{count}")))
            print(json.dumps(rows[-1]), flush=True)
    write("loader", {"batch_size": BATCH_SIZE, "fed_batches": FED_BATCHES, "bar_over_trainer": 5, "bar_growth_mb": 64, "rates": rates}, rows)


if __name__ == "__main__":
    main()
