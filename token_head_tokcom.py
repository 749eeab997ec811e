"""The head of models that predict token probabilities: it reads noisy latents as uncertain tokens, and turns what the
network expects into losses, means and draws.

Notable choices: the likelihood of noisy channels is known exactly, so the network only predicts what it expects; the
vocabulary is computed for chosen tokens only, one place of the chunk at a time, and again in the backward pass.

Shape legend: B batch, N latents, K symbols of a chunk (tokens, for most codecs), C channels, E embedding, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

try:
    from .configuration_tokcom import TokComConfig
    from .layers_tokcom import CROSS_ENTROPY_CHUNK, TokComTokenEmbedding
except ImportError:
    if __package__:
        raise
    import configuration_tokcom as _configuration
    import layers_tokcom as _layers

    TokComConfig = _configuration.TokComConfig
    CROSS_ENTROPY_CHUNK, TokComTokenEmbedding = _layers.CROSS_ENTROPY_CHUNK, _layers.TokComTokenEmbedding

MIN_SIGMA = 0.05  # the likelihood of clean latents would be infinite
SMALL_VOCABULARY = 512  # so few symbols (digits, bits) are computed for all places of a chunk at once


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Set to 0 all but the fewest of `probabilities (R, V)` that sum to `top_p` (Holtzman et al. 2020)."""
    ordered, index = probabilities.sort(dim=-1, descending=True)
    ordered = ordered.where(ordered.cumsum(-1) - ordered < top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, index, ordered)


class TokComSymbols(NamedTuple):
    """What a codec's tokens look like: latents `table (K, V, C / K)`, half their squared `norms (K, V)`, and the embedding
    `frequent (E,)` of a token of which nothing is known."""

    table: torch.Tensor
    norms: torch.Tensor
    frequent: torch.Tensor


class TokComChoice(NamedTuple):
    """The tokens that `mask (B, N, K)` marks, sorted by place: how many at each, their chunks `where (R,)` and `places (R,)`.

    Making one waits for the device; the sampler makes it once for all blocks.
    """

    mask: torch.Tensor
    counts: list[int]
    where: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, mask: torch.Tensor) -> "TokComChoice":
        flat = mask.flatten(0, 1)
        places, where = flat.T.nonzero(as_tuple=True)
        return cls(mask, flat.sum(0).tolist(), where, places)


class TokComTokenHead(nn.Module):
    """Reads noisy latents as uncertain tokens, and turns what the network expects into token probabilities.

    Bayes' rule: p(token | x_t, rest) is p(token | rest), which the network predicts, times the likelihood
    N(x_t; t z, (1 - t)^2) of the token's own channels z in the codec's table, which is known. So the network learns
    language and not the geometry of the latents (score interpolation, CDCD, Dieleman et al. 2022, made exact).

    The places of a chunk have their own times: at the latent's time t, place k has progressed by
    `t (1 + s (K - 1)) - s k`, cut to [0, 1], with s = `token_stagger`; 0 denoises the tokens of a chunk together, 1 one
    after the other (AR-Diffusion, Wu et al. 2023). `token_shift` warps progress towards noise, like a sampling grid.
    """

    def __init__(self, config: TokComConfig):
        super().__init__()
        codec = config.codec_config
        self.num_symbols, self.noise_std = codec.num_symbols, config.noise_std
        self.stagger, self.shift = config.token_stagger, config.token_shift
        self.embedding = TokComTokenEmbedding(codec.symbol_vocab_size, config.token_embedding_size)
        self.bias = nn.Parameter(torch.zeros(codec.symbol_vocab_size))

    def progress(self, timestep: torch.Tensor) -> torch.Tensor:
        """Times of latents `(...)` -> how far each place has come, `(..., K)`; below 0 is not begun, above 1 is done."""
        places = torch.arange(self.num_symbols, device=timestep.device)
        return timestep[..., None] * (1 + self.stagger * (self.num_symbols - 1)) - self.stagger * places

    def place_times(self, timestep: torch.Tensor) -> torch.Tensor:
        """Times of latents `(...)` -> t of each place `(..., K)`: 0 is noise, 1 is clean."""
        left = 1 - self.progress(timestep).clamp(0, 1)
        return 1 - self.shift * left / (1 + (self.shift - 1) * left)

    def latent_time(self, t: float) -> float:
        """The time of a latent at which its places are at `t`, without `token_stagger`: the inverse of `place_times`."""
        return 1 - (1 - t) / (self.shift - (self.shift - 1) * (1 - t))

    def symbols(self, table: torch.Tensor) -> TokComSymbols:
        """What every call needs to know of the codec's `table (K, V, C / K)`."""
        weight, prior = self.embedding.weight, self.bias.detach().softmax(-1)
        frequent = F.linear(prior[None].to(weight.dtype), weight.T)[0]
        return TokComSymbols(table, 0.5 * table.square().sum(-1), frequent)

    def _rows(
        self, function: Callable, chosen: TokComChoice, symbols: TokComSymbols, latents, times, *extra
    ) -> torch.Tensor:
        """`function(log-likelihood (R, V), table, *extra rows)` of the `chosen` tokens.

        Args: `latents (B, N, C)`, `times (B, N, K)`, `extra` tensors `(B, N, K, ...)`. Works on some rows at a time, those of
        one place, whose table is `(V, C / K)`, or with a small vocabulary of any, with tables `(R, V, C / K)`; recomputes
        them in the backward pass. Returns `(B, N, K, ...)`, 0 elsewhere.
        """

        def piece(signal, latents, table, norms, *extra):
            with torch.autocast(latents.device.type, enabled=False):
                noise = (1 - signal).clamp_min(MIN_SIGMA) * self.noise_std
                inner = latents @ table.T if table.ndim == 2 else (table @ latents[..., None])[..., 0]
                likelihood = (signal * inner - signal.square() * norms) / noise.square()  # (R, V)
            return function(likelihood, table, *extra)

        size, results = self.num_symbols, []
        own = latents.float().unflatten(-1, (size, -1))  # (B, N, K, C / K)
        rows = [x.flatten(0, 1) for x in (times[..., None].float(), own, *extra)]
        run = partial(checkpoint, piece, use_reentrant=False) if torch.is_grad_enabled() else piece
        if symbols.table.shape[1] > SMALL_VOCABULARY:
            groups = zip(chosen.where.split(chosen.counts), range(size))
        else:
            groups = [(chosen.where, chosen.places)]
        for where, places in groups:
            several = isinstance(places, torch.Tensor)
            if not several and not len(where) and (results or places != size - 1):
                continue  # but an empty result says the shape if there is no other
            for part in torch.arange(len(where), device=where.device).split(CROSS_ENTROPY_CHUNK):
                row, place = where[part], places[part] if several else places
                signal, noisy, *more = (x[row, place] for x in rows)
                results.append(run(signal, noisy, symbols.table[place], symbols.norms[place], *more))
        values = torch.cat(results)
        whole = values.new_zeros(chosen.mask.numel(), *values.shape[1:])
        whole = whole.index_copy(0, chosen.where * size + chosen.places, values)
        return whole.view(*chosen.mask.shape, *values.shape[1:])

    def read(
        self,
        symbols: TokComSymbols,
        latents: torch.Tensor,
        times: torch.Tensor,
        chunks: torch.Tensor | None = None,
        uncertain: TokComChoice | None = None,
    ) -> torch.Tensor:
        """Mean token embeddings `(B, N, K * E)` given each token's own noisy channels and its frequency.

        `times (B, N, K)` are those of the places. If they are known, `chunks (B, N, K)` are the ids of what is clean already,
        and `uncertain` the tokens that are neither clean nor pure noise.
        """
        weight, prior = self.embedding.weight, self.bias.detach()

        def mean(likelihood: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            return F.linear((likelihood + prior).softmax(-1).to(weight.dtype), weight.T)

        if chunks is None:
            chunks = self.recognise(symbols, latents, times)
        embeddings = self.embedding(chunks)  # (B, N, K, E)
        embeddings = torch.where((times == 1)[..., None], embeddings, symbols.frequent.to(embeddings.dtype))
        if uncertain is None:
            uncertain = TokComChoice.of((times > 0) & (times < 1))
        if any(uncertain.counts):
            means = self._rows(mean, uncertain, symbols, latents, times).to(embeddings.dtype)
            embeddings = torch.where(uncertain.mask[..., None], means, embeddings)
        return embeddings.flatten(2) * weight.shape[1] ** 0.5

    def nll(self, states, symbols: TokComSymbols, latents, times, chunks, chosen: TokComChoice) -> torch.Tensor:
        """Nats per token `(B, N, K)` of the `chosen` among ids `chunks (B, N, K)`; `states (B, N, K * E)` is what the
        network expects."""

        def loss(likelihood: torch.Tensor, table: torch.Tensor, states: torch.Tensor, ids: torch.Tensor):
            return F.cross_entropy(self._logits(states) + likelihood, ids, reduction="none")

        states = states.unflatten(-1, (self.num_symbols, -1))
        return self._rows(loss, chosen, symbols, latents, times, states, chunks)

    def mean_latents(self, states, symbols: TokComSymbols, latents, times) -> torch.Tensor:
        """E[x1 | x_t] `(B, N, C)`; tokens that are clean stay as they are."""

        def mean(likelihood: torch.Tensor, table: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
            probabilities = (self._logits(states) + likelihood).softmax(-1)  # (R, V)
            return probabilities @ table if table.ndim == 2 else (probabilities[:, None] @ table)[:, 0]

        states = states.unflatten(-1, (self.num_symbols, -1))
        values = self._rows(mean, TokComChoice.of(times < 1), symbols, latents, times, states)  # (B, N, K, C / K)
        return torch.where((times == 1)[..., None], latents.float().view(values.shape), values).flatten(2)

    def draw(
        self, states, symbols: TokComSymbols, latents, times, chosen: TokComChoice, uniform, temperature=1.0, top_p=1.0
    ) -> torch.Tensor:
        """Draw the `chosen` tokens with `uniform (B, N, K)` numbers in [0, 1); returns ids `(B, N, K)`.

        `temperature` divides what the network expects, not the likelihood; `top_p` cuts the result to its nucleus.
        """

        def ids(likelihood: torch.Tensor, table: torch.Tensor, states: torch.Tensor, uniform: torch.Tensor):
            probabilities = (self._logits(states) / temperature + likelihood).softmax(-1)  # (R, V)
            if top_p < 1:
                probabilities = nucleus(probabilities, top_p)
            edges = probabilities.cumsum(-1)
            drawn = torch.searchsorted(edges, uniform[:, None] * edges[:, -1:], right=True)[:, 0]
            return drawn.clamp_max(table.shape[-2] - 1)

        states = states.unflatten(-1, (self.num_symbols, -1))
        return self._rows(ids, chosen, symbols, latents, times, states, uniform)

    def most_likely(self, states, symbols: TokComSymbols, latents, times) -> torch.Tensor:
        """The most likely ids `(B, N, K)` of all tokens."""

        def ids(likelihood: torch.Tensor, table: torch.Tensor, states: torch.Tensor):
            return (self._logits(states) + likelihood).argmax(-1)

        everywhere = TokComChoice.of(torch.ones_like(times, dtype=torch.bool))
        return self._rows(ids, everywhere, symbols, latents, times, states.unflatten(-1, (self.num_symbols, -1)))

    def latents_of(self, symbols: TokComSymbols, ids: torch.Tensor) -> torch.Tensor:
        """Ids `(B, N, K)` -> their clean latents `(B, N, C)`."""
        return symbols.table[torch.arange(self.num_symbols, device=ids.device), ids].flatten(2)

    def recognise(self, symbols: TokComSymbols, latents: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Ids `(B, N, K)` of the tokens that are clean, the others 0."""
        clean = TokComChoice.of(times == 1)
        return self._rows(lambda likelihood, table: likelihood.argmax(-1), clean, symbols, latents, times)

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        return F.linear(states, self.embedding.weight, self.bias.to(states.dtype)).float()


__all__ = ["TokComTokenHead", "TokComChoice", "TokComSymbols", "nucleus"]
