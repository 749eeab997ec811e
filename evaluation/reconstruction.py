"""What the codec keeps and what the denoiser knows: accuracy against latent noise, and CE(t)."""

import numpy as np
import torch
from tqdm.auto import tqdm

NOISE_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
TIMESTEPS = tuple(i / 10 for i in range(10))


@torch.no_grad()
def reconstruction_accuracy(codec, batches: list[torch.Tensor], seed: int, rare_ids: np.ndarray | None = None) -> dict:
    """Share of tokens and of whole chunks that survive encode -> noise -> decode.

    Noise is in standard deviations of the standardised latents. With shuffled latents a decoder that reads them, and is
    no language model of its own, fails. `rare_ids` are the ids whose accuracy is reported separately.
    """
    generator = torch.Generator().manual_seed(seed)
    size, results = codec.config.chunk_size, {}

    def accuracy(change, only: torch.Tensor | None = None) -> tuple[float, float]:
        hits = torch.cat([(codec.to_ids(change(codec.encode(ids).latents)) == ids).view(-1, size) for ids in batches])
        if only is None:
            return hits.float().mean().item(), hits.all(-1).float().mean().item()
        chosen = torch.cat([torch.isin(ids, only).view(-1, size) for ids in batches])
        return hits[chosen].float().mean().item(), float(chosen.sum())

    for level in tqdm(NOISE_LEVELS, desc="reconstruction", leave=False):
        noisy = accuracy(lambda x, s=level: x + s * torch.randn(x.shape, generator=generator).to(x))
        results[f"token_accuracy_noise_{level}"], results[f"chunk_accuracy_noise_{level}"] = noisy
    if rare_ids is not None:
        rare = torch.from_numpy(rare_ids.astype(np.int64)).to(batches[0].device)
        results["token_accuracy_rare"], results["rare_tokens"] = accuracy(lambda x: x, rare)
    order = torch.randperm(batches[0].shape[1] // size, generator=generator)
    results["token_accuracy_shuffled_latents"] = accuracy(lambda x: x[:, order])[0]
    return results


def rarest_ids(tokens: np.ndarray, share: float = 0.1) -> np.ndarray:
    """The ids of the rarest `share` of the vocabulary that occurs in `tokens (T,)`."""
    ids, counts = np.unique(tokens, return_counts=True)
    return ids[np.argsort(counts, kind="stable")][: max(1, int(share * len(ids)))]


@torch.no_grad()
def cross_entropy_at(model, batches: list[torch.Tensor], seed: int) -> dict[str, float]:
    """Nats per token of the denoiser's estimate at fixed t, every block given the clean text before it.

    At t = 0 also by place in the chunk: the first token follows known text, the others tokens not known yet.
    """
    results = {}
    for t in tqdm(TIMESTEPS, desc="denoiser", leave=False):
        torch.manual_seed(seed)
        outputs = [model(ids, timestep=t) for ids in batches]
        results[f"denoiser_ce_t_{t}"] = float(np.mean([o.ce_loss.item() for o in outputs]))
        if t == 0.0:
            places = torch.stack([o.token_losses.mean((0, 1)) for o in outputs]).mean(0)
            results |= {f"denoiser_ce_t_0.0_position_{k}": value for k, value in enumerate(places.tolist())}
    return results


@torch.no_grad()
def share_of_informative_draws(model, curve: dict[str, float], unigram: float, draws: int = 100_000) -> float:
    """Share of training's t that fall where CE(t) lies between 5 % and 95 % of the unigram entropy."""
    torch.manual_seed(0)
    t = model._sample_timestep((draws,), torch.device("cpu")).numpy()
    values = np.interp(t, TIMESTEPS, [curve[f"denoiser_ce_t_{t}"] for t in TIMESTEPS])
    return float(((values > 0.05 * unigram) & (values < 0.95 * unigram)).mean())


@torch.no_grad()
def prefers_true_continuation(model, prompts: torch.Tensor, real: torch.Tensor, seed: int, t: float = 0.2) -> float:
    """How often the denoiser's CE at `t` is lower for the real continuation `(B, L)` than for that of another prompt.

    Both get the same noise; 0.5 is chance. P and L are multiples of K.
    """
    others, losses = real.roll(1, dims=0), []
    places = real.shape[1] // model.config.codec_config.chunk_size
    for continuation in (real, others):
        torch.manual_seed(seed)
        rows = [
            model(torch.cat(pair, dim=1), timestep=t).token_losses[:, -places:].sum((1, 2))
            for pair in zip(prompts.split(64), continuation.split(64))
        ]
        losses.append(torch.cat(rows))
    return (losses[0] < losses[1]).float().mean().item()
