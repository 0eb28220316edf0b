"""A reward function may hang, raise, return nonsense or take its process down: it costs its own samples, visibly, and nothing else."""

import asyncio
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from reward_helpers import alive, make_sample, reward_threads, score_all, wait_until

import openrl_reason
from openrl_reason.errors import ConfigError, DataError, WorkerError
from openrl_reason.rewards.build import check_sources
from openrl_reason.rewards.config import RewardConfig, RewardServerConfig, RewardTermConfig
from openrl_reason.rewards.functions import MAX_LEFT_BEHIND, callable_rewards, function_rewards

TROUBLE = """
import asyncio, os, sys, time, subprocess

def trouble(text):
    print("a function may print")
    if text == "loop":
        while True:
            pass
    if text == "loop in C":
        10 ** 10 ** 9
    if text == "sleep":
        time.sleep(1000)
    if text == "memory":
        bytearray(1 << 40)
    if text == "abort":
        os.abort()
    if text == "leave":
        os._exit(7)
    if text == "exit":
        sys.exit(3)
    if text == "raise":
        raise RuntimeError("because")
    if text == "nan":
        return float("nan")
    if text == "inf":
        return float("inf")
    if text == "huge":
        return 10 ** 400
    if text == "none":
        return None
    if text == "words":
        return "good"
    if text == "child":
        subprocess.Popen(["sleep", "1000"])
        time.sleep(1000)
    return 1.0

def one(response):
    if response == "pid":
        return {"reward": 1.0, "parsed": os.getpid()}
    return trouble(response)

async def one_async(response):
    if response == "wait":
        await asyncio.sleep(1000)
    if response == "pause":
        await asyncio.sleep(0.2)
    return trouble(response)

def many(queries, prompts, labels, **kwargs):
    return [trouble(query[len(prompt):]) for query, prompt in zip(queries, prompts)]

def short(queries, prompts, labels):
    return [1.0] * (len(queries) - 1)
"""
STATUS = {
    "loop": "timeout", "loop in C": "timeout", "sleep": "timeout", "memory": "memory", "abort": "crashed", "leave": "crashed", "exit": "error",
    "raise": "error", "nan": "error", "inf": "error", "huge": "error", "none": "error", "words": "error",
}  # fmt: skip


@pytest.fixture
def trouble(tmp_path):
    (tmp_path / "trouble.py").write_text(TROUBLE)
    return f"{tmp_path}/trouble.py"


@pytest.fixture
def load(tmp_path):
    """Rewards by the function of a small file."""
    sources = []

    def make(code, function="reward", form="auto", options=None, **settings):
        path = tmp_path / f"user_reward_{len(sources)}.py"
        path.write_text(textwrap.dedent(code))
        sources.append(function_rewards(f"{path}:{function}", RewardConfig(**settings), form=form, options=options))
        return sources[-1]

    yield make
    for source in sources:
        source.close()


def test_every_misfortune_of_a_function_has_its_status_and_spares_the_other_responses(trouble):
    texts = [text for name in STATUS for text in ("good", name, "good")]
    source = function_rewards(f"{trouble}:one", RewardConfig(deadline_s=0.5, processes=2))
    results = score_all(source, [make_sample(text) for text in texts])
    for text, result in zip(texts, results, strict=True):
        assert result.status == STATUS.get(text, "ok"), (text, result)
        assert result.score == 1.0 if text == "good" else math.isnan(result.score)
        assert bool(result.detail) == (text != "good")
    assert source.metrics()["restarts"] == 6
    source.close()


@pytest.mark.parametrize("name", ["sleep", "memory", "leave", "raise"])
def test_a_batch_that_fails_costs_its_own_samples_and_the_next_batch_goes_on(trouble, name):
    source = function_rewards(f"{trouble}:many", RewardConfig(deadline_s=0.5, batch_size=2))
    results = score_all(source, [make_sample(text) for text in ("good", "good", "good", name, "good")])
    assert [result.status for result in results] == ["ok", "ok", STATUS[name], STATUS[name], "ok"]
    source.close()


def test_an_entry_that_is_no_number_costs_that_entry_alone(trouble):
    source = function_rewards(f"{trouble}:many", RewardConfig())
    results = score_all(source, [make_sample(text) for text in ("good", "nan", "none", "good")])
    assert [result.status for result in results] == ["ok", "error", "error", "ok"]
    source.close()


def test_a_wrong_number_of_rewards_is_an_error_that_names_both(trouble):
    source = function_rewards(f"{trouble}:short", RewardConfig())
    results = score_all(source, [make_sample("good")] * 3)
    assert {(result.status, result.detail) for result in results} == {("error", "it returned 2 rewards for 3 responses")}
    source.close()


def test_async_calls_run_together_and_one_that_waits_for_ever_costs_only_itself(trouble):
    source = function_rewards(f"{trouble}:one_async", RewardConfig(deadline_s=1.0, concurrency=16))
    started = time.monotonic()
    results = score_all(source, [make_sample("pause")] * 16)
    assert {result.status for result in results} == {"ok"}
    assert time.monotonic() - started < 1.5, "one after the other they would take 3.2 s"
    results = score_all(source, [make_sample(text) for text in ("pause", "wait", "raise", "pause")])
    assert [result.status for result in results] == ["ok", "timeout", "error", "ok"]
    assert source.metrics()["restarts"] == 0
    results = score_all(source, [make_sample(text) for text in ("sleep", "good")]) + score_all(source, [make_sample("good")])
    assert results[0].status == "timeout" and results[-1].status == "ok", "one that blocks its event loop is killed"
    source.close()


def test_a_partly_filled_batch_waits_for_the_flush_and_a_full_one_does_not(load):
    source = load("def reward(queries, labels):\n    return [float(len(queries))] * len(queries)\n", batch_size=3)
    futures = [source.submit(make_sample("x")) for _ in range(4)]
    assert [future.result(timeout=20).score for future in futures[:3]] == [3.0] * 3
    time.sleep(0.1)
    assert not futures[3].done()
    source.flush()
    assert futures[3].result(timeout=20).score == 1.0


OPENRLHF = """
import torch

def reward_func(queries, prompts, labels, **kwargs):
    reward = torch.tensor([float(query.endswith(label)) for query, label in zip(queries, labels)], requires_grad=True)
    return {"rewards": reward, "scores": reward, "extra_logs": {"accuracy": reward.mean(), "length": [len(query) for query in queries]}}

def column(queries, prompts, labels):
    return torch.ones(len(queries), 1)
"""


def test_openrlhf_reward_files_run_as_they_are(load):
    source = load(OPENRLHF, "reward_func")
    right, wrong = score_all(source, [make_sample("It is 4"), make_sample("It is 5")])
    assert (right.score, wrong.score) == (1.0, 0.0)
    assert right.logs == {"accuracy": 0.5, "length": 20.0, "scores": 1.0}
    assert [result.score for result in score_all(load(OPENRLHF, "column"), [make_sample("a"), make_sample("b", steps=("b", "c"))])] == [1.0, 1.0]
    assert score_all(source, [make_sample("It is 4")])[0].score == 1.0, "a batch of one"


def test_a_bare_file_name_means_its_reward_func(tmp_path):
    (tmp_path / "reward_func.py").write_text("def reward_func(queries, prompts, labels):\n    return [0.5] * len(queries)\n")
    source = function_rewards(f"{tmp_path}/reward_func.py", RewardConfig())
    assert score_all(source, [make_sample("a")])[0].score == 0.5
    source.close()


def test_trl_functions_get_completions_and_columns_by_name(load):
    code = """
    def reward(completions, ground_truth, level, log_metric=None, **kwargs):
        log_metric("seen", len(completions))
        assert set(kwargs) >= {"prompts", "answer"}
        return [None if lv == 9 else float(c == g) + lv for c, g, lv in zip(completions, ground_truth, level)]
    """
    right, wrong, none = score_all(load(code), [make_sample("4", level=1), make_sample("5", level=2), make_sample("4", level=9)])
    assert (right.score, wrong.score, right.logs) == (2.0, 2.0, {"seen": 3.0})
    assert none.status == "ok" and math.isnan(none.score), "None: does not apply"


def test_a_function_for_one_response_gets_what_it_asks_for_by_name(load):
    code = """
    def reward(response, gold, item, steps, level, stop_reason, bonus, prompt=None, unknown=7):
        assert (item.gold, item.info["level"], prompt, unknown) == (gold, level, "What is 2+2? ", 7)
        return {"reward": float(response == gold) + bonus, "parsed": response, "logs": {"steps": len(steps), "cut": stop_reason == "length"}}
    """
    result = score_all(load(code, options={"bonus": 0.25}), [make_sample("4", level=3)])[0]
    assert (result.score, result.parsed, result.logs) == (1.25, "4", {"steps": 1.0, "cut": 0.0})
    result = score_all(load(code, options={"bonus": 0.25}), [make_sample("4")])[0]
    assert result.status == "error" and "'level'" in result.detail


def test_rewards_per_step_must_be_one_for_each_step(load):
    code = "def reward(response, steps):\n    return [0.5] * (len(steps) + (response == 'wrong'))\n"
    samples = [make_sample("ab", steps=("a", "b")), make_sample("wrong", steps=("w", "r")), make_sample("", steps=())]
    right, wrong, empty = score_all(load(code), samples)
    assert (right.score, right.step_scores) == (1.0, (0.5, 0.5))
    assert (wrong.status, wrong.detail) == ("error", "it returned 3 step rewards for a response of 2 steps")
    assert (empty.status, empty.score, empty.step_scores) == ("ok", 0.0, ())
    assert (
        score_all(load("def reward(queries, steps):\n    return [[1.0] * len(s) for s in steps]\n"), [make_sample("ab", steps="ab")])[0].score == 2.0
    )


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ({"score": 1}, ("ok", 1.0)),
        ({"step_rewards": [0.25, 0.5]}, ("ok", 0.75)),
        ({"reward": 0.75, "steps": [0.25, 0.5]}, ("ok", 0.75)),
        ({"reward": 2.0, "steps": [0.25, 0.5]}, ("error", "sum")),
        ({"status": "no_answer"}, ("no_answer", None)),
        ({"status": "timeout", "detail": "my own"}, ("timeout", "my own")),
        ({"status": "fine", "reward": 1}, ("error", "known: ok")),
        ({"rewrad": 1}, ("error", "did you mean 'reward'")),
        ({}, ("error", "None")),
        ([1.0, "x"], ("error", "step 1")),
        ("1.0", ("error", "expected a finite number")),
        (True, ("ok", 1.0)),
    ],
)  # fmt: skip
def test_records_are_read_strictly(returned, expected):
    source = callable_rewards(lambda response: returned, RewardConfig())
    result = score_all(source, [make_sample("ab", steps="ab")])[0]
    source.close()
    assert result.status == expected[0]
    if isinstance(expected[1], str):
        assert expected[1] in result.detail and math.isnan(result.score)
    elif expected[1] is not None:
        assert result.score == expected[1]


def test_text_of_any_kind_reaches_the_function_unchanged(load):
    source = load("def reward(response):\n    return {'reward': len(response), 'parsed': response}\n")
    texts = ["a\nb\r\n\x00\x7f", "\ud800 lone", "\u2028\u0085", "x" * 300_000, "", "\u05d0\u202e"]
    assert [result.parsed for result in score_all(source, [make_sample(text) for text in texts])] == texts


def test_what_cannot_be_loaded_or_called_is_refused_at_once(load, tmp_path):
    with pytest.raises(ConfigError, match="there is no file"):
        function_rewards(f"{tmp_path}/absent.py:reward", RewardConfig())
    with pytest.raises(ConfigError, match="no_such_module"):
        function_rewards("no_such_module_anywhere:reward", RewardConfig())
    for code, message in [
        ("import no_such_module_anywhere", "no_such_module_anywhere"),
        ("raise SystemExit(3)", "SystemExit"),
        ("", "no function 'reward'"),
        ("def reward(a, b): pass", "do not tell how to call it"),
        ("def reward(**kwargs): pass", "do not tell how to call it"),
        ("def reward(queries, weights): pass", "'weights'"),
        ("def reward(prompts, completions, completion_ids): pass", "completion_ids"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load(code)
    with pytest.raises(ConfigError, match="no parameter 'bonsu'"):
        load("def reward(response, bonus=1): pass", options={"bonsu": 2})
    with pytest.raises(ConfigError, match="load_timeout_s|did not load in time"):
        try:
            load("import time; time.sleep(100)", load_timeout_s=0.3)
        except WorkerError as error:
            raise ConfigError(str(error)) from None


def test_the_form_can_be_set_and_three_lists_may_have_any_names(load):
    named = "def reward(q, p, a, items=None):\n    return [float(item.gold) for item in items]\n"
    assert score_all(load(named), [make_sample("x", "3")])[0].score == 3.0
    assert score_all(load("def reward(responses, items, steps):\n    return [1.0]\n"), [make_sample("x")])[0].score == 1.0
    assert score_all(load("def reward(q, p, a):\n    return [1.0 for _ in q]\n"), [make_sample("x")] * 2)[1].score == 1.0
    assert score_all(load("def reward(**kwargs):\n    return float(kwargs['response'] == 'x')\n", form="sample"), [make_sample("x")])[0].score == 1.0
    assert score_all(load("async def reward(queries, prompts, labels):\n    return [2.0] * len(queries)\n"), [make_sample("x")])[0].score == 2.0


def test_an_item_that_is_no_json_is_a_data_error(load):
    source = load("def reward(response):\n    return 1.0\n")
    with pytest.raises(DataError, match="JSON"):
        source.submit(make_sample("x", bad=object()))


def test_results_do_not_depend_on_the_order_of_arrival(load):
    source = load("def reward(queries, labels):\n    return [float(q.split()[-1]) for q in queries]\n", batch_size=3, processes=2)
    numbers = list(range(40))
    forward = [result.score for result in score_all(source, [make_sample(str(n)) for n in numbers])]
    backward = [result.score for result in score_all(source, [make_sample(str(n)) for n in reversed(numbers)])]
    assert forward == backward[::-1] == [float(n) for n in numbers]


def test_close_leaves_no_process_and_no_thread_and_ends_what_waits(trouble):
    source = function_rewards(f"{trouble}:one", RewardConfig(deadline_s=60))
    pid = int(score_all(source, [make_sample("pid")])[0].parsed)
    futures = [source.submit(make_sample(text)) for text in ("sleep", "good")]
    started = time.monotonic()
    source.close()
    source.close()
    assert time.monotonic() - started < 5
    assert not alive(pid) and not reward_threads()
    for future in futures:
        with pytest.raises(WorkerError, match="closed"):
            future.result(timeout=5)
    with pytest.raises(RuntimeError, match="closed"):
        source.submit(make_sample("good"))


def test_a_forgotten_source_takes_its_processes_along(trouble):
    source = function_rewards(f"{trouble}:one", RewardConfig())
    pid = int(score_all(source, [make_sample("pid")])[0].parsed)
    del source
    assert wait_until(lambda: not alive(pid))


def test_a_timeout_reaches_what_the_function_started(trouble):
    source = function_rewards(f"{trouble}:one", RewardConfig(deadline_s=0.5))
    pid = int(score_all(source, [make_sample("pid")])[0].parsed)
    assert score_all(source, [make_sample("child")])[0].status == "timeout"

    def children():
        found = subprocess.run(["ps", "-eo", "sid,args"], capture_output=True, text=True, check=True).stdout
        return [line for line in found.splitlines() if line.split()[:1] == [str(pid)]]

    assert wait_until(lambda: not children())
    source.close()


@pytest.mark.parametrize("state", ["idle", "sleep", "loop"])
def test_processes_do_not_outlive_a_killed_parent(trouble, tmp_path, state):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from reward_helpers import make_sample, score_all
        from openrl_reason.rewards.config import RewardConfig
        from openrl_reason.rewards.functions import function_rewards
        source = function_rewards({trouble + ":one"!r}, RewardConfig(deadline_s=30))
        print(score_all(source, [make_sample("pid")])[0].parsed, flush=True)
        source.submit(make_sample({state!r}))
        time.sleep(100)
        """)
    )
    root = str(Path(openrl_reason.__file__).parents[1])
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root})
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert wait_until(lambda: not alive(pid))


def test_a_callable_that_hangs_is_a_timeout_and_the_run_goes_on():
    import threading

    blocked = threading.Event()

    def reward(response):
        if response == "hang":
            blocked.wait(20)
        if response == "raise":
            sys.exit(1)
        return 1.0

    source = callable_rewards(reward, RewardConfig(deadline_s=0.2))
    results = score_all(source, [make_sample(text) for text in ("good", "hang", "good", "raise", "good")])
    assert [result.status for result in results] == ["ok", "timeout", "ok", "error", "ok"]
    source.close()
    blocked.set()
    assert wait_until(lambda: not reward_threads())


def test_a_callable_may_be_batched_or_async_and_keeps_its_state():
    seen = []

    def batched(queries, prompts, labels, items=None):
        seen.extend(item.gold for item in items)
        return [1.0] * len(queries)

    async def single(prompt, response):
        await asyncio.sleep(0.01)
        return float(len(response))

    for function, expected in ((batched, 1.0), (single, 3.0)):
        source = callable_rewards(function, RewardConfig())
        assert [result.score for result in score_all(source, [make_sample("abc")] * 5)] == [expected] * 5
        source.close()
    assert seen == ["4"] * 5
    with pytest.raises(ConfigError, match="give a function"):
        callable_rewards(3, RewardConfig())


def test_a_callable_that_always_hangs_stops_the_run_before_threads_pile_up():
    import threading

    blocked = threading.Event()
    source = callable_rewards(lambda response: blocked.wait(30), RewardConfig(deadline_s=0.02))
    futures = [source.submit(make_sample("x")) for _ in range(MAX_LEFT_BEHIND + 5)]
    with pytest.raises(WorkerError, match="give it by path"):
        for future in futures:
            future.result(timeout=30)
    blocked.set()
    source.close()


def test_sources_are_checked_without_a_run(tmp_path, monkeypatch):
    good, broken = tmp_path / "good.py", tmp_path / "broken.py"
    good.write_text("def f(response): return 1.0")
    broken.write_text("def f(response) return 1.0")
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    check_sources(RewardConfig(terms=(RewardTermConfig("task"), RewardTermConfig(f"{good}:f"), RewardTermConfig("http://127.0.0.1:9/x"))))
    with pytest.raises(ConfigError, match="cannot be loaded: SyntaxError"):
        check_sources(RewardConfig(function=f"{broken}:f"))
    with pytest.raises(ConfigError, match="--reward.server.token_variable is 'NO_SUCH_TOKEN'"):
        check_sources(RewardConfig(function="http://127.0.0.1:9/x", server=RewardServerConfig(token_variable="NO_SUCH_TOKEN")))
    for source, expected in (("", "a term needs a source"), ("ftp://127.0.0.1/x", "holds 'ftp://127.0.0.1/x': that is no address")):
        with pytest.raises(ConfigError, match=expected):
            RewardConfig(terms=(RewardTermConfig(source),))
