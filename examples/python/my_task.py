"""A task of your own: sort the letters of a word. Use it with `--task.name examples/python/my_task.py:SortLetters`."""

import random

from openrl_reason.tasks import Task


def grade_letters(text: str, gold: str) -> tuple[float, str]:
    answer = text.strip().rpartition("\n")[2].removeprefix("Answer:").strip()
    return float(answer == gold), answer


class SortLetters(Task):
    name = "sort_letters"
    grade_kind = f"{__file__}:grade_letters"
    default_prompt_template = "Sort the letters of {question}.\n"

    def load_split(self, split: str):
        numbers = range(0, 2000) if split == "train" else range(2000, 2200)
        words = ["".join(random.Random(number).sample("abcdefghijklmnopqrstuvwxyz", 5)) for number in numbers]
        return [self.make_item(word, gold="".join(sorted(word)), solution=f"Answer: {''.join(sorted(word))}") for word in words]
