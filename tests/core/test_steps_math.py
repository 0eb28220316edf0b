"""The MATH splitter: each published stage on texts of its own, the laws on hostile LaTeX, its cost, and its figures on real solutions."""

import json
import random
from pathlib import Path

import pytest

from openrl_reason.core.steps import split_steps
from openrl_reason.core.steps_math import FORMULA_HALF, LONG, PROSE_HALF, formula_spans, math_cuts
from tests.timing import passes

DATA = Path(__file__).resolve().parents[3] / "shared/data/math"
PIECES = [
    "We see that ", "Then ", " so ", "x", ".", ". ", ".\n", "\n", "\n\n", " ", "\r", "\t", ",", ", ", ": ", " and ", " to ",
    "=", "+", "\\equiv ", "\\cancelto{0}",
    "$", "$$", "\\$", "\\(", "\\)", "\\[", "\\]", "\\\\[4pt]", "\\begin{", "\\end{", "}", "\\begin{tabular}", "\\end{tabular}",
    "$\\begin{tabular}", "\\end{tabular}$", "\\begin{align*}", "\\end{align*}", "[asy]", "[/asy]", "$x=1$", "$y = 2.$", "\\[a+b\n=c.\\]",
    "\\boxed{7}", "é", "漢", "\U0001f600", "\ud800", "\udfff", "\0", "\u2028", "the number of ways in which this is possible is ", " Hence the claim",
]  # fmt: skip


def random_latex(count, seed=0, longest=60):
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(rng.choice(PIECES) for _ in range(rng.randrange(longest)))


def test_steps_join_to_the_text_and_none_is_empty_or_only_blanks():
    for text in random_latex(12_000):
        cuts = math_cuts(text)
        steps = split_steps(text, "math")
        assert cuts == sorted(set(cuts)) and all(0 < cut < len(text) for cut in cuts), text
        assert "".join(steps) == text and all(steps), text
        if text.strip():
            assert all(step.strip() for step in steps), text


@pytest.mark.parametrize(
    "text", ["a", "short", "Ok.\nYes.", ".", "$", "$$", "\\[", "$x$", "\\boxed{7}", "\n", " \n" * 40, "\0", "\ud800", "word " * 500, "a" * 5000]
)
def test_a_text_that_nothing_cuts_is_one_step(text):
    """The published code fails an assertion on the short ones, and its callers then drop the sample."""
    assert split_steps(text, "math") == [text]


def test_nothing_has_no_steps():
    assert split_steps("", "math") == [] and math_cuts("") == []


@pytest.mark.parametrize(
    ("text", "formulas"),
    [
        ("a $b$ c \\(d\\) e \\[f\\] g $$h$$", ["$b$", "\\(d\\)", "\\[f\\]", "$$h$$"]),
        ("a \\$5 and \\$6 but $x$", ["$x$"]),
        ("$a \\$ b$ c", ["$a \\$ b$"]),
        ("$a$$b$", ["$a$$"]),  # a closing dollar is not followed by another one: published
        ("[asy] draw($x$); [/asy] $y$", ["[asy] draw($x$); [/asy]", "$y$"]),
        ("\\begin{align*} x \\begin{cases} y \\end{cases} \\end{align*}", ["\\begin{align*} x \\begin{cases} y \\end{cases} \\end{align*}"]),
        (
            "$\\begin{tabular}{c}a\\end{tabular}$ \\begin{tabular}b\\end{tabular}",
            ["$\\begin{tabular}{c}a\\end{tabular}$", "\\begin{tabular}b\\end{tabular}"],
        ),
        ("\\begin{a} \\begin{b} \\end{b}", ["\\begin{b} \\end{b}"]),
        ("5$ and \\[ and \\begin{a}", []),
    ],
)
def test_formulas_are_found_whole(text, formulas):
    assert [text[start:end] for start, end in formula_spans(text)] == formulas


@pytest.mark.parametrize(
    "steps",
    [
        # Sentences and lines; the blank or line feed belongs to the step that follows.
        ["We add the two equations.", " Then we subtract the third.", "\nFinally we divide by two."],
        # A small letter, a formula or a digit opens no sentence; an initial or a word of two letters ends none.
        ["We add the two equations. then we go on. $x$ is left. 7 too, see point A. Then stop by it. Now rest."],
        # Periods and line feeds of formulas are hidden, until stage 4 cuts at the latter.
        ["It follows that $f(x). G(y)$ is what we need."],
        ["The sum is \\[a + b", "\n= c + d", "\n= e.\\]", "So the answer is three."],
        # Fragments of under 20 characters join what follows, the last one what precedes.
        ["Short.\nNow this is a longer line.", "\nAnd another longer line.\nEnd."],
        # A sentence may end inside its formula, whatever follows.
        ["Therefore the value is $x = 2.$", " which we then use below here."],
        # An opening delimiter alone in its line joins the line below; a short closing one joins what follows.
        ["We have the following equations:", "\n\\begin{align*}\nx &= 1 + 2 + 3 \\\\", "\ny &= 4 + 5 + 6", "\n\\end{align*}"],
        # Over 100 characters: the comma nearest to the middle, with 40 characters on both sides.
        [
            "The first of the two numbers that we were asked to find is seven times as large as it was before,",
            " while the second of them is, as we have seen above, only three times as large as it used to be.",
        ],
        # No comma: "and", a colon, "to".
        ["The first of the two numbers that we were asked to find is seven and", " the second of the two numbers that we were asked to find is nine"],
        [
            "There are exactly four cases that need to be looked at one by one:",
            " those in which the first digit is odd, even, prime, or none",
        ],
        # A formula breaks after a relation, with 20 characters on both sides.
        [
            "$(a_1 b_1 + a_2 b_2 + a_3 b_3 + a_4 b_4)(a_1 b_1 - a_2 b_2 - a_3 b_3) =",
            " (c_1 d_1 + c_2 d_2 + c_3 d_3 + c_4 d_4)(c_1 d_1 - c_2 d_2)$",
        ],
    ],
)
def test_stages_cut_where_the_published_ones_do(steps):
    assert split_steps("".join(steps), "math") == steps


def test_a_formula_counts_sixty_characters_when_the_middle_is_looked_for():
    text = "$" + "x" * 300 + "$" + "a" * 10 + "," + "b" * 30 + "," + "c" * 90
    assert math_cuts(text) == [302 + 11 + 31]  # of a width of 192, the second comma (102) is nearer to 96 than the first (71)


def test_every_break_leaves_enough_and_long_steps_are_those_that_cannot_be_broken():
    for text in random_latex(2000, seed=5, longest=200):
        text = text.replace("\n", " ").replace(".", "").replace("\u2028", "x").replace("\r", "x").replace("\t", "x")
        lengths = [len(step) for step in split_steps(text, "math")]
        assert len(lengths) < 2 or min(lengths) >= min(FORMULA_HALF, PROSE_HALF)
    long = "x " * 200
    assert split_steps(long, "math") == [long] and len(long) > LONG


UNITS = [
    "a", "a ", " ", "\n", " \n", ".", ",", "$", "\\$", "$$", "\\(", "\\[", "\\[\n", "[asy]", "\\begin{", "\\begin{a}", "\\end{a}",
    "\\begin{a}\\end{b}", "=", "a+",
    "A. ", " and ", "$x,y$, ", "It is so, that $x=1$ and $y = 2.$ Then: \\[a\n=b.\\] ",
]  # fmt: skip
HOSTILE = {
    **{unit: unit * (1_000_000 // len(unit)) for unit in UNITS},
    "lines in a formula": "\\[" + "\n" * 1_000_000 + "\\]",
    "lines in dollars": "$" + " \n" * 500_000 + "$",
    "prose around one formula": "a, b, " * 80_000 + "$" + "x" * 500_000 + "$",
    "relations at both ends": "=" * 30_000 + "x" * 900_000 + "=" * 30_000,
    "everything": "".join(random.Random(0).choice(PIECES) for _ in range(200_000))[:1_000_000],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_million_characters_take_less_than_ten_plain_passes(name):
    text = HOSTILE[name]
    assert passes(lambda: math_cuts(text), bound=10) < 10
    cuts = math_cuts(text)
    assert cuts == sorted(set(cuts))


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the MATH data in ../shared/data/math")
def test_real_solutions_have_as_many_steps_as_the_published_splitter_gives():
    """Run beside this one, the published code cut 12482 of the 12500 solutions at the same places; its mean and its largest count are these."""
    counts, longest = [], 0
    for name in ("train", "test"):
        for line in (DATA / f"{name}.jsonl").read_text().splitlines():
            solution = json.loads(line)["solution"]
            steps = split_steps(solution, "math")
            assert "".join(steps) == solution and all(step.strip() for step in steps)
            counts.append(len(steps))
            longest = max(longest, *map(len, steps))
    assert len(counts) == 12_500 and max(counts) == 171
    assert sum(counts) / len(counts) == pytest.approx(9.795, abs=0.001)
