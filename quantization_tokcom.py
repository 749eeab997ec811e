"""Vector quantisers: continuous latents <-> codes.

Notable choices:
- Codebooks are buffers that follow moving averages. No optimizer touches them.
- The gradient passes straight through.
- Unused codes are replaced by inputs.
- All processes compute the same codebook from summed statistics.
- `FiniteScalarQuantizer` needs no codebook and cannot collapse.
- `kmeans` builds a codebook from finished latents.
- This file is remote code and may only import torch and transformers, so it uses no quantisation
  library.

Shape legend: M vectors, C channels, S codes, R residual levels.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

DISTANCE_ROWS = 8192  # rows of distances to all codes that exist at once
SAMPLE_PER_CENTRE = 16  # vectors per centre among which k-means looks for its first centres


@dataclass
class TokComQuantizerOutput(ModelOutput):
    """What every quantiser returns.

    Args:
        latents (`torch.FloatTensor` of shape `(..., C)`): quantised latents. Their gradient goes
            straight to the input.
        codes (`torch.LongTensor` of shape `(..., R)`): ids of the codes.
        loss (`torch.FloatTensor`): scalar commitment loss, 0 where there is none.
    """

    latents: torch.FloatTensor | None = None
    codes: torch.LongTensor | None = None
    loss: torch.FloatTensor | None = None


def nearest_codes(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Ids `(M,)` of the rows of `codebook (S, C)` that are nearest to `vectors (M, C)`."""
    codebook = codebook.float()  # distances in bfloat16 would often tie
    return torch.cat(
        [torch.cdist(part.float(), codebook).argmin(-1) for part in vectors.split(DISTANCE_ROWS)]
    )


def code_statistics(codes: torch.Tensor, size: int) -> dict[str, float]:
    """How `codes (...)` use a codebook of `size` codes: share used, entropy in bits, perplexity,
    dead codes."""
    # not bincount: a finite scalar quantiser may have more codes than fit into memory
    counts = codes.flatten().unique(return_counts=True)[1]
    return count_statistics(counts, size)


def count_statistics(counts: torch.Tensor, size: int) -> dict[str, float]:
    """`code_statistics` of how often codes occur, `counts (...)`, if that is known already."""
    counts = counts[counts > 0].double()
    shares = counts / counts.sum().clamp_min(1)
    entropy = -(shares * shares.log2()).sum().item()  # all shares are above 0 here
    used = len(counts)
    return {
        "usage": used / size,
        "entropy_bits": entropy,
        "perplexity": 2**entropy,
        "dead_codes": size - used,
    }


def _sum_over_processes(*tensors: torch.Tensor) -> None:
    if distributed.is_available() and distributed.is_initialized():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def _first_with(vectors: torch.Tensor) -> int | None:
    """Rank of the first process that has `vectors (M, C)`, None if none has."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0 if len(vectors) else None
    # a process without vectors reports a rank that does not exist, so the minimum ignores it
    ranks = distributed.get_world_size()
    own = distributed.get_rank() if len(vectors) else ranks
    first = torch.tensor(own, device=vectors.device)
    distributed.all_reduce(first, distributed.ReduceOp.MIN)
    return None if int(first) == ranks else int(first)


def _draw_rows(vectors: torch.Tensor, count: int, source: int) -> torch.Tensor:
    """`count` random rows of `vectors (M, C)`, drawn by the process `source` for all processes."""
    rows = vectors.new_empty(count, vectors.shape[1])  # overwritten by the broadcast
    if len(vectors):
        rows = vectors[torch.randint(len(vectors), (count,), device=vectors.device)]
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast(rows, source)
    return rows


class VectorQuantizer(nn.Module):
    """A codebook `(S, C)` that follows moving averages of its inputs (VQ-VAE, van den Oord et al.
    2017).

    Args:
        num_codes (`int`), channels (`int`): S and C.
        decay (`float`): decay of the moving averages per training step.
        commitment_weight (`float`): weight of the loss that pulls inputs to their codes.
        dead_threshold (`float`): a code whose usage is below this share of the average is replaced
            by a random input. The new code must be used within about 70 steps (at a decay of 0.99),
            or it is replaced again.
    """

    def __init__(
        self,
        num_codes: int,
        channels: int,
        decay: float = 0.99,
        commitment_weight: float = 0.25,
        dead_threshold: float = 0.05,
    ):
        super().__init__()
        if num_codes < 2 or not 0 < decay < 1:
            raise ValueError(
                f"`num_codes` ({num_codes}) must be at least 2 and `decay` ({decay}) in (0, 1)."
            )
        self.decay = decay
        self.commitment_weight = commitment_weight
        self.dead_threshold = dead_threshold
        self.codebook = nn.Buffer(torch.randn(num_codes, channels))
        # moving averages: how often each code is used, and the sum of its inputs; 0 before any data
        self.counts = nn.Buffer(torch.zeros(num_codes))
        self.sums = nn.Buffer(torch.zeros(num_codes, channels))

    def initialize_parameters(self) -> None:
        init.normal_(self.codebook)
        init.zeros_(self.counts)
        init.zeros_(self.sums)

    @property
    def num_codes(self) -> int:
        return len(self.codebook)

    @property
    def is_fitted(self) -> bool:
        """Whether the codebook has seen data."""
        return bool(self.counts.any())

    def forward(self, latents: torch.Tensor, frozen: bool = False) -> TokComQuantizerOutput:
        """Quantise `latents (..., C)`.

        In training mode with gradients enabled, the codebook first moves towards its inputs, unless
        `frozen`.
        """
        flat = latents.detach().float().flatten(0, -2)  # (M, C)
        # without gradients, training code only measures: the codebook must stay
        if self.training and torch.is_grad_enabled() and not frozen:
            self._update(flat)
        codes = nearest_codes(flat, self.codebook)
        quantised = self.codebook[codes].view(latents.shape).to(latents.dtype)
        loss = self.commitment_weight * F.mse_loss(latents.float(), quantised.float())
        straight = latents + (quantised - latents).detach()  # the gradient skips the quantiser
        return TokComQuantizerOutput(straight, codes.view(*latents.shape[:-1], 1), loss)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(..., 1)` -> latents `(..., C)`."""
        return self.codebook[codes[..., 0]]

    @torch.no_grad()
    def _update(self, flat: torch.Tensor) -> None:
        """Move used codes towards the mean of their inputs, and replace unused codes by inputs.

        A collective operation: processes without inputs call it with `flat (0, C)`. Inputs that are
        not finite are passed over: training leaves such an update out, but the codebook moves
        before the loss is known.
        """
        flat = flat[torch.isfinite(flat).all(-1)]
        source = _first_with(flat)
        first = not self.is_fitted
        if source is None:  # no process has inputs
            return
        if first:  # start at inputs: random codes may be far from all of them and never be used
            self.codebook.copy_(_draw_rows(flat, self.num_codes, source))
        codes = nearest_codes(flat, self.codebook)
        counts = torch.bincount(codes, minlength=self.num_codes).float()  # (S,)
        sums = torch.zeros_like(self.sums, dtype=torch.float32).index_add_(0, codes, flat)
        _sum_over_processes(counts, sums)  # so all processes compute the same codebook
        decay = 0.0 if first else self.decay
        self.counts.mul_(decay).add_(counts, alpha=1 - decay)
        self.sums.mul_(decay).add_(sums, alpha=1 - decay)
        least = self.dead_threshold * self.counts.mean()
        alive = self.counts > least  # (S,)
        means = self.sums / self.counts.clamp_min(1e-12)[:, None]  # (S, C)
        # inputs that replace dead codes
        drawn = _draw_rows(flat, self.num_codes, source)  # (S, C)
        self.codebook.copy_(torch.where(alive[:, None], means, drawn))
        # A new code starts just above the threshold. It survives for a while, and the first inputs
        # that choose it still move it.
        self.counts.copy_(torch.where(alive, self.counts, 2 * least))
        self.sums.copy_(torch.where(alive[:, None], self.sums, self.codebook * 2 * least))


class ResidualQuantizer(nn.Module):
    """R codebooks; each quantises the residual of the ones before it (RQ-VAE, Lee et al. 2022)."""

    def __init__(self, num_codes: int, channels: int, num_levels: int, **options):
        super().__init__()
        self.levels = nn.ModuleList(
            VectorQuantizer(num_codes, channels, **options) for _ in range(num_levels)
        )

    @property
    def num_levels(self) -> int:
        return len(self.levels)

    @property
    def num_codes(self) -> int:
        return self.levels[0].num_codes

    def forward(self, latents: torch.Tensor, frozen: bool = False) -> TokComQuantizerOutput:
        """Quantise `latents (..., C)`; codes are `(..., R)`."""
        left = latents  # the residual that the next level quantises
        total = torch.zeros_like(latents)
        codes = []
        loss = 0.0
        for level in self.levels:
            output = level(left, frozen)
            # not `output.latents`, which passes gradients straight through: the residual would lose
            # its gradient, and with it the commitment loss of the later levels
            found = level.decode(output.codes).to(latents.dtype)
            total = total + found
            left = left - found
            codes.append(output.codes)
            loss = loss + output.loss
        straight = latents + (total - latents).detach()  # the gradient skips the quantiser
        return TokComQuantizerOutput(straight, torch.cat(codes, dim=-1), loss)

    def nearest(self, latents: torch.Tensor) -> TokComQuantizerOutput:
        """Snap estimates of quantised latents `(..., C)` to the nearest codes; learns nothing."""
        return self(latents, frozen=True)

    def skip(self) -> None:
        """Join the codebook update of the other processes without inputs of one's own."""
        for level in self.levels:
            level._update(level.codebook[:0].float())

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(..., R)` -> latents `(..., C)`."""
        return sum(level.decode(codes[..., i : i + 1]) for i, level in enumerate(self.levels))


class FiniteScalarQuantizer(nn.Module):
    """Rounds every channel to one of a few levels (FSQ, Mentzer et al. 2023).

    The levels of the channels are the digits of the code. There is no codebook, no auxiliary loss,
    and no dead code by construction.

    Args:
        levels (`tuple[int, ...]`): levels of each channel, each at least 2; S is their product.
    """

    def __init__(self, levels: tuple[int, ...]):
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"`levels` ({levels}) must be at least 2 for every channel.")
        self.levels = tuple(levels)

    @property
    def num_codes(self) -> int:
        return int(torch.tensor(self.levels).prod())

    def _shape(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels of each channel, and the place value of its digit in a code, `(C,)` each."""
        levels = torch.tensor(self.levels, device=like.device)
        places = torch.cat((levels.new_ones(1), levels[:-1].cumprod(0)))  # mixed radix
        return levels, places

    def forward(self, latents: torch.Tensor, frozen: bool = False) -> TokComQuantizerOutput:
        """Quantise `latents (..., C)` to levels between -1 and 1; codes are `(..., 1)`."""
        return self._round(torch.tanh(latents.float()), latents)

    def nearest(self, latents: torch.Tensor) -> TokComQuantizerOutput:
        """Snap estimates of quantised latents `(..., C)` to the nearest levels.

        There is no tanh, because the input is bounded already. The gradient passes straight
        through.
        """
        output = self._round(latents.detach().float().clamp(-1, 1), latents)
        output.latents = latents + (output.latents - latents).detach()
        return output

    def _round(self, bounded: torch.Tensor, latents: torch.Tensor) -> TokComQuantizerOutput:
        levels, places = self._shape(latents)
        position = (bounded + 1) / 2 * (levels - 1)  # 0 .. levels - 1
        # the nearest level; `position` carries the gradient past the rounding
        digits = position.detach().round()
        rounded = position + (digits - position).detach()  # straight-through
        codes = (digits.long() * places).sum(-1, keepdim=True)
        values = (rounded / (levels - 1) * 2 - 1).to(latents.dtype)  # back to [-1, 1]
        return TokComQuantizerOutput(values, codes, latents.new_zeros(()))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(..., 1)` -> latents `(..., C)`."""
        levels, places = self._shape(codes)
        digits = codes // places % levels  # (..., C): the code is broadcast over its digits
        return digits / (levels - 1) * 2 - 1


def build_quantizer(
    name: str, channels: int, num_codes: int, num_quantizers: int, levels: list[int] | None
):
    """The quantiser of a codec's configuration, or None for `"none"`."""
    if name == "none":
        return None
    if name == "fsq":
        return FiniteScalarQuantizer(tuple(levels))
    return ResidualQuantizer(num_codes, channels, num_quantizers)


@torch.no_grad()
def kmeans(
    batches: Iterable[torch.Tensor],
    num_codes: int,
    iterations: int = 20,
    metric: str = "euclidean",
    weights: Iterable[torch.Tensor] | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Lloyd's algorithm over batches of vectors, which need not fit into memory together.

    A centre without vectors moves to the vector that is farthest from its own centre.

    Args:
        batches: tensors `(M, C)`. Every iteration reads them again, so pass a list or another
            re-iterable.
        metric (`str`): `"euclidean"`, or `"cosine"` for normalised vectors and centres.
        weights: weight of each vector, tensors `(M,)` in the order of `batches`.

    Returns: centres `(num_codes, C)`. Raises `ValueError` if there are fewer vectors than centres.
    """
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f"`metric` ({metric!r}) must be 'euclidean' or 'cosine'.")

    def read():
        given = iter(weights) if weights is not None else None
        for batch in batches:
            batch = batch.float()
            if metric == "cosine":
                batch = F.normalize(batch, dim=-1)
            if given is None:
                yield batch, torch.ones(len(batch), device=batch.device)
            else:
                yield batch, next(given).float()

    centres = _first_centres(read(), num_codes, torch.Generator().manual_seed(seed))
    for _ in range(iterations):
        # one pass: sums and counts of the vectors that are nearest to each centre
        sums = torch.zeros_like(centres)  # (S, C)
        counts = centres.new_zeros(num_codes)
        # the vectors that are farthest from their centres, no more of them than there are centres
        worst = centres.new_zeros(0)
        outliers = centres[:0]
        for batch, weight in read():
            nearest = [torch.cdist(part, centres).min(-1) for part in batch.split(DISTANCE_ROWS)]
            distances, codes = (torch.cat(x) for x in zip(*nearest))
            counts.index_add_(0, codes, weight)
            sums.index_add_(0, codes, batch * weight[:, None])
            distances = torch.cat((worst, distances))
            worst, far = distances.topk(min(num_codes, len(distances)))
            outliers = torch.cat((outliers, batch))[far]
        empty = (counts == 0).nonzero()[:, 0]
        # centres without vectors keep their place here and move below
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1e-12)[:, None], centres)
        if len(empty):
            found = outliers[: len(empty)]  # the farthest first
            centres[empty[: len(found)]] = found
        if metric == "cosine":  # a mean of unit vectors is shorter than 1
            centres = F.normalize(centres, dim=-1)
    return centres


def _first_centres(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]], count: int, generator
) -> torch.Tensor:
    """`count` distant vectors: k-means++ (Arthur and Vassilvitskii 2007) on a random sample of all
    batches."""
    keys = torch.zeros(0)
    rows = None
    # reservoir sampling: the rows with the largest random keys are a uniform sample of all batches
    for batch, _ in batches:
        keys = torch.cat((keys, torch.rand(len(batch), generator=generator)))
        rows = batch if rows is None else torch.cat((rows, batch))
        best = keys.topk(min(SAMPLE_PER_CENTRE * count, len(keys))).indices
        keys = keys[best]
        rows = rows[best.to(rows.device)]
    if rows is None or len(rows) < count:
        found = 0 if rows is None else len(rows)
        raise ValueError(f"{found} vectors cannot give {count} centres; lower `num_codes`.")
    chosen = [0]  # rows are in random order
    distances = (rows - rows[0]).square().sum(-1)
    for draw in torch.rand(count - 1, generator=generator).tolist():
        # draw a row with probability proportional to its squared distance from the chosen ones
        edges = distances.double().cumsum(0)
        index = int(
            torch.searchsorted(edges, edges[-1] * draw, right=True).clamp_max(len(rows) - 1)
        )
        chosen.append(index)
        distances = torch.minimum(distances, (rows - rows[index]).square().sum(-1))
    return rows[chosen]


__all__ = [
    "VectorQuantizer",
    "ResidualQuantizer",
    "FiniteScalarQuantizer",
    "TokComQuantizerOutput",
    "build_quantizer",
    "kmeans",
    "nearest_codes",
    "code_statistics",
    "count_statistics",
]
