"""Measure codec and denoiser: accuracy against latent noise, and cross-entropy against t."""

import numpy as np
import torch
from tqdm.auto import tqdm

from tokcom.scheduling_tokcom import sample_times
from tokcom.training.precision import half_precision

NOISE_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)  # standard deviations of the latents
TIMESTEPS = tuple(i / 10 for i in range(10))  # t = 0 is noise
SIGNALS = (0.0, 0.25, 0.5, 0.75, 0.9)  # t of the channels, for `token_recovery`


@torch.no_grad()
def reconstruction_accuracy(
    codec, batches: list[torch.Tensor], seed: int, rare_ids: np.ndarray | None = None
) -> dict:
    """Share of tokens and of whole chunks that survive encode -> noise -> decode.

    Noise is in standard deviations of the standardised latents. Shuffled latents are a control: a
    decoder that reads its latents fails on them, a decoder that guesses from language does not. The
    accuracy of `rare_ids` is reported separately.
    """
    generator = torch.Generator().manual_seed(seed)
    size = codec.config.chunk_size
    results = {}

    def accuracy(change, only: torch.Tensor | None = None) -> tuple[float, float]:
        hits = []
        for ids in batches:
            found = codec.to_ids(change(codec.encode(ids).latents))  # (B, T)
            hits.append((found == ids).view(-1, size))
        hits = torch.cat(hits)  # (M, K)
        if only is None:
            return hits.float().mean().item(), hits.all(-1).float().mean().item()
        chosen = torch.cat([torch.isin(ids, only).view(-1, size) for ids in batches])  # (M, K)
        return hits[chosen].float().mean().item(), float(chosen.sum())

    for level in tqdm(NOISE_LEVELS, desc="reconstruction", leave=False):
        # noise of the host's generator, which gives the same numbers on every device
        noisy = accuracy(lambda x, s=level: x + s * torch.randn(x.shape, generator=generator).to(x))
        results[f"token_accuracy_noise_{level}"], results[f"chunk_accuracy_noise_{level}"] = noisy
    if rare_ids is not None:
        rare = torch.from_numpy(rare_ids.astype(np.int64)).to(batches[0].device)
        results["token_accuracy_rare"], results["rare_tokens"] = accuracy(lambda x: x, rare)
    # the same shuffle in every row: right latents at wrong places
    order = torch.randperm(batches[0].shape[1] // size, generator=generator)
    results["token_accuracy_shuffled_latents"] = accuracy(lambda x: x[:, order])[0]
    return results


def rarest_ids(tokens: np.ndarray, share: float = 0.1) -> np.ndarray:
    """The ids of the rarest `share` of the vocabulary that occurs in `tokens (T,)`."""
    ids, counts = np.unique(tokens, return_counts=True)
    # stable, so that ties are broken alike everywhere
    return ids[np.argsort(counts, kind="stable")][: max(1, int(share * len(ids)))]


@torch.no_grad()
def token_losses_at(
    model,
    ids: torch.Tensor,
    t: float,
    attention_mask: torch.Tensor | None = None,
    begins: bool = False,
) -> torch.Tensor:
    """Nats `(B, N, K)` of each token of `ids (B, T)` at time t, given the clean text before its
    block. The rows begin inside a text, or each `begins` one.

    With `token_stagger` the tokens of a chunk reach t one after the other. Each token is measured
    in its turn, given the ones before it, so t = 0 is an autoregressive likelihood.
    """
    head = model.token_head
    half = half_precision(ids.device.type)
    if head is None:
        with half:
            return model(ids, attention_mask, timestep=t).token_losses
    # The time of the latent at which token k has come t of its way: its turn begins stagger * k
    # turns after the first, and all turns together last 1 + stagger * (K - 1).
    times = [
        (t + head.stagger * k) / (1 + head.stagger * (head.num_symbols - 1))
        for k in range(head.num_symbols)
    ]
    starts = torch.full((len(ids),), begins, device=ids.device)
    with half:
        # a pass for each place of the chunk, of which only that place is kept
        losses = [
            model(ids, attention_mask, timestep=time, text_start=starts).token_losses[..., k]
            for k, time in enumerate(times)
        ]
    return torch.stack(losses, dim=-1)


@torch.no_grad()
def held_out_nll(model, windows: np.ndarray, skipped: int) -> float | None:
    """Nats per token of `windows (B, T)` of text, without their first `skipped` tokens.

    Exact if every token is drawn in a step of its own, that is with `token_stagger=1` and blocks of
    one latent; otherwise None.
    """
    head = model.token_head
    block_size = model.config.transformer_config.block_size
    turns = head is not None and (head.stagger == 1 or head.num_symbols == 1)
    if not turns or block_size != 1:
        return None
    # the forward pass draws noise: a seed makes the measurement repeatable
    torch.manual_seed(0)
    ids = torch.from_numpy(windows.astype(np.int64)).to(model.device)
    losses = [
        token_losses_at(model, part, 0.0)[:, skipped // head.num_symbols :] for part in ids.split(8)
    ]
    return torch.cat(losses).mean().item()


@torch.no_grad()
def cross_entropy_at(model, batches: list[torch.Tensor], seed: int) -> dict[str, float]:
    """Mean of `token_losses_at` over t; at t = 0, pure noise, also by place in the chunk."""
    results = {}
    for t in tqdm(TIMESTEPS, desc="denoiser", leave=False):
        # the same noise at every t, so that the curve is smooth
        torch.manual_seed(seed)
        places = [token_losses_at(model, ids, t).mean((0, 1)) for ids in batches]
        places = torch.stack(places).mean(0)  # (K,)
        results[f"denoiser_ce_t_{t}"] = places.mean().item()
        if t == 0.0:
            results |= {
                f"denoiser_ce_t_0.0_position_{k}": value for k, value in enumerate(places.tolist())
            }
    return results


@torch.no_grad()
def share_of_informative_draws(
    model, curve: dict[str, float], unigram: float, draws: int = 100_000
) -> float:
    """Share of training's t at which CE(t) lies between 5 % and 95 % of the unigram entropy."""
    torch.manual_seed(0)
    t = sample_times(model.config, torch.arange(draws)[None], 1).flatten().numpy()
    # beyond the last time the curve is taken to be flat
    values = np.interp(t, TIMESTEPS, [curve[f"denoiser_ce_t_{t}"] for t in TIMESTEPS])
    return float(((values > 0.05 * unigram) & (values < 0.95 * unigram)).mean())


@torch.no_grad()
def prefers_true_prompt(
    model, prompts: torch.Tensor, real: torch.Tensor, seed: int, t: float = 0.2
) -> float:
    """How often a real continuation `(B, L)` has a lower CE at `t` after its own prompt `(B, P)`
    than after another prompt.

    The scored text and its noise are the same in both cases. 0.5 is chance. P and L are multiples
    of K.
    """
    losses = []
    places = real.shape[1] // model.config.codec_config.chunk_size
    # half the batch away: neighbouring windows may be of one document
    for before in (prompts, prompts.roll(len(prompts) // 2, dims=0)):
        torch.manual_seed(seed)  # the same noise in both cases
        rows = [
            token_losses_at(model, torch.cat(pair, dim=1), t)[:, -places:].sum((1, 2))
            for pair in zip(before.split(64), real.split(64))
        ]
        losses.append(torch.cat(rows))
    return (losses[0] < losses[1]).float().mean().item()


@torch.no_grad()
def token_recovery(
    model, windows: np.ndarray, seed: int, batch_size: int = 8
) -> dict[str, dict[str, float]]:
    """Share of tokens of `windows (B, T)` recovered from x_t = (1 - t) x0 + t x1, for several t.

    `model` is one evaluation of a bidirectional model, `alone` decodes x_t itself. t is that of the
    channels, whatever the schedule.
    """
    generator = torch.Generator().manual_seed(seed)
    results = {}
    for t in tqdm(SIGNALS, desc="recovery", leave=False):
        hits = {"model": [], "alone": []}
        for ids in torch.from_numpy(windows.astype(np.int64)).split(batch_size):
            clean = model.encode(ids)  # latents (B, N, C)
            noise = torch.randn(clean.latents.shape, generator=generator) * model.config.noise_std
            noisy = (1 - t) * noise + t * clean.latents  # (B, N, C)
            hits["model"].append(estimated_ids(model, noisy, t, clean.position_ids) == ids)
            hits["alone"].append(model.to_ids(noisy) == ids)
        results[str(t)] = {
            name: torch.cat(rows).float().mean().item() for name, rows in hits.items()
        }
    return results


def estimated_ids(model, noisy: torch.Tensor, t: float, position_ids: torch.Tensor) -> torch.Tensor:
    """The most likely ids `(B, T)` of noisy latents `(B, N, C)` at t, all in one evaluation."""
    head = model.token_head
    if head is None:
        return model.to_ids(model.denoise(noisy, t, position_ids).latents)
    # the head counts in turns; this is the time at which the channels are at t
    time = torch.full(noisy.shape[:2], head.latent_time(t))  # (B, N)
    states = model.predict(noisy, time, position_ids).latents  # (B, N, K * D)
    chunks = head.most_likely(states, model.symbols(), noisy, head.place_times(time))  # (B, N, K)
    return model.codec.from_symbols(chunks)
