"""The evaluation protocol of text models: controls, unconditional samples, continuations, the
entropy frontier, memorisation, latency.

Every function returns plain dictionaries for `results.json`. A `system` is a name and a sampler.
The controls are real text and three ways to fake it.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from tokcom.evaluation.judges import TextJudge, TokenJudge, token_nll
from tokcom.evaluation.metrics import (
    TrainingNgrams,
    bootstrap_interval,
    brier_lm,
    distinct_n,
    repetition,
    sample_entropy,
    self_bleu,
    spread,
)
from tokcom.evaluation.reconstruction import held_out_nll
from tokcom.evaluation.samplers import TokComSampler

PROMPT = 32  # tokens
CONTINUATION = 64  # tokens
LATENCY_BATCHES = (1, 32)  # texts that are written together
BRIER_PROMPT = 32  # tokens


@dataclass
class Study:
    """Texts, judges and sizes, which every measurement needs.

    Args:
        train, held_out (`np.ndarray` of shape `(T,)`): token ids.
        decode (`Callable`): ids `(T,)` -> text.
        token_judge (`TokenJudge`): scores token ids.
        text_judges (`dict[str, TextJudge]`): score plain text, by name.
        chunk_size (`int`): K.
        length (`int`): tokens of an unconditional sample.
        samples (`int`), seeds (`int`): samples per seed, and number of seeds.
    """

    train: np.ndarray
    held_out: np.ndarray
    decode: object
    token_judge: TokenJudge
    text_judges: dict[str, TextJudge]
    chunk_size: int
    length: int = 128
    samples: int = 1000
    seeds: int = 3
    text_judge_samples: int = 100

    def __post_init__(self):
        self.ngrams = TrainingNgrams(self.train)

    def windows(self, length: int, count: int) -> np.ndarray:
        return held_out_windows(self.held_out, length, count)


def held_out_windows(tokens: np.ndarray, length: int, count: int) -> np.ndarray:
    """At most `count` windows of `tokens (T,)`, `(count, length)`, evenly spaced, no overlap.

    Raises `ValueError` if there is not even one.
    """
    if len(tokens) < length:
        raise ValueError(
            f"the held-out text has {len(tokens)} tokens, but a window has {length}; give more "
            "text, or a smaller length."
        )
    starts = np.linspace(0, len(tokens) - length, min(count, len(tokens) // length)).astype(int)
    return tokens[starts[:, None] + np.arange(length)]  # (count, length)


def nll_by_place(nll: np.ndarray, chunk_size: int) -> list[float]:
    """Mean of `nll (B, T)` at each place of the chunk; an incomplete last chunk is left out."""
    whole = nll[:, : nll.shape[1] // chunk_size * chunk_size]
    # (B, chunks, K); NaN is the first token of a text without a prompt
    return np.nanmean(whole.reshape(len(nll), -1, chunk_size), axis=(0, 1)).tolist()


def measure_setting(
    judge: TokenJudge, prompts: np.ndarray, setting: str, sampler, chunk_size: int
) -> dict:
    """One point of the frontier: NLL of continuations, also by place in the chunk, and entropy."""
    # one seed for all settings, so that a frontier is not made of luck
    ids = sampler.sample(prompts, CONTINUATION, seed=0)  # (B, 64)
    nll = judge.nll(ids, prompts)  # (B, 64)
    facts = {"setting": setting, "nll": float(nll.mean()), "entropy": sample_entropy(ids)}
    return facts | {"nll_by_place": nll_by_place(nll, chunk_size)}


def control_texts(study: Study, length: int, count: int, seed: int) -> dict[str, np.ndarray]:
    """Real held-out text, the same with shuffled tokens, random training chunks, and a repeated
    phrase."""
    generator = np.random.default_rng(seed)
    real = study.windows(length, count)  # (B, length)
    size = study.chunk_size
    count = len(real)
    starts = generator.integers(0, len(study.train) - size, (count, -(-length // size)))
    # fluent inside a chunk and senseless across: what a model of chunks alone would write
    # (B, length)
    chunks = study.train[starts[..., None] + np.arange(size)].reshape(count, -1)[:, :length]
    # a low NLL without any content, which the entropy beside it gives away
    phrase = np.tile(real[:, :8], (1, -(-length // 8)))[:, :length]
    return {
        "real text": real,
        # the right frequencies in the wrong order
        "shuffled tokens": generator.permuted(real, axis=1),
        "random training chunks": chunks,
        "repeated phrase": phrase,
    }


def describe(study: Study, ids: np.ndarray, prompts: np.ndarray | None = None) -> dict:
    """All measures of one set of samples `(B, T)`, which may continue `prompts (B, P)`."""
    nll = study.token_judge.nll(ids, prompts)  # (B, T)
    per_sample = np.nanmean(nll, axis=1)  # tokens of one sample are not independent, samples are
    low, high = bootstrap_interval(per_sample)
    on_grid, off_grid = study.ngrams.chunks_seen(ids, study.chunk_size)
    facts = {
        "nll": float(per_sample.mean()),
        "nll_interval": [low, high],
        "ppl": float(np.exp(per_sample.mean())),
        "nll_by_place": nll_by_place(nll, study.chunk_size),
        "entropy": sample_entropy(ids),
        **{f"distinct_{n}": distinct_n(ids, n) for n in (1, 2, 3)},
        "rep_4": repetition(ids, 4),
        "self_bleu_4": self_bleu(ids),
        "chunks_seen_on_grid": on_grid,
        "chunks_seen_off_grid": off_grid,
    }
    # judges of text read one at a time and are slow, so they read fewer
    texts = [study.decode(row) for row in spread(ids, study.text_judge_samples)]
    before = None
    if prompts is not None:
        before = [study.decode(row) for row in spread(prompts, study.text_judge_samples)]
    for name, judge in study.text_judges.items():
        nats = judge.nats_per_character(texts, before)
        facts[f"nats_per_character_{name}"] = float(np.nanmean(nats))
    return facts


def over_seeds(runs: list[dict]) -> dict:
    """Means over seeds of `describe` results, with the standard deviation of `nll`, `entropy` and
    `rep_4`."""
    # axis 0, since some values are lists, such as those by place
    mean = {key: np.mean([run[key] for run in runs], axis=0).tolist() for key in runs[0]}
    spread = {
        f"{key}_std_over_seeds": float(np.std([run[key] for run in runs]))
        for key in ("nll", "entropy", "rep_4")
    }
    return mean | (spread if len(runs) > 1 else {})


def unconditional(study: Study, systems: dict) -> dict:
    """Unconditional samples, and controls of the same size: `{name: describe(...)}`."""
    controls = control_texts(study, study.length, study.samples, 0)
    # the scale on which the systems are read: what real and faked text would get
    results = {name: describe(study, ids) for name, ids in controls.items()}
    # there may be less held-out text than samples were asked for
    count = len(controls["real text"])
    for name, sampler in systems.items():
        runs = []
        for seed in tqdm(range(study.seeds), desc=f"unconditional: {name}"):
            runs.append(describe(study, sampler.sample(None, study.length, seed, count)))
        results[name] = over_seeds(runs)
    return results


def continuation(study: Study, systems: dict) -> dict:
    """Continue held-out prompts of 32 tokens by 64, and also prompts of 33..35 tokens, whose last
    chunk is incomplete."""
    windows = study.windows(PROMPT + CONTINUATION, study.samples)  # (B, 32 + 64)
    prompts = windows[:, :PROMPT]
    real = windows[:, PROMPT:]
    controls = {
        "real text": real,
        "shuffled tokens": np.random.default_rng(0).permuted(real, axis=1),
    }
    controls["random training chunks"] = control_texts(study, CONTINUATION, len(real), 0)[
        "random training chunks"
    ]
    # the end of the prompt again and again, which a judge finds easy
    controls["repeated phrase"] = np.tile(prompts[:, -8:], (1, CONTINUATION // 8))
    results = {name: describe(study, ids, prompts) for name, ids in controls.items()}
    for name, sampler in systems.items():
        runs = [
            describe(study, sampler.sample(prompts, CONTINUATION, seed), prompts)
            for seed in tqdm(range(study.seeds), desc=f"continuation: {name}")
        ]
        results[name] = over_seeds(runs)
        # every place in a chunk at which a prompt can end
        for extra in range(1, study.chunk_size):
            odd = study.windows(PROMPT + extra, study.samples)
            ids = sampler.sample(odd, CONTINUATION, 0)
            results[name][f"nll_prompt_plus_{extra}"] = float(
                study.token_judge.nll(ids, odd).mean()
            )
    return results


def frontier(study: Study, make_sampler: dict, count: int) -> dict:
    """NLL of continuations against entropy over sampling settings, and interpolated at the entropy
    of real text.

    Args:
        make_sampler (`dict`): the name of a system -> `{setting: sampler}`.
        count (`int`): prompts.

    Returns: `{name: {"points": [...], "nll_at_real_entropy": ..., "setting_at_real_entropy": ...}}`
    """
    windows = study.windows(PROMPT + CONTINUATION, count)
    prompts = windows[:, :PROMPT]
    real = windows[:, PROMPT:]
    # NLL alone rewards repetition, so systems are compared where they are as diverse as real text
    target = sample_entropy(real)
    results = {
        "real text": {"entropy": target, "nll": float(study.token_judge.nll(real, prompts).mean())}
    }
    for name, settings in make_sampler.items():
        points = [
            measure_setting(study.token_judge, prompts, setting, sampler, study.chunk_size)
            for setting, sampler in tqdm(settings.items(), desc=f"frontier: {name}")
        ]
        nearest = min(points, key=lambda p: abs(p["entropy"] - target))
        results[name] = {"points": points, "setting_at_real_entropy": nearest["setting"]}
        results[name]["nll_at_real_entropy"] = at_entropy(points, target)
    return results


def at_entropy(points: list[dict], target: float) -> float | None:
    """The lowest NLL of any sweep at entropy `target`, by linear interpolation.

    A sweep consists of the settings whose names start with the same word, such as
    "temperature 0.9". None if no sweep encloses the target.
    """
    sweeps = {}
    for point in sorted(points, key=lambda p: p["entropy"]):
        # points of different sweeps lie on different curves, between which nothing can be
        # interpolated
        sweeps.setdefault(point["setting"].split()[0], []).append(point)
    found = []
    for sweep in sweeps.values():
        for low, high in zip(sweep, sweep[1:]):
            if low["entropy"] <= target <= high["entropy"] and low["entropy"] < high["entropy"]:
                share = (target - low["entropy"]) / (high["entropy"] - low["entropy"])
                found.append(low["nll"] + share * (high["nll"] - low["nll"]))
    return min(found, default=None)


def brier(study: Study, systems: dict, count: int) -> dict:
    """BrierLM of the four tokens after `count` held-out prompts of 32 tokens."""
    windows = study.windows(BRIER_PROMPT + 4, count)  # (B, 32 + 4)
    prompts = windows[:, :BRIER_PROMPT]
    real = windows[:, BRIER_PROMPT:]
    results = {}
    for name, sampler in systems.items():
        # two independent samples make the estimate unbiased
        first, second = (sampler.sample(prompts, 4, seed) for seed in (101, 102))
        results[name] = brier_lm(first, second, real) | {"prompts": len(prompts)}
    return results


def likelihood(
    study: Study, systems: dict, windows: int = 48, length: int = 512, skipped: int = 32
) -> dict:
    """Nats per token of held-out text under each system's own probabilities.

    Scores `windows` windows without their first `skipped` tokens. None for a TokCom model that
    draws several tokens in one step, because its likelihood is not known. Windows are shorter if
    that of a TokCom model is.
    """
    for sampler in systems.values():
        if isinstance(sampler, TokComSampler):
            chunk = sampler.pipe.chunk_size
            length = min(length, sampler.pipe.max_length // chunk * chunk)
    ids = study.windows(length, windows)  # (windows, length)
    results = {}
    for name, sampler in systems.items():
        if isinstance(sampler, TokComSampler):
            nll = held_out_nll(sampler.pipe.model, ids, skipped)
        else:
            # 8 rows of 512 tokens: logits over the vocabulary take the most memory
            nll = float(token_nll(sampler.model, ids, batch_size=8)[:, skipped:].mean())
        results[name] = {"own_nll": nll}
    return results


def memorisation(study: Study, systems: dict) -> dict:
    """8-gram overlap with the training text and longest shared n-gram, also of held-out text of the
    same size."""
    results = {}
    # what any text of this kind shares with the training text by chance
    samples = {"real text": study.windows(study.length, study.samples)}
    for name, sampler in systems.items():
        # as many as of real text: more of them would find longer matches by chance
        samples[name] = sampler.sample(None, study.length, 0, len(samples["real text"]))
    for name, ids in samples.items():
        results[name] = {
            "overlap_8": study.ngrams.overlap(ids, 8),
            "longest": study.ngrams.longest(ids),
        }
    return results


def latency(
    prompts: np.ndarray, systems: dict, batches=LATENCY_BATCHES, length: int = 64, repeats: int = 20
) -> dict:
    """Milliseconds per generated token behind the first of `prompts (B, P)`: median of `repeats`
    after 3 warm-ups, in turn."""
    results = {name: {} for name in systems}
    for batch in batches:
        times = {name: [] for name in systems}
        # systems take turns, so that a machine that slows down does not slow one alone
        for repeat in tqdm(range(repeats + 3), desc=f"latency: batch {batch}"):
            for name, sampler in systems.items():
                started = time.perf_counter()
                sampler.sample(prompts[:batch], length, repeat)
                # kernels are only queued; wait until they are done
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times[name].append(1000 * (time.perf_counter() - started) / (length * batch))
        for name in systems:
            results[name][f"ms_per_token_batch_{batch}"] = float(np.median(times[name][3:]))
    return results
