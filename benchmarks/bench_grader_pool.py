"""The grader pool: answers a second, what a hostile answer costs, and what the pool itself costs.

    python benchmarks/bench_grader_pool.py [--data ../shared/data] [--repeats 5]

Throughput: the reference solutions of 1 000 MATH problems, every second one with its answer spoilt, graded with strict `math` (and, for
comparison, `math_parity` and plain math-verify as a user's grader) in this process, on one worker and on two; medians of wall time over the
repeats, which take turns. The ratios depend on how many cores are free: the load average is in the file.
Hostile answers: a grader that hangs in C, amid answers graded with `math`. `late_s` is when the result `timeout` came, minus the deadline;
`delay_s` is how much later than without the hostile answer the last of the others came.
Replacing a worker: until a new one has graded its first answer, with `math` (from the template) and with math-verify by path (imported anew).
Overhead: `gsm8k`, as many as possible at once, and one after the other. The figures go to results/grader_pool.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _record import write

from openrl_reason.tasks.grade_extract import last_boxed
from openrl_reason.tasks.graders import as_result, load_grader
from openrl_reason.workers.grading import GraderPool

NUM_ANSWERS = 1000
DEADLINE_S = 1.0
BY_PATH = r"""
import logging, sys
logging.disable(logging.WARNING)
from math_verify import parse, verify
sys.set_int_max_str_digits(0)

def grade(text, gold):
    if text == "hang":
        return float(10 ** 10 ** 9 > 0)
    return float(verify(parse(f"\\boxed{{{gold}}}", parsing_timeout=None), parse(text, parsing_timeout=None), timeout_seconds=None))
"""
HANG = "def grade(text, gold):\n    return float(10 ** 10 ** 9 > 0)\n"


def math_answers(data: Path) -> list[tuple[str, str]]:
    """(response, gold): every second response ends in another problem's answer."""
    rows = [json.loads(line) for line in open(data / "math/test.jsonl", encoding="utf-8")]
    solutions = [(row["solution"], gold) for row in rows if (gold := last_boxed(row["solution"]))][:NUM_ANSWERS]
    pairs = []
    for index, (solution, gold) in enumerate(solutions):
        other = solutions[index - 7][1]
        pairs.append((solution if index % 2 else solution.replace(f"\\boxed{{{gold}}}", f"\\boxed{{{other}}}"), gold))
    return pairs


def throughput(kind: str, pairs: list[tuple[str, str]], repeats: int) -> list[dict]:
    grader = load_grader(kind)

    def here() -> float:
        return sum(as_result(grader(text, gold)).score for text, gold in pairs)

    def in_pool(pool: GraderPool) -> float:
        return sum(future.result().score for future in [pool.submit(text, gold, kind) for text, gold in pairs])

    with GraderPool(1) as one, GraderPool(2) as two:
        ways: dict[str, Callable[[], float]] = {"in this process": here, "1 worker": lambda: in_pool(one), "2 workers": lambda: in_pool(two)}
        scores = {name: way() for name, way in ways.items()}  # warm
        assert len(set(scores.values())) == 1, scores
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    shown = "math-verify by path" if ":" in kind else kind
    return [
        {
            "what": f"{shown}: {name}", "answers_per_s": len(pairs) / median[name], "times_one_worker": median["1 worker"] / median[name],
            "times_in_process": median["in this process"] / median[name], "accepted": scores[name],
        }
        for name in ways
    ]  # fmt: skip


def hostile(num_workers: int, hang: str, pairs: list[tuple[str, str]], trials: int) -> dict:
    """One hanging answer among the others, which are queued before and after it."""
    late, delays = [], []
    with GraderPool(num_workers, deadline_s=DEADLINE_S) as pool:
        pool.grade(*pairs[0], "math")

        def crowd(with_hostile: bool) -> tuple[float, float]:
            start = time.perf_counter()
            ends: list[float] = []
            futures = [pool.submit(*pair, "math") for pair in pairs[:50]]
            stuck = pool.submit("hang", "", hang) if with_hostile else None
            futures += [pool.submit(*pair, "math") for pair in pairs[50:100]]
            began = time.perf_counter()
            for future in futures:
                future.add_done_callback(lambda _: ends.append(time.perf_counter()))
            if stuck is not None:
                stuck.add_done_callback(lambda _: late.append(time.perf_counter() - began - DEADLINE_S))
                assert stuck.result().status == "timeout"
            assert all(future.result().status == "ok" for future in futures)
            return max(ends) - start, start

        for _ in range(trials):
            alone = crowd(False)[0]
            delays.append(crowd(True)[0] - alone)
    return {
        "what": f"one answer that hangs in C, {num_workers} worker(s), deadline {DEADLINE_S:g} s", "median_late_s": statistics.median(late),
        "max_late_s": max(late), "median_delay_s": statistics.median(delays), "max_delay_s": max(delays),
    }  # fmt: skip


def replacement(kind: str, hanging: tuple[str, str], pair: tuple[str, str], trials: int) -> dict:
    """From the timeout of an answer to the result of the next one, which a new worker gives."""
    seconds = []
    with GraderPool(1, deadline_s=DEADLINE_S) as pool:
        pool.grade(*pair, kind)
        for _ in range(trials):
            assert pool.grade(hanging[0], "", hanging[1]).status == "timeout"
            start = time.perf_counter()
            assert pool.grade(*pair, kind).status == "ok"
            seconds.append(time.perf_counter() - start)
    shown = "math-verify by path (imported anew)" if ":" in kind else f"{kind} (forked with it)"
    return {"what": f"a killed worker replaced, and its first answer: {shown}", "median_s": statistics.median(seconds), "max_s": max(seconds)}


def overhead(repeats: int) -> list[dict]:
    grader = load_grader("gsm8k")
    text, gold, count = "3 * 4 = 12\n#### 12", "12", 4000
    start = time.perf_counter()
    for _ in range(count):
        as_result(grader(text, gold))
    inside = (time.perf_counter() - start) / count

    async def crowd(pool: GraderPool) -> None:
        await asyncio.gather(*(pool.agrade(text, gold, "gsm8k") for _ in range(count)))

    with GraderPool(1) as pool:
        ways: dict[str, Callable[[], object]] = {
            "submit, all at once": lambda: [future.result() for future in [pool.submit(text, gold, "gsm8k") for _ in range(count)]],
            "agrade, all at once": lambda: asyncio.run(crowd(pool)),
            "grade, one after the other": lambda: [pool.grade(text, gold, "gsm8k") for _ in range(count)],
        }
        rows = []
        for name, way in ways.items():
            way()
            seconds = []
            for _ in range(repeats):
                start = time.perf_counter()
                way()
                seconds.append((time.perf_counter() - start) / count)
            rows.append({"what": f"overhead an answer, 1 worker: {name}", "median_s": statistics.median(seconds) - inside})
    return rows


def memory(pair: tuple[str, str]) -> dict:
    def resident_mb(pid: int) -> float:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines[1:]}["Pss"]

    with GraderPool(2) as pool:
        for future in [pool.submit(*pair, "math") for _ in range(200)]:
            future.result()
        template = pool._queue.template._process
        assert template is not None
        pids = [template.pid, *(worker.pid for worker in pool._queue.workers)]
        return {"what": "memory of a template and two workers with `math` (proportional set size)", "mb": sum(map(resident_mb, pids))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared/data")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # math-verify remarks on every call that its timeouts are off
    pairs = math_answers(arguments.data)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "by_path.py").write_text(BY_PATH)
        Path(folder, "hang.py").write_text(HANG)
        by_path, hang = f"{folder}/by_path.py:grade", f"{folder}/hang.py:grade"
        rows = throughput("math", pairs, arguments.repeats)
        rows += throughput("math_parity", pairs, arguments.repeats)
        rows += throughput(by_path, pairs, 1)
        rows += [hostile(workers, hang, pairs, arguments.repeats) for workers in (1, 2)]
        rows += [replacement("math", ("hang", hang), pairs[1], arguments.repeats), replacement(by_path, ("hang", by_path), pairs[1], 3)]
        rows += [*overhead(arguments.repeats), memory(pairs[1])]
    write("grader_pool", {"num_answers": len(pairs), "repeats": arguments.repeats}, rows)


if __name__ == "__main__":
    main()
