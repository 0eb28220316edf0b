"""No text makes a grader raise, execute anything, or take long; the process limits are for what nobody thought of."""

import random

import pytest

from openrl_reason.tasks.graders import GRADERS, as_result, load_grader
from tests.timing import passes

KINDS = ("math", "math_lenient", "math_parity", "gsm8k_parity", "gsm8k", "choice4", "text", "yes_no")
GOLDS = {
    "math": [r"\frac12", "(2,5]", "x^2+1", r"\text{Monday}", "1,2", "101_2", r"\begin{pmatrix}1\\2\end{pmatrix}", "y=2x+3", r"1\pm\sqrt2", "x>3"],
    "choice4": ["B"], "text": ["word"], "yes_no": ["yes"],
}  # fmt: skip
GOLDS["math_lenient"] = GOLDS["math_parity"] = GOLDS["math"]
PIECES = (
    r"\frac \sqrt { } ( ) [ ] , 1 2 12 3.5 x y i e \pi ^ _ + - * / \cdot \text{cm} \text{ \pm = < \le \cup \infty | ! \binom \log \sin "
    r"\begin{pmatrix} \end{pmatrix} & \\ \{ \} % \% $ \$ \left \right \overline{3} 0. \boxed{ \in : 99999999 __import__ NaN inf \lfloor \max \gcd "
    r"\mathrm \mathbb{R} ' \phantom \int \sum and or #### answer is yes A B"
).split() + ["\x00", "\x01", "\x02", "\u202e", "\u0663", "\u222a", "\u221a", "\u00b2", "\u00bd", "\ud800", " ", "\n", "\\", "\u00b0"]
HOSTILE = [
    "9^{9^{9^9}}", "9**9**9**9", r"\binom{10^9}{5\cdot10^8}", "(10^9)!", "1000000!", "((((9!)!)!)!)!", "9" * 10**6, "0." + "3" * 10**6,
    "{" * 20000 + "1" + "}" * 20000, "(" * 20000 + "1" + ")" * 20000, r"\frac{" * 5000 + "1" + "}{2}" * 5000, r"\sqrt{" * 300 + "2" + "}" * 300,
    "__import__('os')._exit(1)", "exec('raise SystemExit')", "lambda: 0", "\x00" * 1000, "\x001", "NaN", "inf", "\u202e5\u202c", "1e999999999",
    "10^{999999999}", "10^{-999999999}", "e^{e^{e^{e^{e}}}}", r"\sin(10^{10000})", r"\sqrt[10^{9}]{2}", r"\log(10^{5000})", "x^{10000000}",
    "(x+1)^{100000}", "(x+y+z)^{5000}", "+".join(f"x^{{{k}}}" for k in range(250)), "1," * 990 + "1", "\\pm 1" * 300, "|" * 1999,
    "|" * 900 + "x" + "|" * 900, "5" + "!" * 1900, "5" + "\u00b0" * 1900, r"\cosh(10^{9})", "1/0", r"\frac{0}{0}", "0^0", r"\ln 0", r"\tan(\pi/2)",
    r"\sum_{n=1}^{10^9} n", r"\prod_{n=1}^{10^9} n", "\\begin{pmatrix}" * 120, "\\begin{pmatrix}" + "1&" * 900 + "\\end{pmatrix}", "\\text{" * 300,
    "_" * 1900, "x_" * 900, "2^" * 900 + "2", "1/2" * 600, "1/" * 900 + "2", "\\" * 1999, "\\boxed{" * 280, "\u00b2" * 500, r"\overline{" * 190,
    r"0.\overline{" + "9" * 900 + "}", r"\exp(\exp(\exp(100)))", r"i^{i^{i^{i}}}", "(10^{100})^{(10^{100})}", r"2^{2000}\cdot" * 150 + "1",
    r"\binom{1000}{500}^{50}", "1500!^{3}", "(1+10^{-30})^{10^{30}}", "+".join(f"1/{k}" for k in range(2, 350)), "{,}" * 600, "- " * 900 + "x",
    " " * 10**6, "\n" * 10**6, "$" * 10**6, "####" * 10**5, "answer is " * 10**5, "boxed{" * 10**5, "\\fbox" * 10**5, "Finish[" * 10**5,
    "a," * 10**5, "a" * 10**6, "\\text{a}" * 10**5,
]  # fmt: skip


def test_random_pieces_of_latex_never_make_a_grader_raise():
    graders = {kind: load_grader(kind) for kind in KINDS}
    rng = random.Random(0)
    for _ in range(1500):
        body = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 30)))
        text = f"\\boxed{{{body}}}" if rng.random() < 0.8 else body
        for kind, grader in graders.items():
            result = as_result(grader(text, rng.choice(GOLDS.get(kind, ["5"]))))
            assert result.status in ("ok", "no_answer"), (kind, text)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_text_costs_little_and_earns_nothing(kind):
    grader = load_grader(kind)
    grader("\\boxed{5}", GOLDS.get(kind, ["5"])[0])
    for body in HOSTILE:
        for text in (f"\\boxed{{{body}}}", f"#### {body}", f"the answer is {body}"):
            gold, results = GOLDS.get(kind, ["41"])[0], []
            assert passes(lambda text=text, gold=gold, results=results: results.append(grader(text, gold)), bound=5) < 5, (kind, text[:60])
            result = as_result(results[-1])
            assert result.status in ("ok", "no_answer") and result.score == 0.0, (kind, text[:60])
            assert len(result.parsed or "") <= 2100


@pytest.mark.parametrize("kind", ["math", "math_parity"])
def test_a_hostile_gold_answer_is_bounded_too(kind):
    grader = load_grader(kind)
    for body in HOSTILE:

        def grade_two(body=body):
            try:
                grader("\\boxed{5}", body)
                grader("\\boxed{x+1}", body)
            except ValueError as error:
                assert "gold" in str(error)

        assert passes(grade_two, bound=10) < 10, body[:60]


def test_every_built_in_kind_loads_and_takes_a_surrogate():
    for kind in GRADERS:
        gold = "5" if kind in ("arithmetic", "gsm8k", "gsm8k_lenient", "math") else "yes" if kind == "yes_no" else "B"
        assert as_result(load_grader(kind)("\ud800 \\boxed{\udfff}", gold)).score == 0.0
