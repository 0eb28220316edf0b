"""Where actors sit."""

import os

import pytest

from openrl_reason.errors import ConfigError
from openrl_reason.workers.network import private_cluster
from openrl_reason.workers.placement import Placement, PlacementConfig, Role, detect_gpu, plan_bundles

ROLES = [Role("policy", 2), Role("engine", 1), Role("reference", 0)]


def test_colocated_roles_share_bundles_and_separate_ones_do_not():
    together = plan_bundles(ROLES, colocate=True, gpu=True)
    assert [bundle.actors for bundle in together] == [(("policy", 0), ("engine", 0)), (("policy", 1),)]
    assert all(bundle.resources == {"GPU": 1, "CPU": 1} for bundle in together)
    apart = plan_bundles(ROLES, colocate=False, gpu=False)
    assert [bundle.actors for bundle in apart] == [(("policy", 0),), (("policy", 1),), (("engine", 0),)]
    assert all(bundle.resources == {"CPU": 1} for bundle in apart)


def test_every_actor_has_exactly_one_seat():
    for colocate in (True, False):
        seats = [actor for bundle in plan_bundles(ROLES, colocate=colocate, gpu=True) for actor in bundle.actors]
        assert sorted(seats) == [("engine", 0), ("policy", 0), ("policy", 1)]


def test_tensor_parallel_engines_get_wide_bundles_of_their_own_and_cannot_be_colocated():
    roles = [Role("policy", 2), Role("engine", 1, gpus_per_actor=4)]
    assert plan_bundles(roles, colocate=False, gpu=True)[-1].resources == {"GPU": 4, "CPU": 1}
    with pytest.raises(ConfigError, match="--placement.colocate false"):
        plan_bundles(roles, colocate=True, gpu=True)


def test_an_unknown_device_is_refused():
    with pytest.raises(ConfigError, match="--placement.device is 'tpu'"):
        detect_gpu(PlacementConfig(device="tpu"))


def test_a_cluster_that_is_not_there_is_one_clear_error():
    with pytest.raises(ConfigError, match="--placement.address is '127.0.0.1:1'"):
        Placement(PlacementConfig(address="127.0.0.1:1", device="cpu"), ROLES).__enter__()


def test_a_private_cluster_leaves_ray_and_the_environment_as_they_were(monkeypatch):
    from ray._private import node, parameter, ray_constants, utils

    def state():
        places = ((ray_constants, "ENABLE_RAY_CLUSTER"), (parameter, "RayParams"), (node.Node, "start_api_server"))
        return [*(getattr(owner, name) for owner, name in places), utils.get_dashboard_dependency_error, dict(os.environ)]

    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    before = state()
    with pytest.raises(KeyboardInterrupt), private_cluster({"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}):
        assert os.environ["OMP_NUM_THREADS"] == "1" and os.environ["DS_ACCELERATOR"] == "cpu"
        assert parameter.RayParams().no_monitor and not parameter.RayParams().include_log_monitor
        raise KeyboardInterrupt
    assert state() == before
