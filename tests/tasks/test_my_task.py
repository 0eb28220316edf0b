"""The example of a user's task, as a user runs it."""

from pathlib import Path

from openrl_reason.models.tiny import make_tokenizer
from openrl_reason.tasks import GraderPool, TaskConfig, load_task
from openrl_reason.tasks.leakage import overlap

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/python/my_task.py"


def test_the_example_is_a_whole_task_in_about_twenty_lines():
    assert len([line for line in EXAMPLE.read_text().splitlines() if line.strip()]) <= 20
    task = load_task(TaskConfig(name=f"{EXAMPLE}:SortLetters", num_few_shot=2))
    train, test = task.items("train"), task.items("test")
    assert (len(train), len(test)) == (2000, 200) and overlap(train, test) == []
    tokenizer = make_tokenizer()
    for item in test[:3]:
        assert task.grade(item.solution, item).score == 1.0
        assert task.grade("Answer: zzzzz", item).score == 0.0
        assert tokenizer.decode(task.encode_prompt(item, tokenizer)).endswith(f"Sort the letters of {item.prompt}.\n")


def test_a_relative_path_works_from_wherever_answers_are_graded(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    task = load_task(TaskConfig(name="examples/python/my_task.py:SortLetters"))
    monkeypatch.chdir(tmp_path)
    with GraderPool() as pool:  # its processes start elsewhere
        item = task.items("test")[0]
        assert pool.submit(item.solution, item.gold, task.grade_kind_of(item)).result().score == 1.0
