"""maj@k: how often the most frequent of k answers is right. Exact, over all subsets of k of the n samples.

Samples with one canonical answer vote together. Answers that tie share the vote: the score is the expectation under a fair draw among them.
A sample without an answer abstains; only when every one of the k abstains is the vote empty, and then it is worth what those samples got
(0 for a missing answer).
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np


def maj_at_k(answers: Sequence[str | None], correct: Sequence[float], k: int) -> float:
    """Expected score of the majority answer of ``k`` of the samples, drawn without replacement; NaN for fewer than ``k`` samples.

    Args:
        answers: canonical answer of each sample; None abstains.
        correct: score of each sample in [0, 1]. An answer is worth the mean score of the samples that gave it.
    """
    if len(answers) < k:
        return float("nan")
    votes, worth = Counter(answers), Counter()
    for answer, score in zip(answers, correct, strict=True):
        worth[answer] += score
    abstaining = votes.pop(None, 0)
    rivals = tuple(sorted(votes.values()))
    score = sum(worth[answer] / count * win_probability(count, rivals, abstaining, k) for answer, count in votes.items() if worth[answer])
    if abstaining >= k:
        score += worth[None] / abstaining * math.comb(abstaining, k) / math.comb(len(answers), k)
    return float(score)


@functools.lru_cache(maxsize=1 << 16)
def win_probability(count: int, counts: tuple[int, ...], abstaining: int, k: int) -> float:
    """Probability that an answer which ``count`` samples gave wins the vote of ``k``; ties are shared.

    Args:
        counts: votes of all answers, this one included (once).
        abstaining: samples without an answer.

    A draw of k without replacement is a set of independent binomials given that they sum to k, so each answer is a polynomial in x (its
    drawn votes) and the x^k coefficient of a product counts the draws. With j votes for this answer, rivals of fewer than j samples cannot
    reach it and are merged with the abstaining; of the others those with exactly j tie. Marking each tie with y, sharing among t + 1 winners
    is the integral of y^t over [0, 1], which Gauss-Legendre nodes give exactly.
    """
    others = list(counts)
    others.remove(count)
    total = sum(counts) + abstaining
    share, probability = k / total, 0.0
    for j in range(1, min(count, k) + 1):
        contenders = [size for size in others if size >= j]
        most_ties = min(len(contenders), k // j - 1)
        nodes, weights = np.polynomial.legendre.leggauss(most_ties // 2 + 1)
        nodes, weights = (nodes + 1) / 2, weights / 2
        rest = k - j
        spectators = binomial(total - count - sum(contenders), share)[: rest + 1]
        product = np.zeros((len(nodes), rest + 1))
        product[:, : len(spectators)] = spectators
        for size in contenders:
            terms = binomial(size, share)
            grown = np.zeros_like(product)
            for drawn in range(min(j, rest) + 1):
                factor = terms[drawn] * (nodes[:, None] if drawn == j else 1.0)
                grown[:, drawn:] += factor * product[:, : rest + 1 - drawn]
            product = grown
        probability += binomial(count, share)[j] * float(weights @ product[:, rest])
    return probability / binomial(total, share)[k]


@functools.lru_cache(maxsize=4096)
def binomial(trials: int, share: float) -> np.ndarray:
    """Probabilities [trials + 1] of 0 ... ``trials`` successes."""
    if share >= 1.0:
        return np.eye(trials + 1)[trials]
    ways = [math.lgamma(trials + 1) - math.lgamma(hits + 1) - math.lgamma(trials - hits + 1) for hits in range(trials + 1)]
    hits = np.arange(trials + 1)
    return np.exp(np.array(ways) + hits * math.log(share) + (trials - hits) * math.log1p(-share))
