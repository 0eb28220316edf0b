"""Multi-step arithmetic: bare expressions and short word problems with step-by-step solutions. Generated, nothing is downloaded.

Every solution is one equation per line and a last line ``#### answer``; every intermediate result is a whole number, none is negative.
A hash of the problem text alone decides whether it belongs to train or test, so the two are disjoint whatever the seeds and sizes.

=====  ============================================================  ==================================
level  problems                                                      example
=====  ============================================================  ==================================
1      three steps of + and -, every number has one digit            ``3+4-5+6=?``
2      the same with values up to 20                                 ``9+4-7+6=?``
3      a product, then two sums, two-digit numbers                   ``8*3-5+17=?``
4      three or four steps, brackets, two-digit numbers              ``(14+8)*3-19+40=?``
5      four or five steps, three-digit numbers, exact divisions      ``(120+36)/4*7-88+205=?``
=====  ============================================================  ==================================

The style "columns" is another kind of problem: two numbers of level + 1 digits, ``347+285=?``, added column by column with carries.
"""

from __future__ import annotations

import random

from openrl_reason.core.seeds import content_id, derive_seed
from openrl_reason.errors import ConfigError
from openrl_reason.tasks.base import Task, TaskConfig, TaskItem

LEVELS = (1, 2, 3, 4, 5)
STYLES = ("expression", "word", "columns")
TEST_SHARE = 8
"""One problem text in this many belongs to the test split."""
_MAX_MISSES = 20_000


def split_of(question: str) -> str:
    """The split that a problem text belongs to, by content."""
    return "test" if int(content_id("arithmetic split", question), 16) % TEST_SHARE == 0 else "train"


def answers_at_once(question: str, share: float) -> bool:
    """Whether the reference solution is the bare answer: a ``share`` of the problems, chosen by content."""
    return int(content_id("arithmetic solution", question), 16) < share * 2**64


def apply_operator(left: int, operator: str, right: int) -> int:
    """The result, exact; asserts that a quotient is whole."""
    if operator == "/":
        assert right != 0 and left % right == 0
        return left // right
    return left + right if operator == "+" else left - right if operator == "-" else left * right


def _operand(rng: random.Random, value: int, operator: str, limit: int, ceiling: int) -> int | None:
    """A right operand of at most ``limit`` that keeps the value whole and within 0 and ``ceiling``; None if there is none."""
    if operator == "+":
        return rng.randint(1, min(limit, ceiling - value)) if value < ceiling else None
    if operator == "-":
        return rng.randint(1, min(limit, value)) if value >= 1 else None
    if operator == "*":
        return rng.randint(2, 9) if 2 <= value <= ceiling // 9 else None
    divisors = [number for number in range(2, 10) if value >= number and value % number == 0]
    return rng.choice(divisors) if divisors else None


class _Chain:
    """A calculation ``start op a op b ...`` done from left to right: its equations, and what an expression or a story needs to tell it."""

    def __init__(self, start: int) -> None:
        self.start, self.value = start, start
        self.moves: list[tuple[str, int]] = []
        self.equations: list[str] = []

    def push(self, operator: str, operand: int) -> None:
        result = apply_operator(self.value, operator, operand)
        self.equations.append(f"{self.value}{operator}{operand}={result}")
        self.moves.append((operator, operand))
        self.value = result

    def solution(self) -> str:
        return "\n".join([*self.equations, f"#### {self.value}"])

    def expression(self) -> str:
        """Infix text whose usual reading is this calculation: a sum is bracketed before it is multiplied or divided."""
        text, is_sum = str(self.start), False
        for operator, operand in self.moves:
            if operator in "*/":
                text, is_sum = (f"({text})" if is_sum else text) + f"{operator}{operand}", False
            else:
                text, is_sum = f"{text}{operator}{operand}", True
        return f"{text}=?"


def _chain(rng: random.Random, start: int, operators: list[str], limit: int, ceiling: int = 999) -> _Chain | None:
    chain = _Chain(start)
    for operator in operators:
        operand = _operand(rng, chain.value, operator, limit, ceiling)
        if operand is None:
            return None
        chain.push(operator, operand)
    return chain


def _draw_chain(rng: random.Random, level: int) -> _Chain | None:
    """One random calculation of a level, or None when the draw leads nowhere."""

    def sums(count: int) -> list[str]:
        return [rng.choice("+-") for _ in range(count)]

    if level == 1:
        return _chain(rng, rng.randint(1, 9), sums(3), limit=9, ceiling=9)
    if level == 2:
        return _chain(rng, rng.randint(1, 19), sums(3), limit=9, ceiling=20)
    if level == 3:
        return _chain(rng, rng.randint(2, 12), ["*", *sums(2)], limit=30)
    if level == 4:
        return _chain(rng, rng.randint(5, 40), [*sums(1), "*", *sums(rng.randint(1, 2))], limit=60)
    return _chain(rng, rng.randint(20, 400), [*sums(1), "/", "*", *sums(rng.randint(1, 2))], limit=300)


_NAMES = ("Ann", "Ben", "Eva", "Ida", "Jim", "Kim", "Leo", "Max", "Mia", "Sam")
_THINGS = ("pens", "eggs", "nuts", "cups", "pins", "keys", "figs", "toys")
_PHRASES: dict[str, tuple[str, ...]] = {
    "+": ("gets {n} more", "finds {n}", "buys {n}"),
    "-": ("loses {n}", "sells {n}", "gives away {n}"),
    "*": ("then has {n} times as many",),
    "/": ("keeps one part of {n}",),
}


def _story(rng: random.Random, chain: _Chain) -> str:
    told = [rng.choice(_PHRASES[operator]).format(n=operand) for operator, operand in chain.moves]
    return f"{rng.choice(_NAMES)} has {chain.start} {rng.choice(_THINGS)}, {', '.join(told)}. How many now?"


def _column_addition(rng: random.Random, level: int) -> tuple[str, str, str]:
    """Two numbers of ``level + 1`` digits, added column by column from the right: ``digit+digit+carry=two digits`` a line."""
    low, high = 10**level, 10 ** (level + 1) - 1
    left, right = rng.randint(low, high), rng.randint(low, high)
    lines, carry = [], 0
    for a, b in zip(reversed(str(left)), reversed(str(right)), strict=True):
        total = int(a) + int(b) + carry
        lines.append(f"{a}+{b}+{carry}={total:02d}")
        carry = total // 10
    return f"{left}+{right}=?", "\n".join([*lines, f"#### {left + right}"]), str(left + right)


def generate_problem(rng: random.Random, level: int, style: str) -> tuple[str, str, str] | None:
    """One random ``(question, solution, answer)``, or None when the draw leads nowhere (draw again)."""
    if style == "columns":
        return _column_addition(rng, level)
    chain = _draw_chain(rng, level)
    if chain is None:
        return None
    question = chain.expression() if style == "expression" else _story(rng, chain)
    return question, chain.solution(), str(chain.value)


class ArithmeticTask(Task):
    """The embedded default task. Items depend on levels, styles, seed and split; a longer set starts with the shorter one."""

    name = "arithmetic"
    grade_kind = "arithmetic"
    step_kind = "newline"
    default_prompt_template = "{question}\n"
    default_chat_prompt = "{question}\nWrite one equation per line, then a last line '#### answer'."

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        for level in config.levels:
            if level not in LEVELS:
                raise ConfigError(f"levels: there is no level {level!r}; use some of {', '.join(map(str, LEVELS))}")
        if not config.levels:
            raise ConfigError("levels is empty; use some of 1, 2, 3, 4, 5")
        for style in config.styles:
            if style not in STYLES:
                raise ConfigError(f"styles: there is no style {style!r}; use some of {', '.join(STYLES)}")
        if not 0.0 <= config.direct_share <= 1.0:
            raise ConfigError(f"direct_share={config.direct_share} must lie between 0 and 1")
        if not config.styles:
            raise ConfigError(f"styles is empty; use some of {', '.join(STYLES)}")

    def load_split(self, split: str) -> list[TaskItem]:
        size = (self.config.num_train or 4000) if split == "train" else (self.config.num_test or 200)
        rng = random.Random(derive_seed(self.config.seed, "arithmetic", split))
        seen: set[str] = set()
        items: list[TaskItem] = []
        misses = 0
        while len(items) < size:
            level = self.config.levels[len(items) % len(self.config.levels)]
            problem = generate_problem(rng, level, rng.choice(self.config.styles))
            if problem is None or problem[0] in seen or split_of(problem[0]) != split:
                misses += 1
                if misses > _MAX_MISSES:
                    raise ConfigError(
                        f"num_{split}={size} is more than there are different level-{level} problems (stopped at {len(items)}); "
                        "use fewer, more levels or more styles"
                    )
                continue
            misses = 0
            question, solution, answer = problem
            if answers_at_once(question, self.config.direct_share):
                solution = f"#### {answer}"
            seen.add(question)
            items.append(self.make_item(question, gold=answer, solution=solution, info={"level": level}))
        return items
