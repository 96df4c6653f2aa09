"""What a set of comparisons amounts to: a win rate with its bootstrap interval, and ratings on the Elo scale.

A comparison's score is 1 where the first of two models won, 0 where it lost, 0.5 for a tie. The ratings are those of
Bradley and Terry (Biometrika 39, 1952): P(i beats j) = 1 / (1 + 10^((r_j - r_i) / 400)), fitted to all comparisons at
once, so that, unlike Elo's running update, they do not depend on the order of the games.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
_SCALE = 400 / np.log(10)  # Elo points per unit of log-odds


def win_rate(scores: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """The mean of scores 0, 0.5 and 1, and the bounds of its 95% bootstrap interval (percentiles).

    Drawing n scores with replacement is drawing how often each of the three values comes, which is done here.
    Raises ValueError for no scores.
    """
    if not len(scores):
        raise ValueError("a win rate needs at least one score")
    values = np.array([0.0, 0.5, 1.0])
    counts = np.array([list(scores).count(value) for value in values])
    drawn = np.random.default_rng(seed).multinomial(len(scores), counts / len(scores), RESAMPLES) @ values
    low, high = np.percentile(drawn / len(scores), [2.5, 97.5])
    return float(np.mean(scores)), float(low), float(high)


def ratings(points: np.ndarray) -> np.ndarray:
    """Elo ratings (k,) with mean 1000 of the points (k, k) or (batch, k, k): [i, j] is what i scored against j.

    Each pair is given one tie more than it played, without which a model that never lost would be infinitely good.
    """
    k = points.shape[-1]
    won = points + 0.5 * (1 - np.eye(k))
    games = won + np.swapaxes(won, -1, -2)
    r = np.zeros(won.shape[:-1])
    for _ in range(50):  # Newton's method; the log-likelihood is concave
        p = 1 / (1 + np.exp(r[..., None, :] - r[..., :, None]))  # that the row beats the column
        gradient = (won - games * p).sum(-1)
        weights = games * p * (1 - p)
        # The ones fix the mean, which the comparisons leave open.
        curvature = np.eye(k) * weights.sum(-1)[..., None] - weights + np.ones((k, k))
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        r = r + np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-10:
            break
    return 1000 + _SCALE * (r - r.mean(-1, keepdims=True))


def rating_table(
    k: int, comparisons: Sequence[tuple[int, int, int, float]], resamples: int = 1000, seed: int = 0
) -> list[tuple[float, float, float]]:
    """The rating of each of k models, with its 95% bootstrap interval over the prompts.

    comparisons: (prompt, i, j, the score of i against j). A resample draws prompts, each with all of its comparisons,
    since an odd prompt is odd for everybody.
    """
    prompts = sorted({prompt for prompt, *_ in comparisons})
    place = {prompt: at for at, prompt in enumerate(prompts)}
    points = np.zeros((len(prompts), k, k))
    for prompt, i, j, score in comparisons:
        points[place[prompt], i, j] += score
        points[place[prompt], j, i] += 1 - score
    best = ratings(points.sum(0))
    n = len(prompts)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples)  # how often each prompt comes
    found = ratings(np.einsum("rn,nij->rij", drawn, points))
    low, high = np.percentile(found, [2.5, 97.5], axis=0)
    return [(float(a), float(b), float(c)) for a, b, c in zip(best, low, high, strict=True)]
