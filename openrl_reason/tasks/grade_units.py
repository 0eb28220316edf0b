"""Units and words in answers: one name for each unit, and which runs of letters are words rather than products of variables."""

from __future__ import annotations

import re

_UNITS = {
    "degree": "degrees deg", "percent": "percentage pct", "dollar": "dollars usd bucks", "cent": "cents", "euro": "euros eur",
    "pound sterling": "gbp", "centimeter": "centimeters centimetre centimetres cm cms", "millimeter": "millimeters millimetre millimetres mm",
    "kilometer": "kilometers kilometre kilometres km", "meter": "meters metre metres m", "inch": "inches in", "foot": "feet ft",
    "yard": "yards yd yds", "mile": "miles mi", "gram": "grams gm g", "kilogram": "kilograms kg kgs", "milligram": "milligrams mg",
    "ounce": "ounces oz", "pound": "pounds lb lbs", "second": "seconds sec secs s", "minute": "minutes min mins", "hour": "hours hr hrs h",
    "day": "days", "week": "weeks", "month": "months", "year": "years yr yrs", "liter": "liters litre litres l", "milliliter": "milliliters ml",
    "gallon": "gallons gal", "square": "squared sq", "cubic": "cubed cu", "unit": "units", "radian": "radians rad", "acre": "acres",
    "mph": "mph", "kph": "kph", "am": "am", "pm": "pm",
}  # fmt: skip
UNIT_NAMES = {alias: name for name, aliases in _UNITS.items() for alias in (name, *aliases.split())}
# Two letters and more that are a unit wherever they stand alone; "in" and "mi" and single letters only inside of \text{...}.
_BARE_UNITS = frozenset(alias for alias in UNIT_NAMES if len(alias) > 1) - {"in", "mi", "lb", "pound", "am", "pm"} | {"am", "pm", "in"}
_SHORT_WORDS = frozenset("yes odd the not one two six ten all any are few per day men dog cat new old red sum sq".split())
_VARIABLE_RUNS = re.compile(r"(?:[abcd]+|[wxyz]+|[pqrst]+|[klmn]+|[uvw]+)")
# Words that make a number another number, or deny it: never a unit that may be left out.
_NO_UNITS = frozenset(
    "k bn hundred thousand million billion trillion dozen half third quarter times not no none or to and about approximately minus plus "
    "less more over negative squared".split()
) - {"squared"}


def is_word(run: str) -> bool:
    """Whether letters side by side are a word: a unit, a name, a label (``LQSX``, ``Monday``), not a product of variables (``xyz``)."""
    lowered = run.lower().replace(".", "")
    if lowered in _BARE_UNITS or lowered in _SHORT_WORDS:
        return True
    if "." in run:
        return True
    if run.isupper() or run[1:].lower() != run[1:]:
        return len(run) >= 3
    return len(run) >= 4 and not _VARIABLE_RUNS.fullmatch(run) or (len(run) == 3 and run[0].isupper())


def unit_name(words: str) -> str:
    """One spelling: ``sq. feet``, ``square foot`` and ``ft^2`` are ``foot^2``; unknown words stay, in lower case and singular."""
    words = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", words.lower())
    if enclosed := re.fullmatch(r"\s*\(\s*([a-z. ]{2,})\)\s*", words):
        words = enclosed[1]
    words = words.replace("/", " per ").replace(".", " ").replace("-", " ")
    names: list[str] = []
    power = ""
    for word in re.findall(r"[a-z]+|\^-?[0-9]|[^\sa-z]+", words):
        plural = len(word) > 3 and word.endswith("s") and not word.endswith("ss") and word not in _NO_UNITS
        name = UNIT_NAMES.get(word) or (word[:-1] if plural else word)
        if name in ("square", "cubic"):
            power = "^2" if name == "square" else "^3"
            if names and word in ("squared", "cubed"):
                names[-1] += power
                power = ""
            continue
        if word.startswith("^") and names:
            names[-1] += word
            continue
        names.append(name + power)
        power = ""
    name = " ".join([*names, *(["unit" + power] if power and not names else [])])
    return {"mile per hour": "mph", "kilometer per hour": "kph"}.get(name, name)


def may_be_left_out(unit: str) -> bool:
    """Whether an answer means the same without the unit: at most five words, nothing but words, none of which changes the number."""
    if not re.fullmatch(r"[a-z ^0-9-]*", unit):
        return False
    words = re.findall(r"[a-z]+", unit)
    return len(words) <= 5 and len(unit) <= 60 and not (set(words) & _NO_UNITS) and not re.search(r"(?<!\^)(?<!\^-)[0-9]", unit)


def words_of(text: str) -> str:
    """The bare words of an answer: no LaTeX, no brackets around a single label, one space between words."""
    bare = re.sub(r"\\text|\\[A-Za-z]+", " ", text)
    bare = re.sub(r"[{}$\\]", " ", bare)
    bare = re.sub(r"\s+", " ", bare).strip().rstrip(".").strip()
    label = re.fullmatch(r"\(\s*(.*?)\s*\)", bare)
    return label[1] if label else bare
