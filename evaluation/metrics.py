"""Measures of text as token ids. Every function takes ids `(B, T)` and says what it returns.

Sources: distinct-n (Li et al. 2016), rep-n (Welleck et al. 2020), self-BLEU (Zhu et al. 2018),
BrierLM (CALM, Shao et al. 2025).
"""

import numpy as np
from sacrebleu.metrics import BLEU


def unigram_entropy(ids: np.ndarray) -> float:
    """Entropy in nats of the token frequencies of `ids`, of any shape."""
    counts = np.unique(ids, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def sample_entropy(ids: np.ndarray) -> float:
    """Mean over samples of the unigram entropy within one sample `(T,)`; nats, at most log T."""
    return float(np.mean([unigram_entropy(row) for row in ids]))


def ngram_keys(ids: np.ndarray, n: int) -> np.ndarray:
    """One 64-bit key per n-gram: `(..., T)` -> `(..., T - n + 1)`; equal n-grams have equal keys.

    A polynomial hash modulo 2^64: two different n-grams of a corpus of 10 M share a key with
    probability 3e-6.
    """
    ids = np.asarray(ids).astype(np.uint64)
    keys = np.zeros((*ids.shape[:-1], max(0, ids.shape[-1] - n + 1)), np.uint64)
    with np.errstate(over="ignore"):
        for i in range(n):  # the mixing steps of splitmix64, so that close ids have distant keys
            # + 1, since 0 times anything is 0 and id 0 would leave no trace
            mixed = (ids[..., i : i + keys.shape[-1]] + np.uint64(1)) * np.uint64(
                0x9E3779B97F4A7C15
            )
            # multiplied at every step, so the order of tokens matters
            keys = (keys ^ (mixed ^ (mixed >> np.uint64(29)))) * np.uint64(0xBF58476D1CE4E5B9)
            keys ^= keys >> np.uint64(32)
    return keys


def distinct_n(ids: np.ndarray, n: int) -> float:
    """Different n-grams divided by all n-grams of all samples."""
    keys = ngram_keys(ids, n)  # (B, T - n + 1)
    return float(len(np.unique(keys)) / keys.size)


def repetition(ids: np.ndarray, n: int = 4) -> float:
    """rep-n: share of a sample's n-grams that stood in it before; mean over samples."""
    keys = ngram_keys(ids, n)
    return float(np.mean([1 - len(np.unique(row)) / len(row) for row in keys]))


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` rows, evenly spaced. The first rows would all be from one document, because
    windows are in the order of the text."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


def self_bleu(ids: np.ndarray, count: int = 100) -> float:
    """BLEU-4 in [0, 1] of each of `count` samples against the others. High means that samples are
    similar."""
    texts = [" ".join(map(str, row)) for row in spread(ids, count).tolist()]
    bleu = BLEU(tokenize="none", effective_order=True)  # tokens are ids already
    scores = [
        bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)
    ]
    return float(np.mean(scores) / 100)


class TrainingNgrams:
    """The n-grams of the training text, to find those of a sample that occur in it."""

    def __init__(self, tokens: np.ndarray):
        self.tokens = tokens
        self.sets = {}  # sorted keys of the training text by n, made when first asked for

    def seen(self, ids: np.ndarray, n: int) -> np.ndarray:
        """Which n-grams of `ids (B, T)` occur in the training text, `(B, T - n + 1)` bool."""
        if n not in self.sets:
            self.sets[n] = np.unique(ngram_keys(self.tokens, n))
        return np.isin(ngram_keys(ids, n), self.sets[n])

    def overlap(self, ids: np.ndarray, n: int = 8) -> float:
        """Share of the n-grams of `ids` that occur in the training text."""
        return float(self.seen(ids, n).mean())

    def chunks_seen(self, ids: np.ndarray, size: int) -> tuple[float, float]:
        """Share of K-grams seen in training, at chunk boundaries (on-grid) and across them
        (off-grid)."""
        seen = self.seen(ids, size)  # (B, T - K + 1)
        on_grid = np.arange(seen.shape[1]) % size == 0
        # with chunks of one token everything is on the grid
        across = float(seen[:, ~on_grid].mean()) if size > 1 else float("nan")
        return float(seen[:, on_grid].mean()), across

    def longest(self, ids: np.ndarray) -> int:
        """Length of the longest n-gram of any sample that occurs in the training text.

        Bisection works because all parts of such an n-gram occur too.
        """
        low = 0
        high = min(ids.shape[1], len(self.tokens))
        while low < high:
            # rounded up, or `low` would never reach `high`
            n = (low + high + 1) // 2
            found = np.isin(ngram_keys(ids, n), ngram_keys(self.tokens, n)).any()
            low, high = (n, high) if found else (low, n - 1)
        return low


def brier_lm(first: np.ndarray, second: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """BrierLM, times 100, from two independent samples and the real continuation, `(B, >= 4)` each.

    Brier-n takes the first n tokens as one event. It is the mean of
    `1{x1 = y} + 1{x2 = y} - 1{x1 = x2}`, an unbiased estimate of `2 p(y) - sum_x p(x)^2`, which is
    at most 1 and largest for the true distribution. BrierLM is the geometric mean over n = 1..4,
    or 0 if one of them is not positive.
    """
    results = {}
    values = []
    for n in range(1, 5):
        a = first[:, :n]
        b = second[:, :n]
        y = real[:, :n]
        hits = (a == y).all(1).astype(float) + (b == y).all(1) - (a == b).all(1)  # (B,)
        values.append(100 * float(hits.mean()))
        results[f"brier_{n}"] = values[-1]
    results["brier_lm"] = float(np.prod(values) ** 0.25) if min(values) > 0 else 0.0
    return results


def bootstrap_interval(values: np.ndarray, seed: int = 0, draws: int = 1000) -> tuple[float, float]:
    """95 % interval of the mean of independent `values (B,)`, by resampling them."""
    values = np.asarray(values, dtype=float)
    # with replacement: each draw is a sample of the same size from the sample
    means = np.random.default_rng(seed).choice(values, (draws, len(values))).mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))
