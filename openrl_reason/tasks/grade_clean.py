"""One spelling for everything in a LaTeX answer, before it is read. Standard library only, linear in the length of the text."""

from __future__ import annotations

import re

from openrl_reason.tasks.grade_extract import matching_brace
from openrl_reason.tasks.grade_units import is_word

FUNCTIONS = frozenset("sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh ln log lg exp max min gcd lcm Re Im arg".split())
LEFT_SET, RIGHT_SET, BREAK = "\x01", "\x02", "\x03"
_SYMBOLS = {
    **dict.fromkeys(("le", "leq", "leqslant"), "≤"), **dict.fromkeys(("ge", "geq", "geqslant"), "≥"),
    **dict.fromkeys(("ne", "neq"), "≠"), "lt": "<", "gt": ">", "cup": "∪", "infty": "∞", "pm": "±", "mp": "∓", "in": "∈",
    **dict.fromkeys(("cdot", "times", "ast"), "*"), "div": "/", "colon": ":", "degree": "°", "circ": "○", "approx": "≈", "mid": "|",
    **dict.fromkeys(("vert", "lvert", "rvert"), "|"), "langle": "⟨", "rangle": "⟩", "lbrace": LEFT_SET, "rbrace": RIGHT_SET,
    "{": LEFT_SET, "}": RIGHT_SET, "\\": BREAK, "%": "%", "$": "￥", "dollar": "￥", "lbrack": "[", "rbrack": "]",
    "lfloor": "⌊", "rfloor": "⌋", "lceil": "⌈", "rceil": "⌉", "&": " ", "#": " ", "_": " ",
    "dfrac": "\\frac", "tfrac": "\\frac", "cfrac": "\\frac", "dbinom": "\\binom", "tbinom": "\\binom", "to": "→", "rightarrow": "→",
    "land": " , ", "lor": " , ", "wedge": " , ", "vee": " , ", "newline": BREAK, "pounds": "£", "euro": "€",
}  # fmt: skip
_DROPPED = frozenset(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle limits quad qquad hline rm bf it mathstrut "
    "noindent null".split()
) | frozenset("()[]!,;: \n\t>/~'-")
_WITH_ARGUMENT_DROPPED = frozenset("phantom hphantom vphantom hspace vspace label tag color".split())
_TEXTS = frozenset("text mbox textrm textbf textit textnormal texttt textsf hbox".split())
_FONTS = frozenset("mathrm mathbf mathit mathsf mathcal mathbb boldsymbol bm operatorname overline underline vec hat bar boxed fbox".split())
_UNICODE = str.maketrans({
    "−": "-", "–": "-", "—": "-", "×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "π": "\\pi ", "√": "\\sqrt ", "¢": "\\text{cents}",
    "∅": "\\emptyset ",
    "²": "^{2}", "³": "^{3}", "′": "", "≤": "≤", "≥": "≥", "½": "\\frac{1}{2}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}", "θ": "\\theta ",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "", "（": "(", "）": ")", "，": ",", "\x00": " ", "\x01": " ", "\x02": " ",
    "\x03": " ", "\x04": " ", "￥": " ", "○": " ", "º": "°", "“": '"', "”": '"', "’": "'",
})  # fmt: skip
_COMMAND = re.compile(r"\\(?:[A-Za-z]+\*?|.|$)", re.DOTALL)


def clean(text: str) -> str:
    """The answer with one spelling for everything: layout commands gone, symbols as single characters, words as ``\\text{...}``."""
    text = text.translate(_UNICODE)
    # A comma inside a number, made safe from being read as a separator: 11,\! 111 and 11{,}111 are one number.
    text = re.sub(r"(?<=[0-9])(?:,\s*\\!\s*|\{,\}|\\,|\\ )(?=[0-9]{3}(?![0-9]))", "", text)
    parts: list[str] = []
    position = 0
    while position < len(text):
        match = _COMMAND.search(text, position)
        if match is None:
            parts.append(_clean_plain(text[position:]))
            break
        parts.append(_clean_plain(text[position : match.start()]))
        position = _clean_command(text, match, parts)
    cleaned = re.sub(r"\^\s*(?:\{\s*○\s*\}|○)|\{\s*\^○\s*\}", "°", "".join(parts)).replace("○", " ")
    cleaned = re.sub(r"<=", "≤", re.sub(r">=", "≥", re.sub(r"!=", "≠", cleaned)))
    cleaned = re.sub(r"(?:\s*,)+\s*,", " ,", cleaned).strip().lstrip("≈ ")
    while cleaned and cleaned[-1] in ".,;" + BREAK:
        cleaned = cleaned[:-1].rstrip()
    return re.sub(r"\s+", " ", cleaned)


def _clean_command(text: str, match: re.Match[str], parts: list[str]) -> int:
    name = match.group()[1:].rstrip("*")
    after = match.end()
    if name in _DROPPED or name == "":
        parts.append(" ")
        # `\left.` and `\right.` stand for no bracket at all
        return after + 1 if name in ("left", "right") and text[after : after + 1] == "." else after
    if name in _SYMBOLS:
        parts.append(_SYMBOLS[name] + (" " if _SYMBOLS[name][0] == "\\" else ""))
        return after
    if name in ("begin", "end"):
        environment = re.compile(r"\s*\{\s*[A-Za-z]*\*?\s*\}(?:\s*\{[lcr| ]*\})?").match(text, after)
        parts.append(match.group() + (environment.group() if environment else ""))
        return environment.end() if environment else after
    if name in _TEXTS or name in _FONTS or name in _WITH_ARGUMENT_DROPPED:
        start = after + len(text[after:]) - len(text[after:].lstrip(" "))
        end = matching_brace(text, start) if text[start : start + 1] == "{" else -1
        if end < 0:
            parts.append(" ")
            return start + 1 if name in _WITH_ARGUMENT_DROPPED else after  # \\phantom 1 hides one character
        inner = text[start + 1 : end]
        if name in _TEXTS or (name in _FONTS and re.fullmatch(r"[A-Za-z .]{2,}", inner) and inner.strip() not in FUNCTIONS):
            parts.append(_as_text(inner))
        elif name in ("overline", "underline", "bar") and re.fullmatch(r"[0-9]+", inner):
            parts.append(f"\\overline{{{inner}}}")
        elif name == "mathbb" and inner == "R":
            parts.append("(-∞,∞)")
        elif name in _FONTS:
            parts.append((f"\\{inner.strip()} " if inner.strip() in FUNCTIONS else f"{{{clean(inner)}}}") if len(inner) < len(text) else " ")
        return end + 1
    parts.append(match.group())
    return after


def _as_text(inner: str) -> str:
    words = re.sub(r"\\[A-Za-z]+|\\.|[{}$]", " ", inner.translate({ord("￥"): " "}))
    if re.fullmatch(r"[\s,;]*(?:and|or)[\s,;]*", words):
        return " , "
    if re.fullmatch(r"[-+0-9.,:;=/()\s]*", words):
        return words
    measured = re.fullmatch(r"\s*([-+]?[0-9][0-9.,:/ ]{0,30})([A-Za-z][A-Za-z. ]*)", words)
    return f"{measured[1]} \\text{{{measured[2]}}}" if measured else f"\\text{{{words}}}"


def _clean_plain(text: str) -> str:
    """Between commands: math dollars go, words become ``\\text{...}``; runs of one or two letters stay variables."""
    text = text.replace("$", " ").replace("~", " ").replace('"', " ")

    def word(match: re.Match[str]) -> str:
        run = match.group()
        if run in ("and", "or"):
            return " , "
        if run in FUNCTIONS:
            return f"\\{run} "
        if run in ("pi", "sqrt", "infinity"):
            return {"pi": "\\pi ", "sqrt": "\\sqrt ", "infinity": "∞"}[run]
        return f"\\text{{{run}}}" if is_word(run) else run

    return re.sub(r"[A-Za-z]{2,}(?:\.[A-Za-z]\.?)*|(?<=[0-9 ])[ap]\.\s?m\b\.?", word, text)
