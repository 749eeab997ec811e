"""What training minimises: one class per objective, each with its own settings.

| class | stage | model |
|---|---|---|
| `TokComCodecObjective` | codec | any: data -> latents -> data |
| `TokComNextChunkObjective` | flow | token probabilities, with `start_latents` |
| `TokComTokenObjective` | flow | token probabilities, one network for context and noisy latents |
| `TokComLatentObjective` | flow | regression of the latents of pictures and clips |
| `TokComTextLatentObjective` | flow | regression of the latents of texts, and decoded tokens |
| `TokComStreamObjective` | flow | regression of the latents of several streams |
| `TokComHeadObjective` | head | the latent head of a finished model |

Notable choices:
- `x_t = (1 - t) x0 + t x1`, so t = 1 is clean; networks predict x1.
- Settings belong to a training run, which gives them to `set_stage`, not to `config.json`.
- In eval mode nothing is dropped and no gaps are drawn; objectives of tokens then give likelihoods.

Shape legend: B batch, T tokens, K tokens per chunk, N = T/K latents, C latent channels, M noise
draws, D width.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from .codec_chunk_tokcom import TokComCodecOutput, check_settings
from .scheduling_tokcom import draw_gaps, draw_known
from .transformer_tokcom import TokComOutput, read_text

EARLY = 0.1  # training begins with a token this long before its turn: sampling steps are not small
STAGES = ("codec", "flow", "head")


@dataclass
class TokComObjective:
    """What a stage minimises. The fields of its subclasses are settings of a run."""

    stage: ClassVar[str] = "flow"

    def check(self, config) -> None:
        """Raise `ValueError` where the settings do not fit a model with this configuration."""

    def trained_parts(self, model) -> list[nn.Module]:
        """The parts of the model that have gradients; all others are frozen."""
        parts = (model.transformer, model.token_head, model.condition_embedding)
        return [part for part in parts if part is not None]

    def compilable_parts(self, model) -> list[nn.Module]:
        """The networks to compile in place, which keeps the names of parameters."""
        return [model.transformer]

    def loss(self, model, **inputs) -> TokComOutput:
        """The loss of a batch: the arguments of `TokComModel.forward` that are not None."""
        raise NotImplementedError


@dataclass
class TokComCodecObjective(TokComObjective):
    """Reconstruction by the codec; its settings are the fields of the codec's `loss_class`."""

    stage: ClassVar[str] = "codec"

    def trained_parts(self, model) -> list[nn.Module]:
        return [model.codec]

    def compilable_parts(self, model) -> list[nn.Module]:
        parts = (getattr(model.codec, name, None) for name in ("encoder", "decoder"))
        return [part for part in parts if part is not None]

    def loss(
        self,
        model,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        streams: dict[str, torch.Tensor] | None = None,
        present: dict[str, torch.Tensor] | None = None,
        text_start: torch.Tensor | None = None,
        known_mask: torch.Tensor | None = None,
    ) -> TokComOutput:
        """Captions, `text_start` and `known_mask` come with the data and do not matter here."""
        if streams is not None:
            loss, parts = model.codec.training_loss(streams, present)
        elif pixel_values is not None:
            loss, parts = model.codec.training_loss(pixel_values)
        else:
            loss, parts = model.codec.training_loss(input_ids, attention_mask)
        # other data have as many rows in all batches, and a stream's mean counts alike in each
        weight = None
        if pixel_values is None and streams is None:  # tokens that are no padding
            weight = model.codec.to_chunks(input_ids, attention_mask)[1].sum().float()
        return TokComOutput(loss=loss, weight=weight, **parts)


@dataclass
class TokComFlowObjective(TokComObjective):
    """What the objectives of stage flow share.

    Args:
        context_dropout: share of the rows that lose their context, for classifier-free guidance.
        infill_rate: share of the rows with a gap that is generated after what follows it; a local
            head also learns this share of the other chunks with their last tokens known.
        noise_draws: M, noisy copies of every latent that one pass over the clean text trains; 1 for
            bidirectional models, which have no clean half to share.
    """

    context_dropout: float = 0.1
    infill_rate: float = 0.1
    noise_draws: int = 1

    def __post_init__(self):
        for name in ("context_dropout", "infill_rate"):
            value = getattr(self, name, 0.0)
            if not 0 <= value < 1:
                raise ValueError(f"`{name}` ({value}) is a probability and must be in [0, 1).")

    def check(self, config) -> None:
        is_causal = config.transformer_config.block_size is not None
        if self.noise_draws < 1 or (self.noise_draws > 1 and not is_causal):
            raise ValueError(
                f"`noise_draws` ({self.noise_draws}) must be at least 1, and 1 for a bidirectional "
                "model (`block_size=None`), which has no clean half to share."
            )


@dataclass
class TokComNextChunkObjective(TokComFlowObjective):
    """Cross-entropy of the tokens of every next chunk, in turn, given the state of its context.

    Source: the network is split as in CALM (Shao et al. 2025); turns are those of `token_stagger`.

    Args:
        turn_share: share of the rows whose times are exactly those at which a token's turn begins,
            which is where K sampling steps are. By default 0.75, and 0 without turns. One pass of a
            local head scores every token at its turn, so it has one draw and no other times.
    """

    turn_share: float | None = None

    def check(self, config) -> None:
        super().check(config)
        is_local = config.transformer_config.local_head
        if self.turn_share is None:
            self.turn_share = 1.0 if is_local else 0.75 if config.token_stagger == 1 else 0.0
        if is_local and (self.noise_draws, self.turn_share) != (1, 1):
            raise ValueError(
                f"`noise_draws` ({self.noise_draws}) and `turn_share` ({self.turn_share}) must be "
                "1 with `local_head`, whose one pass scores every token at its turn."
            )
        if not 0 <= self.turn_share <= 1 or (self.turn_share and config.token_stagger != 1):
            raise ValueError(
                f"`turn_share` ({self.turn_share}) must be in [0, 1], and 0 unless `token_stagger` "
                f"({config.token_stagger}) is 1."
            )

    def compilable_parts(self, model) -> list[nn.Module]:
        return list(model.transformer.layers)  # how many rows pass them differs from step to step

    def loss(
        self,
        model,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        timestep: float | None = None,
        known_mask: torch.Tensor | None = None,
        text_start: torch.Tensor | None = None,
        fills_gaps: bool = False,
    ) -> TokComOutput:
        """Mean nats of the tokens whose turn it is.

        In eval mode every turn of each chunk is taken, which gives the exact likelihood if
        `token_stagger` is 1.

        Args:
            input_ids, attention_mask, known_mask (`(B, T)`): ids, 0 on padding, which stands behind
                a text, and 1 on tokens that are given.
            timestep (`float`, *optional*): one time of all chunks.
            text_start (`(B,)`, *optional*): rows that begin where a text does; all by default.
            fills_gaps (`bool`): what is not known are gaps, which see what follows them.
        """
        head = model.token_head
        is_local = model.config.transformer_config.local_head
        _refuse_leading_padding(attention_mask)
        symbols = model.symbols()
        chunks, real = model.codec.symbols(input_ids, attention_mask)  # (B, N, K)
        given, has_gaps, dropped = self._draw_rows(model, chunks, known_mask, input_ids, fills_gaps)
        begins = torch.ones_like(dropped) if text_start is None else text_start.bool()
        begins = begins & ~dropped  # rows without context do not know where they stand
        states = read_text(model, symbols, chunks, real, given, has_gaps, begins)  # (B, 1 + N, D)

        if is_local and known_mask is None and model.training:
            given = given | self._draw_ends(given)

        # only the chunks and times at which some token has its turn pass the head
        times = self._times(model, chunks, timestep)  # (B, M, N)
        progress, has_turn = self._turns(model, times)  # (B, M, N, K) each
        if is_local and timestep is None:  # one pass scores every token as its turn begins
            progress, has_turn = torch.zeros_like(progress), torch.ones_like(has_turn)
        wanted = (real & ~given)[:, None] & has_turn  # (B, M, N, K)
        row, draw, place = wanted.any(-1).nonzero(as_tuple=True)  # (R,) each
        # state i stands before chunk i; rows without context have the state before the text
        before = states[row, torch.where(dropped[row], 0, place)]  # (R, D)
        place_times = head.warp(progress[row, draw, place])  # (R, K)
        place_times = torch.where(given[row, place], 1.0, place_times)  # clean
        own = chunks[row, place]  # (R, K)
        noisy = head.add_noise(symbols, own, place_times)  # (R, C)
        # a local head reads at each place only the tokens before it, which are known by then
        read_times = torch.ones_like(place_times) if is_local else place_times
        # feed-forward layers do not mix latents, so all R fit in one row of a batch
        states = model.transformer(
            noisy[None].to(model.dtype),
            times[row, draw, place][None],
            features=head.read(symbols, noisy[None], read_times[None], own[None]),
            entry=before[None],
            given=given[row, place][None] if is_local else None,
        ).latents  # (1, R, K * E)
        chosen = wanted[row, draw, place]  # (R, K)
        inputs = (noisy[None], place_times[None], own[None], chosen[None])
        mean, losses = head.nll(states, symbols, *inputs)  # (), (1, R, K)
        everywhere = losses.new_zeros(chunks.shape)
        counts = everywhere.index_put((row, place), chosen.float(), accumulate=True)  # over draws
        tokens = everywhere.index_put((row, place), losses[0], accumulate=True)  # (B, N, K)
        return _token_output(mean, tokens / counts.clamp_min(1), chosen)

    def _turns(self, model, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Progress of tokens at `times (B, M, N)`, and which have a loss: `(B, M, N, K)` each."""
        progress = model.token_head.progress(times)
        has_begun = progress > -EARLY if model.training else progress >= 0
        return progress, (progress < 1) & has_begun  # in eval mode only in its turn

    def _draw_rows(
        self, model, chunks, known_mask, input_ids, fills_gaps: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens that are given, `(B, N, K)`, rows with gaps and rows without context, `(B,)`."""
        batch, length, size = chunks.shape
        device = chunks.device
        given = torch.zeros(chunks.shape, dtype=torch.bool, device=device)
        if known_mask is not None:
            given = model.codec.symbols(input_ids, known_mask)[1]
        has_gaps = torch.full((batch,), fills_gaps, device=device)
        dropped = torch.zeros_like(has_gaps)
        if model.training:
            draws = torch.rand(2, batch, device=device)
            dropped = draws[0] < self.context_dropout
            if known_mask is None:
                has_gaps = (draws[1] < self.infill_rate) & ~dropped
                known = draw_gaps(batch, length * size, device).view(given.shape)  # in tokens
                given = known & has_gaps[:, None, None]  # other rows are plain text
        return given, has_gaps, dropped

    def _draw_ends(self, given: torch.Tensor) -> torch.Tensor:
        """Draw tokens at the ends of chunks that a local head may read before their turn, `(B, N,
        K)`; none in chunks with others that are `given (B, N, K)`.

        Gaps alone end in so few chunks that it would hardly learn what stands behind them.
        """
        batch, length, size = given.shape
        first = torch.randint(1, size, (batch, length, 1), device=given.device) if size > 1 else 1
        drawn = torch.rand(batch, length, 1, device=given.device) < self.infill_rate
        drawn &= ~given.any(-1, keepdim=True)
        return drawn & (torch.arange(size, device=given.device) >= first)

    def _times(self, model, chunks: torch.Tensor, timestep: float | None) -> torch.Tensor:
        """Times `(B, M, N)` of chunks `(B, N, K)`: M strata, or in eval mode all turns."""
        batch, length, _ = chunks.shape
        device = chunks.device
        turns = model.token_head.num_symbols
        if timestep is not None:
            return torch.full((batch, 1, length), timestep, device=device)
        if model.config.transformer_config.local_head:
            return torch.zeros(batch, 1, length, device=device)
        if not model.training:
            starts = torch.arange(turns, device=device) / turns  # (K,): turn k begins at k / K
            return starts[:, None].expand(batch, turns, length)
        draws = self.noise_draws
        shares = torch.rand(batch, draws, length, device=device)
        # stratified: the draws of a chunk cover [0, 1) evenly, at less variance
        shares = (shares + torch.arange(draws, device=device)[:, None]) / draws
        on_turn = torch.rand(batch, 1, 1, device=device) < self.turn_share  # for whole rows
        return torch.where(on_turn, (shares * turns).floor() / turns, shares)  # begin of a turn


def _refuse_leading_padding(mask: torch.Tensor | None) -> None:
    """Raise `ValueError` if a row begins with padding; on the CPU alone, elsewhere the host would
    wait."""
    if mask is None or mask.device.type != "cpu":
        return
    late = ~mask[:, 0].bool() & mask.bool().any(dim=1)
    if bool(late.any()):
        raise ValueError(
            f"row {int(late.nonzero()[0])} of the batch begins with padding, and chunks count from "
            "the first token of a text; pad on the right (`tokenizer.padding_side = 'right'`)."
        )


def _token_output(
    loss: torch.Tensor, token_losses: torch.Tensor, chosen: torch.Tensor
) -> TokComOutput:
    """The output of an objective that is the mean cross-entropy of the `chosen` tokens."""
    nothing = loss.new_zeros(())
    output = TokComOutput(loss, loss.detach(), nothing, token_losses=token_losses.detach())
    output.weight = chosen.sum().float()
    return output


def _any_draw(states: torch.Tensor) -> torch.Tensor:
    """One of the M draws `(B, M, N, C)` of each latent, `(B, N, C)`; the times of draw m lie in the
    m-th of M strata, so none of them stands for all."""
    batch, draws, length, channels = states.shape
    if draws == 1:
        return states[:, 0]
    drawn = torch.randint(draws, (batch, 1, length, 1), device=states.device)
    return states.gather(1, drawn.expand(-1, -1, -1, channels))[:, 0]


def _check_weights(mse_weight: float, ce_weight: float) -> None:
    """Raise `ValueError` if a weight of the two terms of a loss is negative, or both are 0."""
    if mse_weight < 0 or ce_weight < 0 or mse_weight + ce_weight == 0:
        raise ValueError(
            f"`mse_weight` ({mse_weight}) and `ce_weight` ({ce_weight}) must not be negative, "
            "and one of them must be positive."
        )


@dataclass
class TokComTokenObjective(TokComFlowObjective):
    """Cross-entropy of the tokens of noisy chunks, for models in which one network reads context
    and noise."""

    def loss(
        self,
        model,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        timestep: float | None = None,
        known_mask: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        text_start: torch.Tensor | None = None,
    ) -> TokComOutput:
        """`text_start` comes with the data and does not matter here."""
        clean = model.clean_latents(latents, input_ids, attention_mask)
        chunks, real = model.codec.symbols(input_ids, attention_mask)  # (B, N, K)
        symbols = model.symbols()
        given = None
        if known_mask is not None:
            given = model.codec.symbols(input_ids, known_mask)[1]
        elif model.training and model.shows_some:
            exists = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            given = model.codec.symbols(input_ids, draw_known(exists.bool(), self.infill_rate))[1]
        # rows that lose their context must not see a prompt; what is drawn here is noise to them
        hides = known_mask is not None
        tokens = {"known_tokens": given, "chunks": chunks, "symbols": symbols}
        found = model.predict_noised(self, clean, timestep, hides_known=hides, **tokens)
        draws = found.states.shape[1]
        progress = model.token_head.progress(found.times)  # (B, M * N, K)
        wanted = real if given is None else real & ~given  # (B, N, K)
        # only tokens whose turn it is: before it all is noise, after it all is known
        chosen = wanted.repeat(1, draws, 1) & (progress > -EARLY) & (progress < 1)
        states = found.states.flatten(1, 2)  # (B, M * N, K * E)
        inputs = (found.noisy, found.place_times, chunks.repeat(1, draws, 1), chosen)
        mean, losses = model.token_head.nll(states, symbols, *inputs)  # (), (B, M * N, K)
        return _token_output(mean, losses.unflatten(1, (draws, -1))[:, 0], chosen)  # of draw 0


@dataclass
class TokComLatentObjective(TokComFlowObjective):
    """Squared error of the clean latents of pictures and clips, perhaps with captions in front."""

    def loss(
        self,
        model,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        timestep: float | None = None,
        latents: torch.Tensor | None = None,
    ) -> TokComOutput:
        """`input_ids` and `attention_mask (B, L)` are those of captions."""
        clean = model.clean_latents(latents, pixel_values)
        prefix = None
        if model.condition_embedding is not None:
            prefix = model.condition(model.require(input_ids, "input_ids"), attention_mask)
        found = model.predict_noised(self, clean, timestep, prefix=prefix)
        error = model.mean_squared_error(clean, found)
        weight = found.loss_mask.sum().float()
        return TokComOutput(loss=error, mse_loss=error.detach(), weight=weight)


@dataclass
class TokComTextLatentObjective(TokComFlowObjective):
    """Squared error of the clean latents of texts, and cross-entropy through the decoder.

    Args:
        mse_weight, ce_weight: of the two terms; not negative, and not both 0.
        ce_share: in (0, 1], share of the latents, drawn at every step, that the cross-entropy is
            computed of. The decoder is most of a step where it is as deep as the transformer.
    """

    mse_weight: float = 1.0
    ce_weight: float = 0.2
    ce_share: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _check_weights(self.mse_weight, self.ce_weight)
        if not 0 < self.ce_share <= 1:
            raise ValueError(f"`ce_share` ({self.ce_share}) must be in (0, 1].")

    def loss(
        self,
        model,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        timestep: float | None = None,
        known_mask: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        text_start: torch.Tensor | None = None,
    ) -> TokComOutput:
        """A latent is known if all its tokens are; `text_start` does not matter here."""
        clean = model.clean_latents(latents, input_ids, attention_mask)
        found = self._predict(model, clean, timestep, known_mask)
        error = model.mean_squared_error(clean, found)
        loss = self.mse_weight * error
        estimate, loss, weight = self._estimate(model, _any_draw(found.states), loss)
        # at weight 0 the cross-entropy is a figure to report, without a gradient
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
            texts = (input_ids, attention_mask)
            tokens, count = self._decoded_nll(model, estimate, found.loss_mask, *texts)
            cross_entropy = tokens.sum() / count
        is_whole = tokens.shape[1] == found.loss_mask.shape[1]  # a drawn share has no fixed places
        return TokComOutput(
            loss=loss + weight * cross_entropy,
            ce_loss=cross_entropy.detach(),
            mse_loss=error.detach(),
            token_losses=tokens.detach() if is_whole else None,
            weight=found.loss_mask.sum().float(),
        )

    def _predict(self, model, clean, timestep, known_mask):
        known = None
        if known_mask is not None:
            known = model.codec.whole_chunks(known_mask)  # (B, N)
        return model.predict_noised(
            self, clean, timestep, known_latents=known, hides_known=known is not None
        )

    def _estimate(self, model, states, loss) -> tuple[torch.Tensor, torch.Tensor, float]:
        """What is decoded, the loss so far, and the weight of the cross-entropy."""
        return states, loss, self.ce_weight

    def _decoded_nll(self, model, estimate, loss_mask, input_ids, attention_mask):
        """Nats `(B, n, K)` of the tokens that `estimate (B, N, C)` stands for, and their number.

        n is N, or in training a share `ce_share` of it, drawn at random.
        """
        chunks, real = model.codec.to_chunks(input_ids, attention_mask)  # (B, N, K)
        counted = real & loss_mask[..., None]  # (B, N, K)
        if model.training and self.ce_share < 1:
            count = max(1, round(self.ce_share * estimate.shape[1]))
            # other latents in every step, so all are trained in time
            shuffled = torch.rand(loss_mask.shape, device=loss_mask.device).argsort(1)
            chosen = shuffled[:, :count, None]  # (B, n, 1)
            estimate = estimate.gather(1, chosen.expand(-1, -1, estimate.shape[2]))
            chunks = chunks.gather(1, chosen.expand(-1, -1, chunks.shape[2]))
            counted = counted.gather(1, chosen.expand(-1, -1, counted.shape[2]))
        return model.codec.nll(estimate, chunks) * counted, counted.sum().clamp_min(1)


@dataclass
class TokComHeadObjective(TokComTextLatentObjective):
    """The loss of a finished model's latent head, and cross-entropy through the decoder."""

    stage: ClassVar[str] = "head"

    def check(self, config) -> None:
        super().check(config)
        plain = TokComTextLatentObjective
        if (self.mse_weight, self.ce_weight) != (plain.mse_weight, plain.ce_weight):
            raise ValueError(
                f"`mse_weight` ({self.mse_weight}) and `ce_weight` ({self.ce_weight}) have no effect "
                "in stage 'head', which has no squared error to weigh against; leave them out."
            )
        if not config.has_latent_head:
            raise ValueError(
                "stage 'head' trains `latent_head` and `latent_refiner`, but both are 'none'."
            )

    def trained_parts(self, model) -> list[nn.Module]:
        return [model.latent_head]

    def _predict(self, model, clean, timestep, known_mask):
        with torch.no_grad():  # all but the latent head is frozen
            return super()._predict(model, clean, timestep, known_mask)

    def _estimate(self, model, states, loss) -> tuple[torch.Tensor, torch.Tensor, float]:
        estimate, loss = model.latent_head(states)  # its own loss replaces the squared error
        return estimate, loss, 1.0


@dataclass
class TokComStreamObjective(TokComObjective):
    """Squared error of the streams that a row's task generates, and cross-entropy of its texts.

    Args:
        mse_weight, ce_weight: of the two terms; not negative, and not both 0.
        context_dropout: share of the given streams that are left out, for classifier-free guidance.
        stream_weights: stream -> weight in the loss, 1 by default.
        generation_rates: stream -> how often rows that have it generate it, 0.5 by default.
    """

    mse_weight: float = 1.0
    ce_weight: float = 1.0
    context_dropout: float = 0.1
    stream_weights: dict[str, float] | None = None
    generation_rates: dict[str, float] | None = None

    infill_rate: ClassVar[float] = 0.0  # these two for `predict_noised`
    noise_draws: ClassVar[int] = 1

    def check(self, config) -> None:
        names = sorted(config.codec_config.stream_configs())
        weights = self.stream_weights or {}
        rates = self.generation_rates or {}
        if not 0 <= self.context_dropout < 1:
            raise ValueError(f"`context_dropout` ({self.context_dropout}) must be in [0, 1).")
        _check_weights(self.mse_weight, self.ce_weight)
        if (
            set(weights) - set(names)
            or min(weights.values(), default=1) < 0
            or not sum(weights.values() or [1])
        ):
            raise ValueError(
                f"`stream_weights` ({weights}) must be of the streams {names}, not negative and "
                "not all 0."
            )
        if set(rates) - set(names) or not all(0 < rate <= 1 for rate in rates.values()):
            raise ValueError(
                f"`generation_rates` ({rates}) must be of the streams {names}, in (0, 1]."
            )

    def loss(
        self,
        model,
        streams: dict[str, torch.Tensor],
        present: dict[str, torch.Tensor] | None = None,
        given: list[str] | None = None,
        timestep: float | None = None,
    ) -> TokComOutput:
        """The streams named by `given` are clean in all rows that have them; by default every row
        draws its task."""
        codec = model.codec
        with torch.no_grad(), model.without_autocast():
            clean = codec.encode(streams, present)
        task = self._task(model, clean, given)
        # a stream is whole or absent, so its first latent tells
        shown = [name for name in streams if clean.mask[:, codec.places[name].start].any()]
        if not shown:
            raise ValueError(
                "no row of this batch has any stream; `present` must be true somewhere."
            )
        prediction, loss_mask = self._predict(model, clean, timestep, task, shown)  # (B, 1, N, C)
        errors = prediction.float() - clean.latents[:, None].float()  # (B, 1, N, C)
        error = codec.squared_error(errors, loss_mask, self.stream_weights)
        loss = self.mse_weight * error
        cross_entropy = None
        if self.ce_weight:
            cross_entropy = codec.text_nll(
                prediction[:, 0], streams, loss_mask, self.stream_weights
            )
            loss = loss if cross_entropy is None else loss + self.ce_weight * cross_entropy
        return TokComOutput(
            loss=loss,
            ce_loss=None if cross_entropy is None else cross_entropy.detach(),
            mse_loss=error.detach(),
            # rows, not latents: every stream's mean counts alike, however many latents it has
            weight=loss_mask.any(-1).sum().float(),
        )

    def _task(self, model, clean, given) -> tuple[torch.Tensor, torch.Tensor]:
        """Which latents are given and which are used at all, `(B, N)` each."""
        if given is None:
            dropout = self.context_dropout if model.training else 0.0
            return model.codec.draw_task(clean.mask, dropout, self.generation_rates)
        model.codec.check_names(given)
        everywhere = clean.mask.new_ones(len(clean.mask))  # (B,)
        known = model.codec.exists(
            dict.fromkeys(given, everywhere), len(everywhere), everywhere.device
        )
        return known & clean.mask, clean.mask

    def _predict(self, model, clean, timestep, task, names) -> tuple[torch.Tensor, torch.Tensor]:
        """States and loss mask of all latents, though only those of the streams `names` pass the
        network."""
        if len(names) == len(model.codec.names):
            found = model.predict_noised(self, clean, timestep, task=task)
            return found.states, found.loss_mask
        places = model.codec.index_of(names, clean.latents.device)
        part = TokComCodecOutput(
            clean.latents[:, places], clean.position_ids[:, places], clean.mask[:, places]
        )
        task = tuple(mask[:, places] for mask in task)
        found = model.predict_noised(self, part, timestep, task=task)
        states = found.states.new_zeros(*found.states.shape[:2], *clean.latents.shape[1:])
        states = states.index_copy(2, places, found.states)  # (B, M, N, C)
        return states, torch.zeros_like(clean.mask).index_copy(1, places, found.loss_mask)


# ---- which one ----

# what a model encodes -> the regression of its latents
LATENT_OBJECTIVES: dict[str, type[TokComObjective]] = {
    "input_ids": TokComTextLatentObjective,
    "pixel_values": TokComLatentObjective,
    "streams": TokComStreamObjective,
}


def objective_class(config, stage: str) -> type[TokComObjective]:
    """The objective of a stage of a model with this configuration; raises `ValueError` for an
    unknown stage."""
    if stage not in STAGES:
        raise ValueError(f"`stage` ({stage!r}) must be one of {STAGES}.")
    if stage == "codec":
        return TokComCodecObjective
    if stage == "head":
        return TokComHeadObjective
    if config.prediction_type == "tokens":
        has_context = config.transformer_config.start_latents
        return TokComNextChunkObjective if has_context else TokComTokenObjective
    return LATENT_OBJECTIVES[config.codec_config.input_name]


def build_objective(config, stage: str, settings: dict[str, Any]) -> TokComObjective:
    """The objective of a stage with these settings; raises `ValueError` for unknown or impossible
    ones."""
    chosen = objective_class(config, stage)
    if chosen is TokComCodecObjective:
        return chosen()
    check_settings(chosen, settings, f"{stage}.objective.")
    objective = chosen(**settings)
    objective.check(config)
    return objective


__all__ = [
    "STAGES",
    "EARLY",
    "TokComCodecObjective",
    "TokComHeadObjective",
    "TokComFlowObjective",
    "TokComLatentObjective",
    "TokComNextChunkObjective",
    "TokComObjective",
    "TokComOutput",
    "TokComStreamObjective",
    "TokComTextLatentObjective",
    "TokComTokenObjective",
    "build_objective",
    "objective_class",
]
