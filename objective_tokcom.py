"""What training minimises where a context network reads chunks and a light head predicts their tokens in turn.

Notable choices:
- The context network reads a text once, as `[start, chunk 0, chunk 1, ...]`; the state at each place is all that the
  head learns of what stands before the next chunk.
- A chunk may be known in part. Its known tokens are clean, whatever their turn: so a prompt goes on inside its last
  chunk, and a gap begins and ends anywhere.
- In rows with gaps, the state before a gap is computed last: it has seen what follows. The chunk in which a gap ends
  is read with its unknown tokens blank.
- Only what has a loss passes the head: the chunks and times at which some token has its turn.

Shape legend: B batch, T tokens, K tokens per chunk, N = T/K chunks, M noise draws, R rows that pass the head, D width.
"""

from typing import NamedTuple

import torch

from .transformer_tokcom import INSIDE_TEXT, START_OF_TEXT

EARLY = 0.1  # training begins with a token this long before its turn, since sampling steps are not infinitely small
LONGEST_GAP = 24  # tokens
SHORT_GAP = 3  # tokens; the longest gap of half of the rows that have gaps


def draw_gaps(rows: int, length: int, device: torch.device) -> torch.Tensor:
    """Draw where texts of `length` tokens are known: runs of known tokens and gaps in turn, `(rows, length)`, true if known.

    Half of the rows have gaps of 1 to `LONGEST_GAP` tokens, half of 1 to `SHORT_GAP`; what stands between two gaps is 1
    to four times as long. Every row begins with either.
    """
    longest = torch.where(torch.rand(rows, 1, device=device) < 0.5, LONGEST_GAP, SHORT_GAP)  # (rows, 1)
    draws = torch.rand(2, rows, length, device=device)
    gaps = (draws[0] * longest).long() + 1
    runs = (draws[1] * 4 * longest).long() + 1
    pairs = torch.stack((runs, gaps), dim=-1).flatten(1)  # run, gap, run, gap, ...
    ends = pairs.cumsum(1)
    offset = (torch.rand(rows, 1, device=device) * ends[:, 1:2]).long()  # so that gaps also stand at the start
    places = torch.arange(length, device=device) + offset
    return torch.searchsorted(ends, places, right=True) % 2 == 0


class ContextPlan(NamedTuple):
    """In which order the context network reads `[start, chunk 0, ...]` of rows whose tokens are partly known.

    `order (B, 1 + N)` is the step at which each is read: it sees what is read no later. `partial (B, N)` marks chunks
    that are read with their unknown tokens blank, before those are known.
    """

    order: torch.Tensor
    partial: torch.Tensor

    @classmethod
    def of(cls, given: torch.Tensor, has_gaps: torch.Tensor) -> "ContextPlan":
        """The plan of rows `has_gaps (B,)` whose `given (B, N, K)` tokens are known; other rows are read in order.

        What is known is read first, then for each gap the state before it, then the gap's chunks as they are filled.
        """
        batch, length, _ = given.shape
        index = torch.arange(length + 1, device=given.device).expand(batch, -1)
        gap = ~given.all(-1) & has_gaps[:, None]  # (B, N)
        inside = torch.nn.functional.pad(gap[:, 1:], (0, 1))  # whether the gap goes on in the next chunk
        partial = gap & ~inside & given.any(-1)
        starts = torch.nn.functional.pad(gap, (0, 1))  # (B, 1 + N): whether the place before a gap's chunk
        late = starts | torch.nn.functional.pad(gap & ~partial, (1, 0))
        return cls(torch.where(late, index + length + 1, index), partial)

    def mask(self, valid: torch.Tensor) -> torch.Tensor:
        """Which key each query sees, `(B, 1 + N, 1 + N)`; `valid (B, N)` are chunks that are no padding."""
        exists = torch.nn.functional.pad(valid, (1, 0), value=True)
        sees = (self.order[:, None, :] <= self.order[:, :, None]) & exists[:, None, :]
        return sees | torch.eye(sees.shape[-1], dtype=torch.bool, device=sees.device)


def _turn_times(model, shape: tuple[int, int, int], device: torch.device, timestep: float | None) -> torch.Tensor:
    """Times `(B, M, N)` of chunks: drawn in M strata, in a share `turn_share` of the rows where a turn begins; in eval mode
    every turn of each chunk."""
    batch, draws, length = shape
    if timestep is not None:
        return torch.full(shape, timestep, device=device)
    turns = model.token_head.num_symbols
    if not model.training:
        return (torch.arange(turns, device=device) / turns)[None, :, None].expand(batch, turns, length)
    shares = (torch.rand(shape, device=device) + torch.arange(draws, device=device)[:, None]) / draws
    on_turn = torch.rand(batch, 1, 1, device=device) < model.config.turn_share
    return torch.where(on_turn, (shares * turns).floor() / turns, shares)


def token_loss(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    timestep: float | None = None,
    known_mask: torch.Tensor | None = None,
    text_start: torch.Tensor | None = None,
    fills_gaps: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean nats of the tokens whose turn it is, with a gradient, and those of each token, `(B, N, K)`.

    Args:
        model (`TokComModel`): one with `start_latents`, in train mode with gaps and `noise_draws`, in eval mode with
            every turn of each chunk, which gives its exact likelihood if `token_stagger` is 1.
        input_ids, attention_mask, known_mask (`(B, T)`): ids, 0 on padding, and 1 on tokens that are given.
        timestep (`float`, *optional*): one time of all chunks.
        text_start (`torch.BoolTensor` of shape `(B,)`, *optional*): rows that begin where a text begins; by default all.
        fills_gaps (`bool`): what is not known are gaps, which see what follows them, and no continuation.
    """
    config, head = model.config, model.token_head
    chunks, real = model.codec.symbols(input_ids, attention_mask)  # (B, N, K)
    batch, length, size = chunks.shape
    device, training = chunks.device, model.training
    symbols = model.symbols()
    given = torch.zeros_like(real)
    if known_mask is not None:
        given = model.codec.symbols(input_ids, known_mask)[1]
    has_gaps = torch.full((batch,), fills_gaps, device=device)
    begins = torch.ones_like(has_gaps) if text_start is None else text_start.bool()
    dropped = torch.zeros_like(has_gaps)
    if training:
        draws = torch.rand(2, batch, device=device)
        dropped = draws[0] < config.context_dropout
        if known_mask is None:
            has_gaps = (draws[1] < config.infill_rate) & ~dropped
            known = draw_gaps(batch, length * size, device).view(given.shape)
            given = known & has_gaps[:, None, None]

    plan = ContextPlan.of(given, has_gaps)
    valid = real.any(-1)
    blank = (plan.partial[..., None] & ~given) | ~real
    read_times = torch.where(blank, 0.0, 1.0)  # (B, N, K)
    features = head.read(symbols, None, read_times, chunks)  # (B, N, K * E)
    features = torch.nn.functional.pad(features, (0, 0, 1, 0))
    positions = torch.arange(-1, length, device=device).repeat(batch, 1)
    positions[:, 0] = torch.where(begins & ~dropped, START_OF_TEXT, INSIDE_TEXT)
    states = model.transformer.read_context(features, positions[..., None], plan.mask(valid))  # (B, 1 + N, D)

    times = _turn_times(model, (batch, config.noise_draws if timestep is None else 1, length), device, timestep)
    draws = times.shape[1]
    progress = head.progress(times)  # (B, M, N, K)
    wanted = (real & ~given)[:, None] & (progress < 1) & ((progress > -EARLY) if training else (progress >= 0))
    row, draw, place = wanted.any(-1).nonzero(as_tuple=True)  # (R,) each
    before = states[row, torch.where(dropped[row], 0, place)]  # (R, D)
    place_times = torch.where(given[row, place], 1.0, head.warp(progress[row, draw, place]))  # (R, K)
    own = chunks[row, place]
    clean = symbols.table[torch.arange(size, device=device), own].flatten(1)  # (R, C)
    signal = place_times.repeat_interleave(clean.shape[1] // size, dim=1)
    noisy = (1 - signal) * torch.randn_like(clean) * config.noise_std + signal * clean
    chosen = wanted[row, draw, place]

    states = model.transformer(
        noisy[None].to(model.dtype),
        times[row, draw, place][None],
        features=head.read(symbols, noisy[None], place_times[None], own[None]),
        entry=before[None],
    ).latents  # (1, R, K * E)
    mean, losses = head.nll(states, symbols, noisy[None], place_times[None], own[None], chosen[None])
    everywhere = losses.new_zeros(batch, length, size)
    counts = everywhere.index_put((row, place), chosen.float(), accumulate=True)
    tokens = everywhere.index_put((row, place), losses[0], accumulate=True) / counts.clamp_min(1)
    return mean, tokens


__all__ = ["ContextPlan", "draw_gaps", "token_loss"]
