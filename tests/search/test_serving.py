"""The value model behind its queue, a real critic at the last token, and best-of-K in a text game."""

import json
import shutil
import threading

import numpy as np
import pytest
import torch

from openrl_reason.errors import ConfigError, DataError, WorkerError
from openrl_reason.evaluation.value_estimators import prefix_batch, scalar_values
from openrl_reason.models.scalar_model import check_scalar_folder
from openrl_reason.search.actions import best_of_k
from openrl_reason.search.beam import BeamSettings, beam_search
from openrl_reason.search.drive import run_searches
from openrl_reason.search.serving import STATES_PER_CALL, BatchedValuer, LocalCritic, PoolSampler
from openrl_reason.workers.rollout_config import SamplingConfig
from tests.helpers_models import write_tiny_model
from tests.search.scripted import Oracle, ScriptedPool, ids_of, problem, reader, text_of
from tests.search.test_beam import hashed, random_script


def test_what_waits_is_valued_in_one_call_and_everyone_gets_their_own():
    gate, calls = threading.Event(), []

    def values(states):
        calls.append(len(states))
        gate.wait()
        return np.array([float(sum(state)) for state in states])

    with BatchedValuer(values) as valuer:
        first = valuer.submit((1, 2))
        while not calls:
            pass
        later = [valuer.submit((place, 5)) for place in range(STATES_PER_CALL + 3)]
        gate.set()
        assert first.result() == 3 and [one.result() for one in later] == [place + 5 for place in range(STATES_PER_CALL + 3)]
    assert calls == [1, STATES_PER_CALL, 3]
    assert valuer.counts == {"calls": 3, "states": STATES_PER_CALL + 4, "tokens": 2 * (STATES_PER_CALL + 4)} and valuer.seconds_busy > 0


def test_a_value_model_that_fails_stops_the_searches_with_its_own_error():
    def broken(states):
        raise WorkerError("critic-rank0 died")

    with BatchedValuer(broken) as valuer, pytest.raises(WorkerError, match="critic-rank0 died"):
        sampler = PoolSampler(ScriptedPool(random_script()), SamplingConfig(stop=("\n",)), (0,))
        run_searches([beam_search(problem(), BeamSettings(2), reader())], sampler, valuer)


def test_a_threaded_valuer_finds_what_an_immediate_one_finds():
    def found(valuer, order):
        sampler = PoolSampler(ScriptedPool(random_script(), order=order), SamplingConfig(stop=("\n",)), (0,))
        return run_searches([beam_search(problem(name), BeamSettings(3), reader()) for name in "abcdef"], sampler, valuer, concurrent=4)

    straight = found(Oracle(hashed), None)
    for order in range(3):
        with BatchedValuer(lambda states: np.array([hashed(text_of(state)) for state in states])) as valuer:
            assert found(valuer, order) == straight


@pytest.fixture(scope="module")
def critic_path(tmp_path_factory):
    """A critic as a run leaves it: with a head that says something."""
    from openrl_reason.models.scalar_model import load_scalar_model

    folder = tmp_path_factory.mktemp("critic")
    path = write_tiny_model(folder / "lm")
    model = load_scalar_model(path, "float32", head_init="small", seed=3)
    model.save_pretrained(folder / "critic")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(path).save_pretrained(folder / "critic")
    return folder / "critic"


@pytest.fixture(scope="module")
def critic(critic_path):
    return LocalCritic(str(critic_path), dtype="float32", tokens_per_micro_batch=40)


def test_a_critic_is_read_at_the_last_token_batched_as_alone(critic):
    values = scalar_values(critic)
    rng = np.random.default_rng(0)
    states = [tuple(rng.integers(2, 67, size=length).tolist()) for length in (1, 7, 30, 12, 55, 2)]
    together = values(states)
    alone = np.array([values([state])[0] for state in states])
    assert np.allclose(together, alone, atol=1e-5) and len(set(together.round(4))) == len(states)
    for state, value in zip(states, together, strict=True):
        changed = values([(*state[:-1], (state[-1] + 5) % 60 + 2)])[0]
        assert abs(changed - value) > 1e-4, "the last token is seen"
        longer = critic.scores(prefix_batch([(*state, 9)]))  # what comes later is not
        assert longer[len(state) - 1].item() == pytest.approx(value, abs=1e-5)


def test_candidates_that_differ_in_their_last_token_alone_have_values_of_their_own(critic):
    state, turns = (5, 6, 7), [(8, 9), (8, 10), (8, 9)]
    choice = best_of_k(state, turns, scalar_values(critic))
    assert choice.values[0] == choice.values[2] != choice.values[1] and choice.index in (0, 1)
    assert choice.index == int(np.argmax(choice.values))


def test_folders_that_are_no_critic_of_this_policy_are_refused(critic_path, tmp_path):
    from openrl_reason.models.tiny import make_tokenizer

    with pytest.raises(ConfigError, match="--path is .*without a scalar head.*would all be 0"):
        LocalCritic(str(critic_path.parent / "lm"))
    with pytest.raises(DataError, match="--critic .*vocabularies differ"):
        check_scalar_folder(str(critic_path), make_tokenizer(), 64, flag="critic")


@pytest.mark.parametrize("level, warned", [("step", True), ("token", False), (None, False)])
def test_a_critic_of_steps_is_said_not_to_know_the_ends_of_responses(level, warned, critic_path, tmp_path, capsys):
    from openrl_reason.models.loading import load_tokenizer
    from openrl_reason.search.command import _check_critic
    from openrl_reason.search.config import SearchConfig
    from openrl_reason.workers.rollout_config import RolloutConfig

    folder = tmp_path / "critic"
    shutil.copytree(critic_path, folder)
    if level:
        (folder / "values.json").write_text(json.dumps({"algorithm": "oreo", "level": level}))
    sampling = SamplingConfig(temperature=0.8, max_new_tokens=16)
    config = SearchConfig(policy="p", critic=str(folder), sampling=sampling, rollout=RolloutConfig(max_model_len=64))
    _check_critic(config, load_tokenizer(str(folder)))
    assert ("was trained at the level of steps" in capsys.readouterr().out) is warned


class Doors:
    """A text game: three rooms, each with a door that leads on among doors that do not. It says where one is, and takes one word a turn."""

    RIGHT = ("red", "blue", "green")

    def __init__(self):
        self.room, self.lost = 0, False

    def observe(self):
        return f"[room {self.room}]"

    def step(self, word):
        self.lost = self.lost or word != self.RIGHT[self.room]
        self.room += 1
        return self.room == len(self.RIGHT)


def play(values, seed):
    """A policy that proposes doors at random; values pick among them."""
    game, conversation, rng = Doors(), [], np.random.default_rng(seed)
    done = False
    while not done:
        conversation += ids_of(game.observe())
        proposed = [str(word) for word in rng.permutation(["red", "blue", "green"])]
        choice = best_of_k(conversation, [ids_of(word + ".") for word in proposed], values)
        conversation += ids_of(proposed[choice.index] + ".")
        done = game.step(proposed[choice.index])
    return not game.lost


def test_values_pick_the_right_door():
    def oracle(states):
        right = "".join(f"[room {room}]{door}." for room, door in enumerate(Doors.RIGHT))
        return np.array([float(right.startswith(text_of(state))) for state in states])

    assert all(play(oracle, seed) for seed in range(10))
    assert not all(play(lambda states: np.zeros(len(states)), seed) for seed in range(10))


def test_best_of_k_values_equal_turns_once_and_takes_the_first_of_equals():
    asked = []

    def values(states):
        asked.append(list(states))
        return torch.tensor([1.0, 1.0]).numpy()

    assert best_of_k([1], [[2], [3], [2]], values).index == 0 and asked == [[(1, 2), (1, 3)]]


@pytest.mark.parametrize(
    ("turns", "values", "error", "expected"),
    [([], None, ConfigError, "no candidates"), ([[1], []], None, ConfigError, "candidate 1 of 2 has no tokens"),
     ([[1]], lambda states: np.array([np.nan]), WorkerError, "not finite")],
)  # fmt: skip
def test_what_ranks_nothing_is_refused(turns, values, error, expected):
    with pytest.raises(error, match=expected):
        best_of_k([5], turns, values)
