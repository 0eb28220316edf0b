"""Where a MATH solution is cut into steps: VinePPO's five stages (arXiv 2410.01679), re-stated over positions of the text.

1. Formulas, figures and tables become opaque, so that their commas, periods and line feeds do not cut yet.
2. A step ends before a line feed and after a sentence; a fragment joins what follows it.
3. A step also ends after a formula whose last character is a period.
4. Line feeds inside formulas cut too; an opening delimiter alone in its line joins the line below.
5. A step over 100 characters is broken near its middle: in prose after a comma, "and", a colon or "to", else in a formula after a relation.

The thresholds are the published ones. Where the published code fails an assertion (a short text, formulas within a figure) this one goes on;
docs/steps.md lists the differences. Work is proportional to the text: no pattern here looks for a closing delimiter again once there is none.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence

import numpy as np

Span = tuple[int, int]

SHORT = 20
"""A fragment shorter than this joins the step after it."""
LONG = 100
"""A step longer than this is broken further, where it can be."""
PROSE_HALF = 40
FORMULA_HALF = 20
"""The least that each half of a broken step has, by what it is broken in."""
MASK_WIDTH = 60
"""What a formula counts as when the middle of a step is looked for, whatever its length."""

_HIDDEN = "\0"
_PAIRS = (
    ("[asy]", "[/asy]"),
    ("$\\begin{tabular}", "\\end{tabular}$"),
    ("\\begin{tabular}", "\\end{tabular}"),
    ("\\(", "\\)"),
    ("\\[", "\\]"),
    ("$$", "$$"),
)
_DOLLAR_OPENS = re.compile(r"(?<!\\)\$")
_DOLLAR_CLOSES = re.compile(r"(?<=[^\\])\$(?!\$)")
# Names are bounded, since an unclosed brace would be looked for to the end of the text at every \begin.
_ENVIRONMENT_OPENS = re.compile(r"\\begin\{([^}]{0,64})\}")
_ENVIRONMENT_CLOSES = re.compile(r"\\end\{([^}]{0,64})\}")

_LINE_FEED = re.compile("\n")
# A word of one or two letters before the period is taken for an initial or an abbreviation.
_SENTENCE_ENDS = re.compile(r"(?<!\b[A-Za-z])(?<!\s[A-Za-z]{2})\.(?=\s+[A-Z])")
_FORMULA_ENDS_SENTENCE = (".$", ".$$", ".\\)", ".\\]")
_OPENING = re.compile(r"\$\$?|\\[(\[]|\\begin\{[^}]*\}|\[asy\]")
_LONGEST_OPENING = 80
_IN_PROSE = (re.compile(","), re.compile(r"\sand(?=\s)"), re.compile(":"), re.compile(r"\sto(?=\s)"))
_IN_FORMULA = tuple(re.compile(pattern) for pattern in (r",\$", r",\\\)", r",\\\]", "=", r"\\equiv", r"\+", r"\\cancelto"))


def math_cuts(text: str) -> list[int]:
    """Positions in ``text`` at which a step begins, ascending, without 0; none where there is one step."""
    spans = formula_spans(text)
    shadow = _blacked_out(text, spans)
    edges = _merge(_prose_edges(shadow), _is_fragment(text, spans))
    ends = {end for start, end in spans if text.endswith(_FORMULA_ENDS_SENTENCE, start, end)}
    edges = _merge(sorted({*edges, *ends}), lambda start, end: end - start < SHORT and not text.endswith(_FORMULA_ENDS_SENTENCE, start, end))
    lines = {match.start() for match in _LINE_FEED.finditer(text) if shadow[match.start()] == _HIDDEN} if spans else ()
    edges = _merge(sorted({*edges, *lines}), lambda start, end: end - start < 3 or _is_opening(text, start, end))
    broken = {start + cut for start, end in zip(edges, edges[1:], strict=False) if end - start > LONG for cut in _long_step_cuts(text[start:end])}
    return _join_blanks(text, sorted({*edges, *broken}))


def formula_spans(text: str) -> list[Span]:
    """Stage 1: the outermost formulas, figures, tables and environments, in order."""
    found: list[Span] = []
    shadow = text
    for opening, closing in _PAIRS:
        shadow = _hide(shadow, found, _spans_between(shadow, opening, closing))
    shadow = _hide(shadow, found, _dollar_spans(shadow))
    _hide(shadow, found, _environment_spans(shadow))
    outermost: list[Span] = []
    found.sort()  # no two begin at one place: a span's first character is hidden from the stages after it
    for start, end in found:
        if not outermost or start >= outermost[-1][1]:
            outermost.append((start, end))
    return outermost


def _hide(shadow: str, found: list[Span], spans: list[Span]) -> str:
    """``shadow`` with the spans blacked out, so that what comes later finds no delimiter in them; the spans are added to ``found``."""
    found.extend(spans)
    return _blacked_out(shadow, spans)


def _blacked_out(text: str, spans: Sequence[Span]) -> str:
    if not spans:
        return text
    pieces, position = [], 0
    for start, end in spans:
        pieces += (text[position:start], _HIDDEN * (end - start))
        position = end
    return "".join(pieces) + text[position:]


def _spans_between(text: str, opening: str, closing: str) -> list[Span]:
    spans, start = [], text.find(opening)
    while start >= 0:
        close = text.find(closing, start + len(opening))
        if close < 0:
            break
        spans.append((start, close + len(closing)))
        start = text.find(opening, spans[-1][1])
    return spans


def _dollar_spans(text: str) -> list[Span]:
    spans: list[Span] = []
    opening = _DOLLAR_OPENS.search(text)
    while opening and (closing := _DOLLAR_CLOSES.search(text, opening.start() + 2)):  # something stands between
        spans.append((opening.start(), closing.end()))
        opening = _DOLLAR_OPENS.search(text, closing.end())
    return spans


def _environment_spans(text: str) -> list[Span]:
    closes: dict[str, list[Span]] = {}
    for match in _ENVIRONMENT_CLOSES.finditer(text):
        closes.setdefault(match[1], []).append(match.span())
    spans: list[Span] = []
    for match in _ENVIRONMENT_OPENS.finditer(text):
        if spans and match.start() < spans[-1][1]:
            continue
        of_name = closes.get(match[1], [])
        close = bisect_left(of_name, (match.end(), 0))
        if close < len(of_name):
            spans.append((match.start(), of_name[close][1]))
    return spans


def _prose_edges(shadow: str) -> list[int]:
    ends = {match.end() for match in _SENTENCE_ENDS.finditer(shadow)}
    lines = {match.start() for match in _LINE_FEED.finditer(shadow)}
    return sorted({0, len(shadow), *ends, *lines})


def _is_fragment(text: str, spans: Sequence[Span]) -> Callable[[int, int], bool]:
    starts = [start for start, _ in spans]

    def is_fragment(start: int, end: int) -> bool:
        if end - start >= SHORT or text.endswith(".", start, end):
            return False
        return bisect_left(starts, start) == bisect_left(starts, end)  # a formula is never a fragment

    return is_fragment


def _is_opening(text: str, start: int, end: int) -> bool:
    return end - start <= _LONGEST_OPENING and _OPENING.fullmatch(text[start:end].strip()) is not None


def _merge(edges: Sequence[int], is_short: Callable[[int, int], bool]) -> list[int]:
    """The edges without those that end a short step, which joins the next one; the last joins the one before it."""
    kept = [0]
    for end in edges[1:-1]:
        if not is_short(kept[-1], end):
            kept.append(end)
    if len(kept) > 1 and is_short(kept[-1], edges[-1]):
        kept.pop()
    return [*kept, edges[-1]]


def _join_blanks(text: str, edges: Sequence[int]) -> list[int]:
    """The inner edges, so that no step is only blanks: blanks join the step after them, the last ones the step before."""
    cuts, start = [0], 0
    for end in edges[1:]:
        if not text[start:end].isspace():
            cuts.append(end)
        start = end
    return cuts[1:-1]


class _Breaks:
    """Where a stretch of text may be broken: for each kind of delimiter, the best first, the ascending positions right after one."""

    def __init__(self, text: str, patterns: Iterable[re.Pattern[str]], smallest: int, spans: Sequence[Span] = ()):
        """``text`` has the ``spans`` blacked out; each of them counts as ``MASK_WIDTH`` characters."""
        self.smallest = smallest
        self.span_ends = np.array([end for _, end in spans], dtype=np.int64)
        self.excess = np.concatenate([[0], np.cumsum([end - start - MASK_WIDTH for start, end in spans], dtype=np.int64)])
        self.kinds: list[tuple[list[int], list[int]]] = []
        for pattern in patterns:
            positions = [match.end() for match in pattern.finditer(text)]
            if positions:
                self.kinds.append((positions, self._widths(positions).tolist() if len(spans) else positions))

    def _widths(self, positions: Sequence[int]) -> np.ndarray:
        """How wide the text before each position is."""
        return np.asarray(positions, dtype=np.int64) - self.excess[np.searchsorted(self.span_ends, positions, side="right")]

    def nearest(self, start: int, end: int) -> int | None:
        """The break nearest to the middle, of the first kind for which that one leaves enough on both sides."""
        twice_middle = int(self._widths([start, end]).sum()) if len(self.span_ends) else start + end
        for positions, widths in self.kinds:
            low, high = bisect_right(positions, start), bisect_left(positions, end)
            if low == high:
                continue
            above = bisect_left(widths, twice_middle / 2, low, high)
            if above == high or (above > low and twice_middle - 2 * widths[above - 1] <= 2 * widths[above] - twice_middle):
                above -= 1
            if min(positions[above] - start, end - positions[above]) >= self.smallest:
                return positions[above]
        return None


def _long_step_cuts(step: str) -> list[int]:
    """Stage 5: halves of halves, until they are short or nothing in them can be broken.

    What follows a break in a formula begins inside one, so it is broken as a formula from there on. What precedes the break ends inside one: its
    formulas are looked for again.
    """
    in_formula = _Breaks(step, _IN_FORMULA, FORMULA_HALF)
    cuts: list[int] = []
    fresh = [(0, len(step))]
    while fresh:
        origin, stop = fresh.pop()
        spans = formula_spans(step[origin:stop])
        in_prose = _Breaks(_blacked_out(step[origin:stop], spans), _IN_PROSE, PROSE_HALF, spans)
        todo = [(origin, stop, True)]
        while todo:
            start, end, is_prose = todo.pop()
            if end - start <= LONG:
                continue
            cut = in_prose.nearest(start - origin, end - origin) if is_prose else None
            if cut is not None:
                cut += origin
                todo += ((start, cut, True), (cut, end, True))
            elif (cut := in_formula.nearest(start, end)) is not None:
                if is_prose:
                    fresh.append((start, cut))
                else:
                    todo.append((start, cut, False))
                todo.append((cut, end, False))
            else:
                continue
            cuts.append(cut)
    return cuts
