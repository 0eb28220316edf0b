"""Fuzzed and hostile answers through the pool, with every grader of the library: no hang, nothing executed, memory bounded, the rest in time.

The graders are tested by themselves in tests/tasks; here it counts that the pool holds whatever they do.
"""

import os
import random
import time
from pathlib import Path

import pytest

from openrl_reason.tasks.graders import GRADERS
from openrl_reason.workers.grading import GraderPool

pytestmark = pytest.mark.alone

# The letters of choice2 to choice26 differ by their number alone: three of them stand for all.
KINDS = [kind for kind in GRADERS if not kind.startswith("choice") or kind in ("choice2", "choice5", "choice26")]
DEADLINE_S = 5.0
NUM_FUZZED = 10_000


def gold_of(kind):
    return "yes" if kind == "yes_no" else "B" if kind.startswith("choice") else "18"


def right_answer(kind):
    """Right for the kinds that look for a box, a mark or a statement."""
    gold = gold_of(kind)
    if kind == "text":
        return gold
    mark = "" if kind == "yes_no" or kind.startswith("choice") else f"\n#### {gold}"
    return f"So the answer is {gold}.\n\\boxed{{{gold}}}{mark}"


def hostile_bodies(sentinel):
    run = f"__import__('os').system('touch {sentinel}')"
    powers = ["9^{9^{9^9}}", "9**9**9**9", "10^{999999999}", "10^{-999999999}", "(10^{100})^{(10^{100})}", r"\sqrt[10^{9}]{2}", "1e999999999"]
    factorials = [r"\binom{10^9}{5\cdot10^8}", "(10^9)!", "((((9!)!)!)!)!", "10^9!", r"\frac{(10^9)!}{(10^9-1)!}", r"\prod_{n=1}^{10^9} n"]
    huge = ["9" * 10**6, "0." + "3" * 10**6, "{" * 10**6, "1," * 10**5, " " * 10**6, "\\" * 10**5, "-" * 10**5, "\\boxed{" * 10**5, "####" * 10**5]
    nested = [
        "(" * 20000 + "1" + ")" * 20000, "{" * 20000 + "1" + "}" * 20000, "[" * 20000 + "1" + "]" * 20000, r"\left(" * 9000 + "1" + r"\right)" * 9000,
        r"\frac{1}{" * 20000 + "2" + "}" * 20000, r"\frac{" * 300 + "1" + "}{2}" * 300, r"\sqrt[3]{" * 20000 + "2" + "}" * 20000,
        r"\sqrt[\sqrt[" * 2000 + "2" + "]{2}]{2}" * 2000, "2^{" * 20000 + "2" + "}" * 20000, r"\text{" * 20000 + "a" + "}" * 20000, "x_" * 20000,
        r"\begin{pmatrix}" * 5000, r"\begin{cases}" * 5000 + r"\end{cases}" * 5000,
    ]  # fmt: skip
    code = [
        run, f"exec({run!r})", f"eval('{run}')", f"lambda: {run}", f"$(touch {sentinel})", f"`touch {sentinel}`", f"{{{{{run}}}}}",
        f"\\write18{{touch {sentinel}}}", f"().__class__.__bases__[0].__subclasses__(); {run}", "__import__('os')._exit(1)",
    ]  # fmt: skip
    odd = [
        "\x00" * 1000, "1\x008", "\ud800", "\udfff\ud800" * 500, "NaN", "nan", "inf", "-inf", r"\infty - \infty", "\u202e81\u202c", "\u0661\u0668",
        "\u05d0\u05d1 18 \u05d2", "\u200f18", "\uff11\uff18", "e\u0301" * 5000, r"\frac{0}{0}", "0^0", r"\ln 0", "", "\r\n\u2028\u0085",
    ]  # fmt: skip
    return [*powers, *factorials, *huge, *nested, *code, *odd]


def hostile_texts(sentinel):
    frames = ("\\boxed{{{}}}", "#### {}", "The answer is {}.", "{}")
    return [frames[index % len(frames)].format(body) for index, body in enumerate(hostile_bodies(sentinel))] + [
        f"\\boxed{{{body}}}" for body in hostile_bodies(sentinel) if len(body) < 1000
    ]


PIECES = (
    r"\frac \sqrt \sqrt[ { } ( ) [ ] ] , 1 2 18 3.5 -7 x y i e \pi ^ _ + - * / \cdot \text{cm} \text{ \pm = < \le \cup \infty | ! \binom \log \sin "
    r"\begin{pmatrix} \end{pmatrix} & \\ \{ \} % \% $ \$ \left \right \overline{3} 0. \boxed{ \boxed \in : 99999999 NaN inf \lfloor \int \sum "
    r"\mathrm \mathbb{R} ' and or #### answer is yes no A B (C) \x __class__ lambda import; ** // 1e9 0x1F ; \n"
).split() + ["\x00", "\x1b[0m", "\u202e", "\u0663", "\u221a", "\u00b2", "\ud800", " ", "\n", "\\", "\u00b0", "\U0001d7d8", "\ufeff", '"', "\u2212"]


def fuzzed_texts(count, seed):
    rng = random.Random(seed)
    frames = ("\\boxed{{{}}}", "#### {}", "The answer is {}", "{}", "x \\boxed{{1}} {} \\boxed{{2")
    for _ in range(count):
        if rng.random() < 0.2:
            body = "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x110000)))) for _ in range(rng.randint(0, 60)))
        else:
            body = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 30)))
        yield rng.choice(frames).format(body)


def resident_mb(pid, field="VmRSS"):
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(field)), 0.0)


def worker_memory(pool):
    """The largest resident size that any living worker has had, and the template's."""
    template = pool._queue.template._process
    workers = [resident_mb(worker.pid, "VmHWM") for worker in list(pool._queue.workers)]
    return max(workers, default=0.0), resident_mb(template.pid) if template else 0.0


def fuzz(num_texts, kinds_per_text):
    texts = list(fuzzed_texts(num_texts, seed=num_texts))
    good, statuses = [], []
    with GraderPool(2, deadline_s=DEADLINE_S) as pool:
        futures = []
        for index, text in enumerate(texts):
            for offset in range(kinds_per_text):
                kind = KINDS[(index + offset) % len(KINDS)]
                futures.append(pool.submit(text, gold_of(kind), kind))
            if index % 10 == 0:
                kind = KINDS[index // 10 % len(KINDS)]
                good.append((kind, pool.submit(right_answer(kind), gold_of(kind), kind)))
        statuses = [future.result(timeout=60).status for future in futures]
        assert all(future.result(timeout=60).score == 1.0 for _, future in good), [kind for kind, future in good if future.result().score != 1.0][:5]
        assert pool.num_respawns == pool.num_template_restarts == 0
        largest, template = worker_memory(pool)
    assert set(statuses) <= {"ok", "no_answer"}
    assert {"ok", "no_answer"} <= set(statuses)
    assert largest < 250 and template < 150


def test_ten_thousand_fuzzed_answers():
    fuzz(NUM_FUZZED, 1)


@pytest.mark.slow
def test_a_hundred_thousand_fuzzed_answers_with_every_kind():
    fuzz(100_000, len(KINDS))


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_answers_cost_at_most_their_deadline_and_execute_nothing(kind, tmp_path):
    sentinel = tmp_path / "executed"
    texts = hostile_texts(sentinel)
    assert len(texts) >= 50
    deadline_s = 2.0
    with GraderPool(2, deadline_s=deadline_s, max_text_chars=2_000_000) as pool:  # so that the graders see a million digits
        pool.grade(right_answer(kind), gold_of(kind), kind)
        start, results, good, seconds = time.monotonic(), [], [], []
        for text in texts:
            began = time.monotonic()
            future, friend = pool.submit(text, gold_of(kind), kind), pool.submit(right_answer(kind), gold_of(kind), kind)
            good.append(friend.result(timeout=30))
            seconds.append(time.monotonic() - began)
            results.append(future.result(timeout=30))
        assert {result.status for result in results} <= {"ok", "no_answer", "timeout", "memory", "crashed"}
        assert all(result.detail for result in results if result.status not in ("ok", "no_answer"))
        assert all(result.score == 1.0 for result in good)
        assert max(seconds) < deadline_s + 0.5, "an answer behind a hostile one"
        assert worker_memory(pool)[0] < 1024
        assert time.monotonic() - start < 60
    assert not sentinel.exists() and not os.path.exists("executed")


def test_hostile_answers_of_all_kinds_in_one_crowd_delay_the_good_ones_little(tmp_path):
    """Together, as a batch of rollouts comes: every kind, every hostile text, and every third answer a good one."""
    texts = [text for text in hostile_texts(tmp_path / "executed") if len(text) < 200_000]
    with GraderPool(2, deadline_s=2.0) as pool:
        futures, good = [], []
        for index, text in enumerate(texts):
            for kind in KINDS:
                futures.append(pool.submit(text, gold_of(kind), kind))
            kind = KINDS[index % len(KINDS)]
            good.append(pool.submit(right_answer(kind), gold_of(kind), kind))
        assert all(future.result(timeout=60).score == 1.0 for future in good)
        counts = {}
        for future in futures:
            counts[future.result(timeout=60).status] = counts.get(future.result().status, 0) + 1
        assert set(counts) <= {"ok", "no_answer", "timeout", "memory"} and counts.get("timeout", 0) < 5
    assert not (tmp_path / "executed").exists()


def test_answers_that_hang_in_c_hold_up_the_others_for_their_deadline_only(tmp_path):
    """With the library's heaviest grader beside a grader that hangs where no Python code can stop it: as if `math` itself did."""
    (tmp_path / "stuck.py").write_text("def grade(text, gold):\n    return float(10 ** 10 ** 9 > 0)\n")
    deadline_s = 0.5
    with GraderPool(1, deadline_s=deadline_s) as pool:
        pool.grade(right_answer("math"), "18", "math")
        for _ in range(3):
            start = time.monotonic()
            stuck = pool.submit("x", "x", f"{tmp_path}/stuck.py:grade")
            good = pool.submit(right_answer("math"), "18", "math")
            assert stuck.result(timeout=10).status == "timeout"
            assert time.monotonic() - start < deadline_s + 0.5
            assert good.result(timeout=10).score == 1.0
            assert time.monotonic() - start < deadline_s + 0.5
        assert pool.num_respawns == 3 and pool.num_template_restarts == 0
