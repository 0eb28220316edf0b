"""Multiple choice, text, yes/no: the last statement counts, an article is no letter, hedging is no answer."""

import pytest

from openrl_reason.tasks.grade_choice import grade_choice, grade_text, grade_yes_no, stated_letter
from openrl_reason.tasks.graders import as_result, load_grader


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{B}", r"\boxed{\text{B}}", r"\boxed{(B)}", r"\boxed{\text{(B)}}", r"\boxed{B.}", r"\boxed{B. the second}", r"\boxed{(B) Paris}",
        "#### B", "#### (B)", "####B", "The answer is B", "the answer is B.", "The answer is (B).", "Answer: B", "answer: (B)", "**Answer:** B",
        "The answer is **B**", "Finish[The answer is B.]", "Finish[B]", "because of A.\nB", "so\n(B)", "so\nB.", "so\n**B**", "so\n[B]\n",
        "The correct option is B.", "The answer is option B.", "the answer is: B", "The answer is $B$.", "Answer: B) Paris",
        "The answer is A. No, wait: the answer is B.", r"\boxed{A} hm \boxed{B}", r"the answer is A, \boxed{B}", "#### A\n#### B",
        "The answer is B because A is a trap.", "The answer is B, because A is a trap.",
        "The answer is B, since A is false.", "The answer is B, I think.", "The answer is B, not A.", "The answer is 'B'",
        "#### B A closer look shows why", "The answer is B: I see no other.", "I first thought the answer is C.\n\nB", "Answer = B",
    ],
)  # fmt: skip
def test_every_form_of_a_statement_is_read(text):
    assert grade_choice(text, "B", 4) == (1.0, "B")
    assert grade_choice(text, "C", 4) == (0.0, "B")


@pytest.mark.parametrize(
    "text",
    [
        "", "B is the second letter", "Option B looks right", "A cat sat.", "The answer is a cat.", "The answer is A cat, of course.",
        "Answer: A cat",
        "The answer is I think unclear", r"\boxed{A cat}", r"\boxed{42}", r"\boxed{}", r"\boxed{A, B}", r"\boxed{A or B}", "#### A and B",
        "The answer is A or B.",
        "#### A B C D", "#### A|B", "#### A + B", "#### A (or B)", "Answer: B C D",
        "The answer is (A) or (C).", "the answer is A, B", "The answer is not B", "answer", "ABCD", "so\nAB",
        "the answer is B2",
        r"\boxed{A} but \boxed{", "#### A\n####", "The answer is BC", "the answer isB", "A\nB and C", "The answer is clear.",
    ],
)  # fmt: skip
def test_what_states_no_single_letter_is_no_answer(text):
    assert stated_letter(text) is None
    assert as_result(grade_choice(text, "B", 4)).status == "no_answer"


def test_the_number_of_options_gives_the_letters():
    assert grade_choice("Answer: E", "A", 4) == (0.0, None)
    assert grade_choice("Answer: E", "E", 5) == (1.0, "E")
    assert grade_choice("Answer: A. No: the answer is E.", "A", 4) == (0.0, None), "the last statement counts, even if it is void"
    assert load_grader("choice26")("#### Z", "Z") == (1.0, "Z")
    for gold, options in (("C", 2), ("", 4), ("AB", 4), ("1", 4)):
        with pytest.raises(ValueError, match="letters A to"):
            load_grader(f"choice{options}")("#### A", gold)
    assert grade_choice("#### A", "(a)", 4) == (1.0, "A"), "the gold may be written in brackets or small"


def test_text_is_compared_exactly_up_to_case_width_space_and_the_last_period():
    for text in ("Par\u00efs  est", "  par\u00cfs\nest.", "#### Pari\u0308s est", r"so \boxed{\text{PAR\u00cfS est}}".replace("\\u00cf", "\u00cf")):
        assert grade_text(text, "Par\u00efs est.")[0] == 1.0
    assert grade_text("I say: Paris", "Paris") == (0.0, "i say: paris"), "the whole response is the answer where nothing marks it"
    assert grade_text("#### \uff30aris", "paris") == (1.0, "paris")
    assert grade_text("", "paris") == (0.0, None) == grade_text(r"paris \boxed{", "paris")
    with pytest.raises(ValueError, match="empty"):
        grade_text("x", " . ")


def test_yes_and_no_are_read_where_they_are_stated():
    for text in (
        "yes",
        "Yes.",
        "#### yes",
        r"\boxed{\text{Yes}}",
        "The answer is yes.",
        "No, I mean\nYES",
        "Finish[yes]",
        "Answer: **Yes**, clearly",
    ):
        assert grade_yes_no(text, "Yes")[0] == 1.0, text
        assert grade_yes_no(text, "no") == (0.0, "yes")
    for text in ("", "yes or no", "it says yes somewhere in the middle", "#### maybe", r"\boxed{yes and no}", "the answer is yes or no", "yesterday",
                 "#### yes no", "the answer is yes/no.", "#### Yes|No", "Answer: yes, or no"):  # fmt: skip
        assert grade_yes_no(text, "yes") == (0.0, None), text
    with pytest.raises(ValueError, match="neither"):
        grade_yes_no("yes", "maybe")
