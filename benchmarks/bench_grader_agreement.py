"""How often the strict grader of mathematics agrees with the truth, beside plain math-verify.

    python benchmarks/bench_grader_agreement.py [--data ../shared/data] [--seed 0]

Pairs (gold, answer, truth) are made from the gold answers of real MATH problems by rules that know nothing of any grader: rewrites that keep
the meaning (layout, decimals of fractions that end, other units spelling, lists in another order, ...) and rewrites that do not (a sign, a
bracket, a base, a factor of 100, a dropped element, ...). Then the reference solutions of MATH and GSM8K are graded against their own
answers, and the rate of one process is taken on them and on the pairs. The figures go to results/grader_agreement.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

from _record import write

from openrl_reason.tasks.grade_extract import last_boxed
from openrl_reason.tasks.grade_math import grade_math, load_math
from openrl_reason.tasks.grade_parity import grade_gsm8k_parity, grade_math_parity
from openrl_reason.tasks.graders import grade_final_number

Rewrite = Callable[[str, random.Random], str | None]
KEEPS: list[tuple[str, str, Rewrite]] = []
BREAKS: list[tuple[str, str, Rewrite]] = []

KINDS = {
    "integer": r"-?[0-9]{1,9}",
    "decimal": r"-?[0-9]+\.[0-9]+",
    "fraction": r"-?\\[dt]?frac\{-?[0-9]+\}\{[0-9]+\}",
    "mixed number": r"[0-9]+ ?\\frac\{[0-9]+\}\{[0-9]+\}",
    "grouped number": r"[0-9]{1,3}(?:,\\![0-9]{3})+",
    "root": r"-?[0-9]*\s?\\sqrt\{[0-9]+\}",
    "pi": r"-?[0-9]+ ?\\pi",
    "complex": r"-?[0-9]+ ?[-+] ?[0-9]*i",
    "polynomial": r"-?[0-9]*[a-z](?:\^[0-9])?(?: ?[-+] ?[0-9]*[a-z]?(?:\^[0-9])?)+",
    "pair": r"\(-?[0-9]+, ?-?[0-9]+\)",
    "triple": r"\(-?[0-9]+, ?-?[0-9]+, ?-?[0-9]+\)",
    "interval": r"[(\[](?:-?[0-9]+|-\\infty), ?(?:-?[0-9]+|\\infty)[)\]]",
    "union": r"[(\[][^()\[\]]+[)\]] ?\\cup ?[(\[][^()\[\]]+[)\]]",
    "list": r"(?![0-9]{1,3}(?:,[0-9]{3})+$)-?[0-9]+(?:, ?-?[0-9]+)+",
    "matrix": r"\\begin\{pmatrix\}[-0-9/&\\ ]+\\end\{pmatrix\}",
    "base": r"[0-9]+_\{?[0-9]+\}?",
    "unit": r"[0-9.]+ ?(?:\\,)?\\(?:text|mbox)\{ ?(?:cm|feet|inches|miles|meters|square units|degrees|dollars|hours|minutes|days|units)\}",
    "money": r"\\\$[0-9]+(?:\.[0-9]+)?",
    "percent": r"[0-9.]+ ?\\%",
    "degree": r"-?[0-9]+\^(?:\\circ|\{\\circ\})",
    "equation": r"[a-z] ?= ?-?[0-9]+|y ?= ?-?[0-9]*x ?[-+] ?[0-9]+",
    "word": r"\\text\{[A-Z][a-z]{2,}\}|\\text\{[a-z]{3,}\}",
    "label": r"\\text\{\(?[A-H]\)?\}",
    "ratio": r"[0-9]+ ?(?:\\!)?: ?(?:\\!)?[0-9]+",
}


def keeps(name: str, kinds: str) -> Callable[[Rewrite], Rewrite]:
    return lambda rewrite: KEEPS.append((name, kinds, rewrite)) or rewrite


def breaks(name: str, kinds: str) -> Callable[[Rewrite], Rewrite]:
    return lambda rewrite: BREAKS.append((name, kinds, rewrite)) or rewrite


def swap(pattern: str, replacement: str, text: str) -> str | None:
    """The text with the first match replaced; None if nothing matches."""
    changed, count = re.subn(pattern, replacement, text, count=1)
    return changed if count else None


def integers(text: str) -> list[re.Match[str]]:
    return list(re.finditer(r"-?[0-9]+", text))


def with_integer(text: str, match: re.Match[str], value: int) -> str:
    return text[: match.start()] + str(value) + text[match.end() :]


def number(text: str) -> Fraction | None:
    match = re.fullmatch(r"(-?)(?:\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\}|([0-9]+(?:\.[0-9]+)?))", text)
    if match is None:
        return None
    value = Fraction(int(match[2]), int(match[3])) if match[2] else Fraction(match[4])
    return -value if match[1] else value


def decimal(value: Fraction) -> str | None:
    """As a decimal, if it ends within eight places."""
    scaled = value * 10**8
    if scaled.denominator != 1:
        return None
    digits = f"{abs(int(scaled)):09d}"
    return ("-" if value < 0 else "") + (digits[:-8] + "." + digits[-8:]).rstrip("0").rstrip(".")


# -- rewrites that keep the meaning

NUMBERS = "integer decimal fraction"
EVERYTHING = " ".join(f"{kind.replace(' ', '_')}" for kind in KINDS)

keeps("in dollars", EVERYTHING)(lambda t, r: f"${t}$")
keeps("spaces outside", EVERYTHING)(lambda t, r: f"  {t} ")
keeps("full stop", "integer fraction root pair list word")(lambda t, r: t + ".")
keeps("\\left \\right", "pair triple interval")(lambda t, r: "\\left" + t[:-1] + "\\right" + t[-1])
keeps("spaces at commas", "pair triple list interval")(lambda t, r: re.sub(r",\s*", " , ", t))
keeps("no spaces at commas", "pair triple interval")(lambda t, r: re.sub(r",\s*", ",", t))
keeps("thin spaces", "root pi polynomial")(lambda t, r: swap(r"(?<=[0-9a-z}]) ?([+]|\\sqrt|\\pi)", r"\\,\1", t))
keeps("\\dfrac", "fraction mixed_number")(lambda t, r: re.sub(r"\\[dt]?frac", r"\\dfrac", t))
keeps("slash", "fraction")(lambda t, r: re.sub(r"\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\}", r"\1/\2", t))
keeps("thousands comma", "integer")(lambda t, r: f"{int(t):,}" if abs(int(t)) >= 1000 else None)
keeps("plain commas", "grouped_number")(lambda t, r: t.replace("\\!", ""))
keeps("no commas", "grouped_number")(lambda t, r: t.replace(",\\!", ""))
keeps("braced commas", "grouped_number")(lambda t, r: t.replace(",\\!", "{,}"))
keeps("point zero", "integer")(lambda t, r: t + ".0")
keeps("trailing zero", "decimal")(lambda t, r: t + "0")
keeps("plus sign", "integer")(lambda t, r: "+" + t if t[0] != "-" else None)
keeps("unit added", "integer decimal")(lambda t, r: t + r.choice([r"\text{ cm}", r"\text{ units}", r"\,\text{km}", r"\text{ dollars}"]))
keeps("unit left out", "unit")(lambda t, r: re.sub(r" ?(?:\\,)?\\(?:text|mbox)\{.*", "", t))
keeps("unit without \\text", "unit")(lambda t, r: re.sub(r"\\(?:text|mbox)\{ ?(.*)\}", r" \1", t))
keeps("unit in \\mathrm", "unit")(lambda t, r: re.sub(r"\\(?:text|mbox)\{ ?([a-z]+)\}", r"\\mathrm{\1}", t))
keeps("x =", "integer decimal fraction root pi")(lambda t, r: f"{r.choice('xnyk')} = {t}")
keeps("without x =", "equation")(lambda t, r: t.split("=")[1].strip())
keeps("sides swapped", "equation")(lambda t, r: f"{t.split('=')[1].strip()} = {t.split('=')[0].strip()}")
keeps("dollar left out", "money")(lambda t, r: t[2:])
keeps("dollars in words", "money")(lambda t, r: t[2:] + r"\text{ dollars}")
keeps("percent left out", "percent")(lambda t, r: re.sub(r" ?\\%", "", t))
keeps("degree left out", "degree")(lambda t, r: t.split("^")[0])
keeps("degrees in words", "degree")(lambda t, r: t.split("^")[0] + r"\text{ degrees}")
keeps("degree in braces", "degree")(lambda t, r: t.split("^")[0] + r"^{\circ}")
keeps("base in braces", "base")(lambda t, r: swap(r"_\{?([0-9]+)\}?", r"_{\1}", t))
keeps("bmatrix", "matrix")(lambda t, r: t.replace("pmatrix", "bmatrix"))
keeps("without \\text", "word label")(lambda t, r: t[6:-1])
keeps("lower case", "word")(lambda t, r: t.lower())
keeps("brackets", "label")(lambda t, r: t[6:-1] if "(" in t else f"({t[6:-1]})")
keeps("reversed", "list")(lambda t, r: ", ".join(reversed(re.split(r", ?", t))))
keeps("in a set", "list")(lambda t, r: f"\\{{{t}\\}}" if len(set(re.split(r", ?", t))) == t.count(",") + 1 else None)
keeps("with and", "list")(lambda t, r: r"\text{ and }".join(re.split(r", ?", t)) if t.count(",") == 1 else None)
keeps("parts swapped", "union")(lambda t, r: r" \cup ".join(reversed(re.split(r" ?\\cup ?", t))))
keeps("x in", "interval union")(lambda t, r: rf"x \in {t}")
keeps("spaces at colon", "ratio")(lambda t, r: re.sub(r"\s*(?:\\!)?:(?:\\!)?\s*", " : ", t))
keeps("times one", "root")(lambda t, r: t + r" \cdot 1")
keeps("pi first", "pi")(lambda t, r: r"\pi \cdot " + t.replace("\\pi", "").strip() if t[0] != "-" else None)


@keeps("as a decimal", "fraction")
def _(t: str, r: random.Random) -> str | None:
    return decimal(number(t) or Fraction(1, 3))


@keeps("as a fraction", "decimal")
def _(t: str, r: random.Random) -> str | None:
    value = number(t) or Fraction(0)
    return f"{'-' if value < 0 else ''}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


@keeps("not in lowest terms", "fraction integer")
def _(t: str, r: random.Random) -> str | None:
    value, k = number(t), r.randint(2, 7)
    return None if value is None else f"\\frac{{{value.numerator * k}}}{{{value.denominator * k}}}"


@keeps("improper fraction", "mixed_number")
def _(t: str, r: random.Random) -> str | None:
    whole, top, bottom = map(int, re.findall(r"[0-9]+", t))
    return f"\\frac{{{whole * bottom + top}}}{{{bottom}}}"


@keeps("factor under the root", "root")
def _(t: str, r: random.Random) -> str | None:
    match = re.fullmatch(r"(-?)([0-9]+)\s?\\sqrt\{([0-9]+)\}", t)
    return f"{match[1]}\\sqrt{{{int(match[2]) ** 2 * int(match[3])}}}" if match else None


@keeps("terms reversed", "polynomial complex")
def _(t: str, r: random.Random) -> str | None:
    terms = re.findall(r"[-+]?[^-+]+", t.replace(" ", ""))
    return "".join(term if term[0] in "-+" else "+" + term for term in reversed(terms)).lstrip("+")


@keeps("as an inequality", "interval")
def _(t: str, r: random.Random) -> str | None:
    low, high = re.split(r", ?", t[1:-1])
    below, above = "<" if t[0] == "(" else r"\le", "<" if t[-1] == ")" else r"\le"
    left = "" if "infty" in low else f"{low} {below} "
    right = "" if "infty" in high else f" {above} {high}"
    points = "infty" not in t and t[0] == "(" and t[-1] == ")"  # (2,5) may be a point
    return f"{left}x{right}" if (left or right) and not points else None


@keeps("multiplied", "equation")
def _(t: str, r: random.Random) -> str | None:
    match = re.fullmatch(r"y ?= ?(-?[0-9]+)x ?([-+]) ?([0-9]+)", t)
    return f"2y = {2 * int(match[1])}x {match[2]} {2 * int(match[3])}" if match else None


# -- rewrites that change the meaning

WITH_NUMBERS = (
    "integer decimal fraction mixed_number root pi complex polynomial pair triple interval union list matrix base unit money "
    "percent degree equation ratio"
)


@breaks("one number off by one", WITH_NUMBERS)
def _(t: str, r: random.Random) -> str | None:
    found = [m for m in integers(t) if not t[: m.start()].endswith(("_", "_{", "^", "."))]
    if not found:
        return None
    match = found[-1] if "." in t else found[0] if "frac" in t else r.choice(found)
    value = int(match.group())
    return with_integer(t, match, value + 1 if value >= 0 else value - 1)


breaks("times 100", "integer decimal fraction root pi money percent unit degree")(
    lambda t, r: swap(r"([0-9]+)(?:\.([0-9]+))?", lambda m: decimal(Fraction(m.group()) * 100), t) if "frac" not in t else "100 \\cdot " + t
)
breaks("divided by 100", "integer decimal money percent unit degree")(
    lambda t, r: swap(r"[0-9]+(?:\.[0-9]+)?", lambda m: decimal(Fraction(m.group()) / 100), t)
)


@breaks("other sign", "integer decimal fraction root pi pair unit degree")
def _(t: str, r: random.Random) -> str | None:
    bracket, rest = ("(", t[1:]) if t[0] == "(" else ("", t)
    if re.match(r"0(?![.0-9])", rest):
        return None
    return bracket + (rest[1:] if rest[0] == "-" else "-" + rest)


breaks("digit appended", "integer")(lambda t, r: t + str(r.randint(0, 9)))
breaks("digits swapped", "integer")(lambda t, r: t[:-2] + t[-1] + t[-2] if len(t.lstrip("-")) > 1 and t[-1] != t[-2] else None)
breaks("inverted", "fraction")(lambda t, r: swap(r"\{(-?[0-9]+)\}\{([0-9]+)\}", r"{\2}{\1}", t) if abs(number(t) or 1) != 1 else None)
breaks("rounded", "fraction")(lambda t, r: f"{float(number(t)):.{r.choice([2, 3, 4, 6])}f}" if number(t) and decimal(number(t)) is None else None)
breaks("rounded", "root")(
    lambda t, r: f"{float((int(m[1] + (m[2] or '1'))) * int(m[3]) ** 0.5):.{r.choice([2, 4, 6])}f}"
    if (m := re.fullmatch(r"(-?)([0-9]*)\s?\\sqrt\{([0-9]+)\}", t)) and int(m[3]) ** 0.5 % 1 else None
)  # fmt: skip
breaks("rounded", "pi")(lambda t, r: f"{int(re.match('-?[0-9]+', t)[0]) * 3.14159265358979:.6f}")
breaks("root dropped", "root")(lambda t, r: re.sub(r"\\sqrt\{([0-9]+)\}", r"\\cdot \1", t).removeprefix("\\cdot").replace("-\\cdot", "-"))
breaks("pi dropped", "pi")(lambda t, r: t.replace("\\pi", "").strip())
breaks("i left out", "complex")(lambda t, r: re.sub(r"([0-9]*)i", lambda m: m[1] or "1", t))
breaks("j for i", "complex")(lambda t, r: t.replace("i", "j"))
breaks("conjugate", "complex")(lambda t, r: t[:1] + t[1:].translate({43: 45, 45: 43}))
breaks("a sign inside", "polynomial")(lambda t, r: t[:1] + t[1:].translate({43: 45, 45: 43}))
breaks("another variable", "polynomial")(lambda t, r: re.sub("[a-z]", "w", t) if "w" not in t else None)
breaks("a power more", "polynomial")(lambda t, r: swap(r"([a-z])(?!\^)", r"\1^7", t))
breaks("swapped", "pair triple")(
    lambda t, r: "(" + ", ".join(reversed(re.split(r", ?", t[1:-1]))) + ")"
    if (p := re.split(r", ?", t[1:-1])) != p[::-1] else None
)  # fmt: skip
breaks("as a set", "pair triple")(lambda t, r: f"\\{{{t[1:-1]}\\}}")
breaks("an element dropped", "pair triple list")(lambda t, r: swap(r",\s*-?[0-9]+(?=\)?$)", "", t))
breaks("an element added", "pair triple list")(lambda t, r: swap(r"(\)?)$", rf", {r.randint(900, 999)}\1", t))
breaks("left bracket", "interval union")(lambda t, r: {"(": "[", "[": "("}[t[0]] + t[1:] if "infty" not in t[:10] else None)
breaks("right bracket", "interval union")(lambda t, r: t[:-1] + {")": "]", "]": ")"}[t[-1]] if "infty" not in t[-9:] else None)
breaks("an end changed", "interval union")(lambda t, r: swap(r"-?[0-9]+(?=\s*[)\],])", str(r.randint(-999, -900)), t))
breaks("infinity for an end", "interval")(lambda t, r: swap(r"-?[0-9]+(?=[)\]]$)", r"\\infty", t[:-1] + ")"))
breaks("a part dropped", "union")(lambda t, r: re.split(r" ?\\cup ?", t)[r.randint(0, 1)])
breaks("cap for cup", "union")(lambda t, r: t.replace("\\cup", "\\cap"))
breaks("transposed", "matrix")(lambda t, r: t.replace("\\\\", "&") if "&" not in t else None)


@breaks("rows swapped", "matrix")
def _(t: str, r: random.Random) -> str | None:
    rows = [row.strip() for row in t[15:-13].split("\\\\")]
    return "\\begin{pmatrix}" + "\\\\".join(rows[::-1]) + "\\end{pmatrix}" if rows != rows[::-1] else None


breaks("another base", "base")(lambda t, r: swap(r"_\{?([0-9]+)\}?", lambda m: f"_{{{int(m[1]) + r.randint(1, 3)}}}", t))
breaks("digits of another number", "base")(lambda t, r: swap("^([0-9]+)", lambda m: m[1][::-1] if m[1] != m[1][::-1] else m[1] + "1", t))
breaks("another unit", "unit")(lambda t, r: re.sub(r"\{ ?[a-z ]+\}", "{ " + r.choice(["kilograms", "liters", "seconds", "yards"]) + "}", t))
breaks("million", "integer unit")(lambda t, r: re.sub(r" ?(?:\\,)?\\(?:text|mbox)\{.*", "", t) + r"\text{ million}" if t != "0" else None)
breaks("another word", "word")(
    lambda t, r: r"\text{" + r.choice([w for w in ("Friday", "odd", "Henry", "ellipse") if w.lower() not in t.lower()]) + "}"
)
breaks("another label", "label")(lambda t, r: re.sub(r"[A-H]", lambda m: chr((ord(m[0]) - 64) % 8 + 65), t[6:-1]))
breaks("turned round", "ratio")(lambda t, r: ":".join(p[::-1]) if (p := re.findall("[0-9]+", t)) != p[::-1] else None)
breaks("another variable", "equation")(lambda t, r: "w" + t[1:])
breaks("nothing", "integer fraction pair")(lambda t, r: r"\text{no answer}")
breaks("two answers", "integer fraction")(lambda t, r: f"{t} \\text{{ or }} {r.randint(1000, 9999)}")
breaks("an equation without it", "integer")(lambda t, r: f"3x = {t}" if t != "0" else None)


# -- pairs


def golds(data: Path) -> dict[str, list[str]]:
    """Different MATH answers by kind, in a fixed order."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name in ("test", "train"):
        for line in (data / "math" / f"{name}.jsonl").read_text().splitlines():
            gold = last_boxed(json.loads(line)["solution"]) or ""
            for kind, pattern in KINDS.items():
                if re.fullmatch(pattern, gold) and gold not in found[kind]:
                    found[kind].append(gold)
    return found


def pairs(data: Path, seed: int, per_rewrite: int = 4) -> Iterator[tuple[str, str, bool, str]]:
    """(gold, answer, truth, rewrite): each rewrite on a few different golds of each kind that it fits."""
    by_kind = golds(data)
    for truth, rewrites in ((True, KEEPS), (False, BREAKS)):
        for number_, (name, kinds, rewrite) in enumerate(rewrites):
            for kind in kinds.split():
                rng = random.Random(f"{seed} {truth} {number_} {kind}")
                pool = list(by_kind[kind.replace("_", " ")])
                rng.shuffle(pool)
                made = 0
                for gold in pool:
                    answer = rewrite(gold, rng)
                    if answer is not None and (truth or answer.strip() != gold.strip()):
                        yield gold, answer, truth, f"{kind}: {name}"
                        made += 1
                    if made == per_rewrite:
                        break


def strict(gold: str, answer: str) -> bool:
    return grade_math(f"\\boxed{{{answer}}}", gold)[0] == 1.0


def plain_math_verify(gold: str, answer: str) -> bool:
    from math_verify import parse, verify

    return bool(verify(parse(f"\\boxed{{{gold}}}"), parse(f"\\boxed{{{answer}}}")))


def agreement(name: str, judge: Callable[[str, str], bool], made: list[tuple[str, str, bool, str]]) -> tuple[dict, list]:
    wrong = []
    start = time.process_time()
    for gold, answer, truth, rewrite in made:
        if judge(gold, answer) != truth:
            wrong.append((truth, rewrite, gold, answer))
    seconds = time.process_time() - start
    negatives = sum(not truth for _, _, truth, _ in made)
    accepted, refused = sum(not truth for truth, *_ in wrong), sum(truth for truth, *_ in wrong)
    row = {
        "what": name, "answers": len(made), "agreement_%": 100 * (1 - len(wrong) / len(made)), "false_positives": accepted,
        "false_positive_%": 100 * accepted / negatives, "false_negatives": refused,
        "false_negative_%": 100 * refused / (len(made) - negatives), "answers_per_cpu_s": len(made) / seconds,
    }  # fmt: skip
    return row, wrong


def references(data: Path) -> Iterator[dict]:
    """Reference solutions against their own answers."""
    for name, grade in (("strict", grade_math), ("parity", grade_math_parity)):
        for split in ("math500", "test", "train"):
            rows = [json.loads(line) for line in (data / "math" / f"{split}.jsonl").read_text().splitlines()]
            boxed = [(row["solution"], last_boxed(row["solution"])) for row in rows]
            yield graded(f"MATH {split}, {name}", grade, [(s, g) for s, g in boxed if g], sum(not g for _, g in boxed))
    for name, grade in (("strict", grade_final_number), ("parity", grade_gsm8k_parity)):
        for split in ("test", "train"):
            rows = [json.loads(line)["answer"] for line in (data / "gsm8k" / f"{split}.jsonl").read_text().splitlines()]
            yield graded(f"GSM8K {split}, {name}", grade, [(row, row.rpartition("####")[2].strip()) for row in rows], 0)


def graded(name: str, grade: Callable, made: list[tuple[str, str]], empty: int) -> dict:
    start = time.process_time()
    right = sum(grade(solution, gold)[0] == 1.0 for solution, gold in made)
    seconds = time.process_time() - start
    return {"what": name, "answers": len(made), "agreement_%": 100 * right / len(made), "empty_golds_left_out": empty,
            "answers_per_cpu_s": len(made) / seconds}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data", help="folder with math/ and gsm8k/")
    parser.add_argument("--seed", type=int, default=0, help="which golds are drawn")
    parser.add_argument("--per-rewrite", type=int, default=4, help="pairs of each rewrite and kind of answer")
    parser.add_argument("--no-reference", action="store_true", help="leave plain math-verify out")
    options = parser.parse_args()
    load_math()
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    made = list(dict.fromkeys(pairs(options.data, options.seed, options.per_rewrite)))
    row, wrong = agreement("pairs, strict", strict, made)
    for truth, rewrite, gold, answer in wrong:
        print(f"{'refused' if truth else 'accepted'}: {rewrite}: gold {gold!r}, answer {answer!r}")
    rows = [row]
    if not options.no_reference:
        row, others = agreement("pairs, plain math-verify 0.9.0", plain_math_verify, made)
        print(Counter(rewrite for *_, rewrite in [(t, w) for t, w, *_ in others]).most_common(40))
        rows.append(row)
    rows.extend(references(options.data))
    kinds = Counter(rewrite.split(":")[0] for *_, rewrite in made)
    write("grader_agreement", {"seed": options.seed, "pairs_by_kind": dict(kinds), "right": sum(t for _, _, t, _ in made)}, rows)


if __name__ == "__main__":
    main()
