"""Run by a test in a process of its own: a private cluster with two model ranks and an engine, and what it opens to the network, as JSON."""

import contextlib
import json
import os
import sys

import ray  # before the cluster starts, as a driver of one's own may do

from openrl_reason.environment import prepare_environment
from openrl_reason.workers.model_config import ModelConfig
from openrl_reason.workers.model_group import ModelGroup
from openrl_reason.workers.placement import Placement, PlacementConfig, Role
from openrl_reason.workers.rollout import RolloutPool
from openrl_reason.workers.rollout_config import Request, RolloutConfig, SamplingConfig
from tests.sockets import beyond_loopback, command_lines, listening


def main(model: str) -> None:
    prepare_environment()
    engine = RolloutConfig(dtype="float32", max_model_len=64, max_num_seqs=8, kv_cache_gib=0.0625, weight_transport="gloo")
    with contextlib.ExitStack() as stack:
        placement = stack.enter_context(Placement(PlacementConfig(device="cpu"), [Role("policy", 2), Role("engine", 1)]))
        policy = ModelGroup.start(ModelConfig(path=model, dtype="float32", num_ranks=2, zero_stage=0), placement=placement, wait=False)
        stack.callback(policy.close)
        pool = stack.enter_context(RolloutPool(engine, model, placement=placement))
        pool.sync_weights(policy, 1)
        completions = list(pool.generate([Request("0", [5, 6, 7], seed=0, sampling=SamplingConfig(max_new_tokens=4))]))
        sockets = listening(os.getpid())
        result = {
            "node": ray.util.get_node_ip_address(),
            "completions": len(completions),
            "processes": sorted({name.split()[0] for name, _, _ in sockets}),
            "beyond_loopback": beyond_loopback(sockets),
            "command_lines": command_lines(os.getpid()),
            "variables": sorted(name for name in os.environ if name.startswith(("GLOO", "NCCL", "RAY_ENABLE"))),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
