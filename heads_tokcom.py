"""Heads: networks between the transformer and what is predicted.

The token head reads noisy latents as uncertain tokens and turns network states into token
probabilities. A latent head refines the estimates of a model that regresses latents.

Notable choices:
- The likelihood of noisy channels is known exactly (Bayes' rule), so the network only predicts what
  it expects.
- The likelihood of all tokens is one matrix product, `[s x / n^2, s^2 / n^2] @ [table, -norms]^T`.
- Tokens whose channels are pure noise have a constant likelihood, which is never computed.
- Sampling reads embeddings from one scaled table, which training makes anew for their gradient.
- The training loss computes its gradient on the way forward: logits exist once, a few rows at a
  time.
- What a latent head makes of an estimate is what is decoded, so training and sampling take the same
  path; every part of it starts as the identity, a codebook until it has seen its first batch.

Shape legend: B batch, N latents, K symbols of a chunk (tokens, for most codecs), C channels, E
embedding, V vocabulary, R rows: the tokens that a call works on.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .layers_tokcom import CROSS_ENTROPY_CHUNK, TokComTokenEmbedding
from .quantization_tokcom import VectorQuantizer

MIN_SIGMA = 0.05  # the likelihood of clean latents would be infinite
# so few symbols (digits, bits) are computed for all places of a chunk at once
SMALL_VOCABULARY = 512


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Set to 0 all but the fewest of `probabilities (R, V)` that sum to `top_p` (Holtzman et al.
    2020)."""
    ordered, index = probabilities.sort(dim=-1, descending=True)  # (R, V) each
    # a token stays if those before it sum to less than `top_p`, so at least one stays
    ordered = ordered.where(ordered.cumsum(-1) - ordered < top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, index, ordered)


def draw_ids(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first ids whose cumulative `probabilities (..., V)` exceed `uniform (...)` numbers."""
    edges = probabilities.cumsum(-1)  # (..., V)
    # just below the sum, so that rounding never selects what has no probability
    total = edges[..., -1:].nextafter(edges.new_zeros(()))
    wanted = torch.minimum(uniform[..., None] * edges[..., -1:], total)
    drawn = torch.searchsorted(edges, wanted, right=True)
    # NaN lies beyond every edge; the sampler refuses it once the block is done
    return drawn[..., 0].clamp_max(edges.shape[-1] - 1)


class TokComSymbols(NamedTuple):
    """What a codec's tokens look like.

    `table (K, V, C / K)` holds their latents, `columns (K, V, C / K + 1)` the same followed by
    minus half their squared norms, in float32, and `frequent (E,)` is the embedding of a token of
    which nothing is known. `embeddings (V + 1, E)` are what `read` looks up, those of all tokens
    and that one; None where a gradient is needed.
    """

    table: torch.Tensor
    columns: torch.Tensor
    frequent: torch.Tensor
    embeddings: torch.Tensor | None


class TokComChoice(NamedTuple):
    """The tokens that `mask (B, N, K)` marks, sorted by place: how many at each, and their flat
    `index (R,)`.

    Making one waits for the device; the sampler makes it once for all blocks. Tokens that are
    `blank` are all pure noise.
    """

    mask: torch.Tensor
    counts: list[int]
    index: torch.Tensor
    blank: bool = False

    @classmethod
    def of(cls, mask: torch.Tensor, blank: bool = False) -> "TokComChoice":
        flat = mask.flatten(0, -2)  # (B * N, K)
        places, where = flat.T.nonzero(as_tuple=True)  # of (K, B * N), so sorted by place
        return cls(mask, flat.sum(0).tolist(), where * mask.shape[-1] + places, blank)


class _Part(NamedTuple):
    """Some rows of one place, or of any place for small vocabularies: which `rows`, their
    likelihood's `factors` `(r, c + 1)` and `columns (V, c + 1)` or `(r, V, c + 1)`; both are None
    where it is constant."""

    rows: slice
    factors: torch.Tensor | None
    columns: torch.Tensor | None

    def likelihood(self) -> torch.Tensor | None:
        """The log-likelihood `(r, V)` of the rows' channels, up to a constant per row."""
        if self.factors is None:
            return None
        if self.columns.ndim == 2:
            return self.factors @ self.columns.T
        return (self.columns @ self.factors[..., None])[..., 0]  # a table for each row


def _blank_parts(count: int) -> list[_Part]:
    """`count` rows whose likelihood is constant."""
    starts = range(0, count, CROSS_ENTROPY_CHUNK)
    return [
        _Part(slice(start, min(start + CROSS_ENTROPY_CHUNK, count)), None, None) for start in starts
    ]


def _working_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's if it is on, else the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


class _CrossEntropy(torch.autograd.Function):
    """Sum over rows of the cross-entropy of `states @ weight^T + bias + likelihood` against `ids`,
    divided by R.

    The gradient of the logits is known as soon as they are (it is `softmax - one_hot`), so the
    forward pass multiplies it into the gradients of states, weight and bias at once. That saves a
    second computation of the logits, which a checkpoint would need, and never holds more than some
    rows of them.
    """

    @staticmethod
    def forward(ctx, states, weight, bias, ids, parts: list[_Part]):
        dtype = _working_dtype(states)
        trained = any(ctx.needs_input_grad[:3])  # of states, weight or bias
        count = max(1, len(states))  # R; without rows the loss is 0
        losses = states.new_empty(len(states), dtype=torch.float32)
        gradients = None
        with torch.autocast(states.device.type, enabled=False):
            matrix = weight.to(dtype)
            row = bias.to(dtype)
            inputs = states.to(dtype)  # (R, E)
            if trained:
                gradients = (
                    torch.empty_like(inputs),
                    torch.zeros_like(weight),
                    torch.zeros_like(bias),
                )
            for part in parts:
                logits = F.linear(inputs[part.rows], matrix, row)  # (r, V)
                likelihood = part.likelihood()
                if likelihood is not None:
                    # log p(token | x_t, rest) = log p(token | rest) + log p(x_t | token) + constant
                    logits = likelihood.add_(logits)  # float32, as the likelihood is
                probabilities = logits.softmax(-1, dtype=torch.float32)
                own = ids[part.rows, None]  # (r, 1)
                # log-sum-exp = max - log max probability; -log of the own one could be -log 0
                normalizer = logits.amax(-1).float() - probabilities.amax(-1).log()
                losses[part.rows] = normalizer - logits.gather(1, own)[:, 0].float()
                chosen = probabilities.gather(1, own)
                if not trained:
                    continue
                # the gradient of the logits: softmax - one_hot
                error = probabilities.scatter_(1, own, chosen - 1)
                gradients[2].add_(error.sum(0), alpha=1 / count)
                error = error.to(dtype)  # (r, V)
                torch.mm(error, matrix, out=gradients[0][part.rows])  # (r, E), not yet divided by R
                gradients[1].add_(error.T @ inputs[part.rows], alpha=1 / count)  # (V, E)
        if trained:
            ctx.save_for_backward(*gradients)
            ctx.count = count
            ctx.dtype = states.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum() / count, losses

    @staticmethod
    def backward(ctx, gradient, _):
        states, weight, bias = ctx.saved_tensors
        # the forward pass has done the work, up to this factor
        states = states.to(ctx.dtype) * (gradient / ctx.count).to(ctx.dtype)
        return (
            states,
            weight * gradient.to(weight.dtype),
            bias * gradient.to(bias.dtype),
            None,
            None,
        )


class _MeanEmbedding(torch.autograd.Function):
    """`softmax(likelihood + prior) @ weight`, rows `(R, E)`; only `weight` has a gradient.

    The backward pass computes the probabilities again, a few rows at a time, rather than keep
    `(R, V)` of them.
    """

    @staticmethod
    def forward(ctx, weight, prior, parts: list[_Part]):
        ctx.dtype = _working_dtype(weight)
        ctx.parts = parts
        ctx.save_for_backward(prior)
        ctx.weight = weight.dtype, weight.shape
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.to(ctx.dtype)
            return torch.cat(
                [_MeanEmbedding.probabilities(ctx, part, prior) @ matrix for part in parts]
            )

    @staticmethod
    def probabilities(ctx, part: _Part, prior: torch.Tensor) -> torch.Tensor:
        return (part.likelihood() + prior).softmax(-1).to(ctx.dtype)  # (r, V)

    @staticmethod
    def backward(ctx, gradient):
        (prior,) = ctx.saved_tensors
        dtype, shape = ctx.weight
        total = gradient.new_zeros(shape, dtype=dtype)
        with torch.autocast(gradient.device.type, enabled=False):
            for part in ctx.parts:
                rows = gradient[part.rows].to(ctx.dtype)  # (r, E)
                total += _MeanEmbedding.probabilities(ctx, part, prior).T @ rows
        return total, None, None


class TokComTokenHead(nn.Module):
    """Reads noisy latents as uncertain tokens, and turns what the network expects into token
    probabilities.

    Bayes' rule: p(token | x_t, rest) is p(token | rest), which the network predicts, times the
    likelihood N(x_t; t z, (1 - t)^2) of the token's own channels z in the codec's table, which is
    known. So the network learns language and not the geometry of the latents (score interpolation,
    CDCD, Dieleman et al. 2022, made exact).

    The places of a chunk have their own times: at the latent's time t, place k has progressed by
    `t (1 + s (K - 1)) - s k`, cut to [0, 1], with s = `token_stagger`; 0 denoises the tokens of a
    chunk together, 1 one after the other (AR-Diffusion, Wu et al. 2023). `token_shift` warps
    progress towards noise, like a sampling grid.

    Args:
        config (`TokComConfig`): its codec, `token_*` fields and `noise_std`.
    """

    # without a type: an import for a type alone lengthens every chain that leads here
    def __init__(self, config):
        super().__init__()
        codec = config.codec_config
        self.num_symbols = codec.num_symbols
        self.noise_std = config.noise_std
        self.stagger = config.token_stagger
        self.shift = config.token_shift
        self.impossible_symbol = codec.impossible_symbol
        self.embedding = TokComTokenEmbedding(codec.symbol_vocab_size, config.token_embedding_size)
        self.bias = nn.Parameter(torch.zeros(codec.symbol_vocab_size))  # log-frequencies

    @property
    def weight(self) -> torch.Tensor:
        """The `(V, E)` that gives logits, under the name that an output layer has; `bias` is its
        own."""
        return self.embedding.weight

    # ---- times ----

    def progress(self, timestep: torch.Tensor) -> torch.Tensor:
        """Times of latents `(...)` -> how far each place has come, `(..., K)`; below 0 is not
        begun, above 1 is done."""
        places = torch.arange(self.num_symbols, device=timestep.device)  # (K,)
        # K turns of equal length that overlap by 1 - stagger; the last one ends at t = 1
        progress = (
            timestep[..., None] * (1 + self.stagger * (self.num_symbols - 1))
            - self.stagger * places
        )
        # where a turn begins or ends is a whole number, whatever rounding says
        whole = progress.round()
        return torch.where((progress - whole).abs() < 1e-5, whole, progress)

    def warp(self, progress: torch.Tensor) -> torch.Tensor:
        """Progress of places -> their t: 0 is noise, 1 is clean."""
        # the shift of a flow's sampling grid, applied to what is left
        left = 1 - progress.clamp(0, 1)
        return 1 - self.shift * left / (1 + (self.shift - 1) * left)  # `left` is the noise level

    def place_times(self, timestep: torch.Tensor) -> torch.Tensor:
        """Times of latents `(...)` -> t of each place `(..., K)`: 0 is noise, 1 is clean."""
        return self.warp(self.progress(timestep))

    def latent_time(self, t: float) -> float:
        """The time of a latent at which its places are at `t`, without `token_stagger`: the inverse
        of `place_times`."""
        return 1 - (1 - t) / (self.shift - (self.shift - 1) * (1 - t))

    # ---- what tokens look like ----

    @property
    def prior(self) -> torch.Tensor:
        """The logits `(V,)` of tokens of which nothing is known; the pad token is impossible."""
        if self.impossible_symbol is None:
            return self.bias
        # the pad token is in the vocabulary, but no text holds it
        where = torch.arange(len(self.bias), device=self.bias.device) == self.impossible_symbol
        return self.bias.masked_fill(where, float("-inf"))

    def symbols(self, table: torch.Tensor) -> TokComSymbols:
        """What every call needs to know of the codec's `table (K, V, C / K)`."""
        weight = self.embedding.weight
        prior = self.prior.detach().softmax(-1)  # (V,)
        frequent = F.linear(prior[None].to(weight.dtype), weight.T)[0]  # (E,)
        # log N(x; t z, n^2) = t x z / n^2 - t^2 |z|^2 / (2 n^2) + constant: one product with these
        # columns
        columns = torch.cat((table, -0.5 * table.square().sum(-1, keepdim=True)), dim=-1)
        embeddings = None if torch.is_grad_enabled() else self._scaled(weight, frequent[None])
        return TokComSymbols(table, columns, frequent, embeddings)

    def _scaled(self, *embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings as the network reads them: rows have length 1, and it wants channels of
        variance 1."""
        weight = self.embedding.weight
        return torch.cat([x.to(weight.dtype) for x in embeddings]) * weight.shape[1] ** 0.5

    def latents_of(self, symbols: TokComSymbols, ids: torch.Tensor) -> torch.Tensor:
        """Ids `(B, N, K)` -> their clean latents `(B, N, C)`."""
        return symbols.table[torch.arange(self.num_symbols, device=ids.device), ids].flatten(2)

    def add_noise(
        self, symbols: TokComSymbols, chunks: torch.Tensor, place_times: torch.Tensor
    ) -> torch.Tensor:
        """Noisy latents `(R, C)` of chunks `(R, K)` whose tokens stand at `place_times (R, K)`."""
        clean = self.latents_of(symbols, chunks[None])[0]  # (R, C)
        signal = place_times.repeat_interleave(clean.shape[1] // self.num_symbols, dim=1)  # (R, C)
        return (1 - signal) * torch.randn_like(clean) * self.noise_std + signal * clean  # x_t

    # ---- rows ----

    def _groups(
        self, choice: TokComChoice, symbols: TokComSymbols
    ) -> Iterator[tuple[slice, int | torch.Tensor]]:
        """Rows of the choice and their place; with a small vocabulary, of any places."""
        if symbols.table.shape[1] <= SMALL_VOCABULARY:
            yield slice(0, len(choice.index)), choice.index % self.num_symbols
            return
        start = 0
        for place, count in enumerate(choice.counts):
            if count:
                yield slice(start, start + count), place  # the choice is sorted by place
            start += count

    def _parts(self, choice: TokComChoice, symbols: TokComSymbols, latents, times) -> list[_Part]:
        """The chosen rows in parts of at most `CROSS_ENTROPY_CHUNK`, with what gives their
        likelihood.

        `latents (B, N, C)` and `times (B, N, K)` are those of all tokens.
        """
        own = latents.float().unflatten(-1, (self.num_symbols, -1))  # (B, N, K, C / K)
        own = own.flatten(0, -2)[choice.index]  # (R, C / K)
        # t, by which the clean channels are scaled in x_t
        signal = times.float().flatten()[choice.index, None]
        # 1 / n^2, of noise of standard deviation n = (1 - t) * noise_std
        precision = ((1 - signal).clamp_min(MIN_SIGMA) * self.noise_std) ** -2
        # (R, C / K + 1), one factor for each of the likelihood's columns
        factors = torch.cat((signal * precision * own, signal.square() * precision), dim=-1)
        parts = []
        for rows, place in self._groups(choice, symbols):
            for start in range(rows.start, rows.stop, CROSS_ENTROPY_CHUNK):
                some = slice(start, min(start + CROSS_ENTROPY_CHUNK, rows.stop))
                # one table for all rows if they are of one place, else a table for every row
                where = place if isinstance(place, int) else place[some]
                parts.append(_Part(some, factors[some], symbols.columns[where]))
        return parts

    def _whole(self, choice: TokComChoice, values: torch.Tensor) -> torch.Tensor:
        """Values `(R, ...)` of the chosen tokens -> `(B, N, K, ...)`, 0 elsewhere."""
        whole = values.new_zeros(choice.mask.numel(), *values.shape[1:])
        return whole.index_copy(0, choice.index, values).view(*choice.mask.shape, *values.shape[1:])

    def _map(
        self, function: Callable, choice: TokComChoice, symbols, latents, times, *extra
    ) -> torch.Tensor:
        """`function(log-likelihood (r, V), columns, *extra rows)` of the chosen tokens,
        `(B, N, K, ...)`, 0 elsewhere.

        `extra` are tensors `(B, N, K, ...)`. Without a gradient. For tokens that are blank the
        function gets None for likelihood and columns.
        """
        more = [x.flatten(0, choice.mask.ndim - 1)[choice.index] for x in extra]
        results = []
        with torch.autocast(latents.device.type, enabled=False):
            if choice.blank:
                parts = _blank_parts(len(choice.index))
            else:
                parts = self._parts(choice, symbols, latents, times)
        for part in parts:
            with torch.autocast(latents.device.type, enabled=False):
                likelihood = part.likelihood()
            columns = None if part.columns is None else part.columns[..., :-1]
            results.append(function(likelihood, columns, *(x[part.rows] for x in more)))
        if not results:  # an empty call says the shape of a row
            empty = symbols.columns[0]
            rows = [x[:0] for x in more]
            results.append(function(empty.new_zeros(0, len(empty)), empty[:, :-1], *rows))
        return self._whole(choice, torch.cat(results))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits `(..., V)` of tokens of which no channel is known, given network states
        `(..., E)`; float32."""
        return F.linear(states, self.embedding.weight, self.prior.to(states.dtype)).float()

    # ---- reading ----

    def read(
        self,
        symbols: TokComSymbols,
        latents: torch.Tensor | None,
        times: torch.Tensor,
        chunks: torch.Tensor | None = None,
        uncertain: TokComChoice | None = None,
    ) -> torch.Tensor:
        """Mean token embeddings `(B, N, K * E)` given each token's own noisy channels and its
        frequency.

        `latents (B, N, C)` are only read where a token is uncertain, or to find the ids of clean
        ones. `times (B, N, K)` are those of the places. If they are known, `chunks (B, N, K)` are
        the ids of clean tokens, and `uncertain` the tokens that are neither clean nor pure noise.
        """
        weight = self.embedding.weight
        if chunks is None:
            chunks = self.recognise(symbols, latents, times)
        if uncertain is None:
            uncertain = TokComChoice.of((times > 0) & (times < 1))
        # one table of all embeddings that are needed: of every token, of an unknown one, of each
        # uncertain one
        unknown = len(weight)
        rows = torch.where(times == 1, chunks, unknown)  # (B, N, K), rows of that table
        means = []
        if len(uncertain.index):
            with torch.autocast(latents.device.type, enabled=False):
                parts = self._parts(uncertain, symbols, latents, times)
            means.append(_MeanEmbedding.apply(weight, self.prior.detach(), parts))  # (R, E)
            own = torch.arange(unknown + 1, unknown + 1 + len(uncertain.index), device=rows.device)
            rows = rows.flatten().index_copy(0, uncertain.index, own).view(rows.shape)
        table = symbols.embeddings
        if table is None or torch.is_grad_enabled():
            table = self._scaled(weight, symbols.frequent[None], *means)
        elif means:
            table = torch.cat((table, self._scaled(*means)))
        return F.embedding(rows, table).flatten(2)  # (B, N, K * E)

    def recognise(
        self, symbols: TokComSymbols, latents: torch.Tensor, times: torch.Tensor
    ) -> torch.Tensor:
        """Ids `(B, N, K)` of the tokens that are clean, the others 0."""
        clean = TokComChoice.of(times == 1)
        return self._map(
            lambda likelihood, table: likelihood.argmax(-1), clean, symbols, latents, times
        )

    # ---- predicting ----

    def nll(
        self, states, symbols: TokComSymbols, latents, times, chunks, chosen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean cross-entropy of the tokens that `chosen (B, N, K)` marks, and the nats of each,
        `(B, N, K)`.

        `states (B, N, K * E)` is what the network expects, `chunks (B, N, K)` the ids. Only the
        mean has a gradient.
        """
        # pure noise says nothing of a token, so its likelihood is left out
        blank = TokComChoice.of(chosen & (times == 0))
        noisy = TokComChoice.of(chosen & (times > 0))
        index = torch.cat((blank.index, noisy.index))  # (R,)
        count = len(blank.index)
        parts = _blank_parts(count)
        if len(noisy.index):
            with torch.autocast(latents.device.type, enabled=False):
                noisy_parts = self._parts(noisy, symbols, latents, times)
            for rows, *rest in noisy_parts:  # their rows stand behind the blank ones
                parts.append(_Part(slice(rows.start + count, rows.stop + count), *rest))
        rows = states.unflatten(-1, (self.num_symbols, -1)).flatten(0, -2)[index]  # (R, E)
        ids = chunks.flatten()[index]  # (R,)
        mean, losses = _CrossEntropy.apply(rows, self.embedding.weight, self.prior, ids, parts)
        whole = losses.new_zeros(chosen.numel()).index_copy(0, index, losses)  # (B * N * K,)
        return mean, whole.view(chosen.shape)

    def mean_latents(self, states, symbols: TokComSymbols, latents, times) -> torch.Tensor:
        """E[x1 | x_t] `(B, N, C)`; tokens that are clean stay as they are."""

        def mean(
            likelihood: torch.Tensor, table: torch.Tensor, states: torch.Tensor
        ) -> torch.Tensor:
            # Bayes' rule: the posterior given the token's own channels and everything else
            probabilities = (self.logits(states) + likelihood).softmax(-1)  # (R, V)
            if table.ndim == 2:
                return probabilities @ table  # (R, C / K)
            return (probabilities[:, None] @ table)[:, 0]  # a table for each row

        states = states.unflatten(-1, (self.num_symbols, -1))
        noisy = TokComChoice.of(times < 1)
        values = self._map(mean, noisy, symbols, latents, times, states)  # (B, N, K, C / K)
        return torch.where(
            (times == 1)[..., None], latents.float().view(values.shape), values
        ).flatten(2)

    def draw(
        self,
        states,
        symbols: TokComSymbols,
        latents,
        times,
        chosen: TokComChoice,
        uniform,
        temperature=1.0,
        top_p=1.0,
        excluded: Sequence[int] = (),
    ) -> torch.Tensor:
        """Draw the `chosen` tokens with `uniform (B, N, K)` numbers in [0, 1); returns ids
        `(B, N, K)`.

        `temperature` divides what the network expects, not the likelihood; `top_p` cuts the result
        to its nucleus. Symbols that are `excluded` are never drawn.
        """

        def ids(likelihood: torch.Tensor | None, table, states: torch.Tensor, uniform):
            logits = self.logits(states) / temperature  # (R, V)
            for symbol in excluded:
                logits[:, symbol] = float("-inf")
            if likelihood is not None:
                logits = logits + likelihood
            probabilities = logits.softmax(-1)
            if top_p < 1:
                probabilities = nucleus(probabilities, top_p)
            return draw_ids(probabilities, uniform)

        states = states.unflatten(-1, (self.num_symbols, -1))
        return self._map(ids, chosen, symbols, latents, times, states, uniform)

    def most_likely(self, states, symbols: TokComSymbols, latents, times) -> torch.Tensor:
        """The most likely ids `(B, N, K)` of all tokens."""

        def ids(likelihood: torch.Tensor, table: torch.Tensor, states: torch.Tensor):
            return (self.logits(states) + likelihood).argmax(-1)

        everywhere = TokComChoice.of(torch.ones_like(times, dtype=torch.bool))
        states = states.unflatten(-1, (self.num_symbols, -1))  # (B, N, K, E)
        return self._map(ids, everywhere, symbols, latents, times, states)


class TokComZeroNorm(nn.LayerNorm):
    """LayerNorm whose weight starts at zero: the branch it ends adds nothing at first."""


class TokComLatentMLP(nn.Module):
    """x + LN(W2 GELU(LN(W1 x))) on latents `(..., C)`: OmniFlow's text-decoder head, and smaller
    its LatentRefiner."""

    def __init__(self, channels: int, hidden_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, hidden_size)
        self.norm_1 = nn.LayerNorm(hidden_size)
        self.linear_2 = nn.Linear(hidden_size, channels)
        self.norm_2 = TokComZeroNorm(channels)  # so the whole starts as the identity

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return latents + self.norm_2(self.linear_2(F.gelu(self.norm_1(self.linear_1(latents)))))


class TokComLatentHead(nn.Module):
    """`config.latent_refiner`, then `config.latent_head`: estimates `(B, N, C)` -> what is decoded,
    and a scalar loss."""

    def __init__(self, config):
        super().__init__()
        codec = config.codec_config
        channels = codec.latent_channels
        self.refiner = self.mlp = self.quantizer = None
        if config.latent_refiner == "mlp":
            self.refiner = TokComLatentMLP(channels, config.latent_refiner_size)
        if config.latent_head != "none":
            self.mlp = TokComLatentMLP(channels, config.latent_head_size)
        if config.latent_head == "vq":
            self.quantizer = VectorQuantizer(config.latent_head_codes, channels)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = latents.new_zeros(())
        if self.refiner is not None:
            latents = self.refiner(latents)
        if self.mlp is not None:
            latents = self.mlp(latents)
        if self.quantizer is not None and (self.training or self.quantizer.is_fitted):
            output = self.quantizer(latents)
            latents = output.latents
            loss = output.loss
        return latents, loss


__all__ = [
    "TokComTokenHead",
    "TokComChoice",
    "TokComSymbols",
    "TokComLatentHead",
    "TokComLatentMLP",
    "nucleus",
]
