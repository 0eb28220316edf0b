"""A reward for each reasoning step: a list of numbers, one for each of ``steps``. Here every line that computes is checked.

openrl-reason reinforce ... --reward.terms '[{"source": "task"}, {"source": "examples/python/reward_per_step.py:check_steps", "weight": 0.1}]'
"""

import re
from fractions import Fraction

EQUATION = re.compile(r"(-?\d{1,12}) ?([-+*/]) ?(-?\d{1,12}) ?= ?(-?\d{1,12})")


def is_true(left: str, operator: str, right: str, result: str) -> bool:
    """Whether ``left operator right = result``, exactly."""
    a, b = Fraction(left), Fraction(right)
    if operator == "/":
        return b != 0 and a / b == Fraction(result)
    return {"+": a + b, "-": a - b, "*": a * b}[operator] == Fraction(result)


def check_steps(steps):
    """+1 for a step whose equations are all true, -1 if one is false, 0 without any."""
    rewards = []
    for step in steps:
        equations = EQUATION.findall(step)
        rewards.append(0.0 if not equations else 1.0 if all(is_true(*equation) for equation in equations) else -1.0)
    return rewards


async def check_steps_record(steps, response, gold):
    """The same as a record, which may also hold the parsed answer and numbers to log; and async, as a function that asks a service would be."""
    rewards = check_steps(steps)
    return {"step_rewards": rewards, "parsed": response.split()[-1] if response.split() else None, "logs": {"false_steps": rewards.count(-1.0)}}
