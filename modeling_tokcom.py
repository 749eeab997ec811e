"""TokComModel: a codec and the transformer that learns the flow between noise and the codec's
latents.

Notable choices:
- `x_t = (1 - t) x0 + t x1` with t = 1 clean; the transformer predicts x1.
- What training minimises is an object, `objective`, which `set_stage` chooses; `forward` returns
  its loss.
- The order in which latents are generated is a tensor, so left-to-right blocks, infilling and the
  bidirectional model share one code path.

Shape legend: B batch, T tokens, K tokens per chunk, N = T/K latents, C latent channels, A position
axes, V vocabulary.
"""

import inspect
from typing import Any, NamedTuple

import torch

# diffusers looks a component's base class up in the module of the component
from transformers import PreTrainedModel  # noqa: F401
from transformers.cache_utils import Cache

from .codec_chunk_tokcom import TokComCodecOutput, TokComDecoderOutput
from .codec_composite_tokcom import (
    STREAM_CODECS,
    TokComAudioOutput,
    TokComCompositeCodec,
    TokComImageOutput,
    TokComVideoOutput,
)
from .configuration_tokcom import TokComConfig
from .heads_tokcom import TokComChoice, TokComLatentHead, TokComSymbols, TokComTokenHead
from .integrity_tokcom import CheckedWeights
from .layers_tokcom import TokComPreTrainedModel, TokComTokenEmbedding, entry_point
from .objective_tokcom import (
    TokComFlowObjective,
    TokComOutput,
    TokComStreamObjective,
    build_objective,
)
from .scheduling_tokcom import draw_known, generation_order, sample_times
from .transformer_tokcom import (
    TokComTransformer,
    TokComTransformerOutput,
    block_causal_mask,
)

CODECS: dict[str, Any] = {
    **STREAM_CODECS,
    TokComCompositeCodec.config_class.model_type: TokComCompositeCodec,
}


def _repeat(tensor: torch.Tensor | None, copies: int) -> torch.Tensor | None:
    """`copies` of a batch one after the other."""
    if tensor is None or copies == 1:  # without a copy in memory
        return tensor
    return torch.cat([tensor] * copies)


class NoisedPass(NamedTuple):
    """One pass over noisy latents.

    `states (B, M, N, ...)` are the transformer's outputs, `loss_mask (B, N)` where they are
    trained, `noisy (B, M * N, C)` what was read, `times (B, M * N)` the times of latents and, with
    a token head, `place_times (B, M * N, K)` those of their places.
    """

    states: torch.Tensor
    loss_mask: torch.Tensor
    noisy: torch.Tensor
    times: torch.Tensor
    place_times: torch.Tensor | None


class _Seen(NamedTuple):
    """`times (B, M * N)` of the noise, the times that the network is `told`, its attention mask,
    and the loss mask."""

    times: torch.Tensor
    told: torch.Tensor
    attention_mask: torch.Tensor
    loss_mask: torch.Tensor


class TokComModel(CheckedWeights, TokComPreTrainedModel):
    """Latent generative model of tokens: `encode`, `denoise`, `decode`, and the training loss of
    both stages."""

    config: TokComConfig
    main_input_name = "input_ids"

    def __init__(self, config: TokComConfig):
        super().__init__(config)
        self.codec = CODECS[config.codec_config.model_type]._from_config(config.codec_config)
        self.transformer = TokComTransformer._from_config(config.transformer_config)
        self.token_head = TokComTokenHead(config) if config.prediction_type == "tokens" else None
        self.latent_head = TokComLatentHead(config) if config.has_latent_head else None
        self.condition_embedding = None
        if config.condition_vocab_size:
            width = config.transformer_config.hidden_size
            self.condition_embedding = TokComTokenEmbedding(config.condition_vocab_size, width)
        self.post_init()
        # those that this model has: accelerate refuses the name of a class that it does not find
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = sorted(present.intersection(type(self)._no_split_modules))
        # most models are loaded to sample or to train the flow
        self.set_stage("flow")

    def get_input_embeddings(self):
        return self.codec.get_input_embeddings()

    def set_stage(self, stage: str, **settings) -> None:
        """Choose what `forward` returns the loss of and which parts are trained; all other parts
        are frozen.

        `stage` is `"codec"`, `"flow"` or `"head"`. The `settings` are the fields of its objective,
        those of stage codec the fields of the codec's `loss_class`. Neither is saved: they belong
        to a training run. Raises `ValueError` for unknown or impossible ones.
        """
        self.objective = build_objective(self.config, stage, settings)
        if stage == "codec":
            self.codec.set_loss(**settings)
        self.requires_grad_(False)  # what an earlier stage trained, too
        for part in self.objective.trained_parts(self):
            part.requires_grad_(True)

    def compilable_parts(self) -> list[torch.nn.Module]:
        """The networks that the stage trains; their `.compile()` works in place and keeps the names
        of parameters."""
        return self.objective.compilable_parts(self)

    def _check_ids(self, input_ids: torch.Tensor) -> None:
        vocab_size = self.config.text_vocab_size
        if not input_ids.numel():
            return
        low, high = torch.stack(input_ids.aminmax()).tolist()  # one read
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise ValueError(
                f"token id {bad} is outside the model's vocabulary of {vocab_size}; "
                "tokenize with the tokenizer saved beside the model."
            )

    @entry_point
    def encode(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        streams: dict[str, torch.Tensor] | None = None,
        present: dict[str, torch.Tensor] | None = None,
    ) -> TokComCodecOutput:
        """Token ids, images, clips or several streams -> standardised latents.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): T a multiple of K, ids below V.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 marks padding.
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`, of clips `(B, c, F, H, W)`):
                what a model of images or clips encodes instead.
            streams (`dict[str, torch.Tensor]`, *optional*): what a model of several streams
                encodes: ids `(B, T)`, pixels, log-mel `(B, mel bands, F)`, by name.
            present (`dict[str, torch.BoolTensor]`, *optional*): rows `(B,)` that have a stream; by
                default all.

        Returns: `latents (B, N, C)`, `position_ids (B, N, A)`, `mask (B, N)`. Raises `ValueError`
        on a bad length or id.
        """
        inputs = {"input_ids": input_ids, "pixel_values": pixel_values, "streams": streams}
        name = self.config.codec_config.input_name
        value = self.require(inputs[name], name)
        for ids in self.codec.token_ids(value):
            self._check_ids(ids)
        mask = attention_mask if streams is None else present
        return self.codec.encode(value, mask)

    def require(self, value: torch.Tensor | None, name: str) -> torch.Tensor:
        if value is None:
            raise ValueError(
                f"`{name}` is missing, which a model with {self.config.codec_config.model_type!r} "
                "reads."
            )
        return value

    @entry_point
    def condition(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Caption ids `(B, L)` -> what the transformer reads before an image's latents,
        `(B, L, D)`, which of it exists, `(B, L)`, and where it stands, `(L,)`: from
        -`condition_length` on, however much padding follows.

        Raises `ValueError` for captions that are longer than that.
        """
        if self.condition_embedding is None:
            raise ValueError(
                "this model was trained without captions (`condition_vocab_size` is 0); leave the "
                "prompt out."
            )
        longest = self.config.condition_length
        length = input_ids.shape[1]
        if length > longest:
            raise ValueError(
                f"a caption has {length} tokens, more than the model's maximum of {longest} "
                "(`condition_length`); shorten it."
            )
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask.bool()
        # negative, so that a caption stands before the latents, whose positions begin at 0
        places = torch.arange(length, device=input_ids.device) - longest  # (L,)
        return self.condition_embedding(input_ids), real, places

    def denoise(
        self, latents: torch.Tensor, timestep: torch.Tensor | float, *args, **kwargs
    ) -> TokComTransformerOutput:
        """Estimate the clean latents: `.latents (B, S, C)`. The arguments are those of
        `predict`."""
        output = self.predict(latents, timestep, *args, **kwargs)
        if self.token_head is not None:
            times = self.token_head.place_times(self._spread(timestep, latents))  # (B, S, K)
            means = self.token_head.mean_latents(output.latents, self.symbols(), latents, times)
            output.latents = means.to(latents.dtype)
        output.latents = self.quantize(output.latents)
        return output

    def quantize(self, latents: torch.Tensor) -> torch.Tensor:
        """An estimate `(..., N, C)` as it is used: with `quantize_prediction` the nearest codes,
        otherwise itself."""
        return self.codec.snap(latents) if self.config.quantize_prediction else latents

    @entry_point
    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor | float,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        symbols: TokComSymbols | None = None,
        times: torch.Tensor | None = None,
        chunks: torch.Tensor | None = None,
        uncertain: TokComChoice | None = None,
        entry: torch.Tensor | None = None,
        given: torch.Tensor | None = None,
        **kwargs,
    ) -> TokComTransformerOutput:
        """What the network predicts, as `.latents`: the clean latents, or what a token head reads,
        `(B, S, K * E)`.

        `timestep`, 1 = clean, is `(B, S)`; `(B,)` or a scalar is broadcast over the latents. It may
        lie outside [0, 1]: not begun, or done. The other arguments are those of
        `TokComTransformer.forward`. Callers that denoise many times save work with `symbols`, what
        the method of that name gives, `times (B, S, K)`, the head's `place_times`,
        `chunks (B, S, K)`, the ids of the tokens that are clean already, `uncertain`, those that
        are partly noise, and `entry (M * B, S, D)`: M of them per latent, such as with and without
        context, give M predictions in one pass.
        """
        timestep = self._spread(timestep, latents)
        features = None
        if self.token_head is not None:
            times = self.token_head.place_times(timestep) if times is None else times
            symbols = self.symbols() if symbols is None else symbols
            features = self.token_head.read(symbols, latents, times, chunks, uncertain)
        copies = 1 if entry is None else len(entry) // len(latents)  # M
        return self.transformer(
            _repeat(latents.to(self.dtype), copies),
            _repeat(timestep.clamp(0, 1), copies),  # beyond them a latent is noise, or clean
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            features=_repeat(features, copies),
            entry=entry,
            given=_repeat(given, copies),
            **kwargs,
        )

    @staticmethod
    def _spread(timestep: torch.Tensor | float, latents: torch.Tensor) -> torch.Tensor:
        """Times of any shape that fits as `(B, S)`, float32."""
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=latents.device)
        if timestep.ndim == 1:
            timestep = timestep[:, None]  # (B, 1)
        return timestep.expand(latents.shape[:2])

    @entry_point
    def symbols(self) -> TokComSymbols | None:
        """What the codec's tokens look like; None for models that do not predict tokens."""
        if self.token_head is None:
            return None
        with torch.no_grad():  # the codec is frozen in all stages that ask
            table = self.codec.symbol_table().to(self.device)  # (K, V, C / K)
        return self.token_head.symbols(table)

    @entry_point
    def refine(self, latents: torch.Tensor) -> torch.Tensor:
        """What is decoded for the transformer's final estimate `(B, N, C)`: itself, unless there is
        a latent head."""
        if self.latent_head is None:
            return latents
        return self.latent_head(latents.to(self.dtype))[0].to(latents.dtype)  # without its loss

    @entry_point
    def from_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(B, N, R)` of a codec with a quantiser -> standardised latents `(B, N, C)`; raises
        `ValueError` for others."""
        quantizer = getattr(self.codec, "quantizer", None)
        if quantizer is not None:
            levels = getattr(quantizer, "num_levels", 1)  # R, codes of a latent
            size = quantizer.num_codes
            if codes.ndim != 3 or codes.shape[2] != levels:
                raise ValueError(
                    f"codes have shape {tuple(codes.shape)} but (B, N, {levels}) is needed; give "
                    "what encode gave."
                )
            if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
                raise ValueError(
                    f"codes lie between {int(codes.min())} and {int(codes.max())} but there are "
                    f"{size}; give what encode gave."
                )
        return self.codec.from_codes(codes)

    @entry_point
    def decode(
        self, latents: torch.Tensor, **kwargs
    ) -> TokComDecoderOutput | TokComImageOutput | TokComVideoOutput:
        """Standardised latents `(B, N, C)` -> `.logits (B, N * K, V)`, or
        `.pixel_values (B, 3, H, W)` of images, for which `num_tokens` keeps the first ones only, or
        `(B, c, F, H, W)` of clips, for which `height` and `width` may differ from those of
        training."""
        return self.codec.decode(latents, **kwargs)

    @entry_point
    def decode_stream(
        self, name: str, latents: torch.Tensor
    ) -> TokComDecoderOutput | TokComImageOutput | TokComVideoOutput | TokComAudioOutput:
        """The stream `name` of standardised latents `(B, N, C)` of several -> what its codec's
        `decode` gives."""
        return self.codec.decode_stream(name, latents)

    @entry_point
    def to_ids(self, latents: torch.Tensor) -> torch.Tensor:
        """Standardised latents `(B, N, C)` -> the most likely token ids `(B, N * K)`."""
        return self.codec.to_ids(latents)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        timestep: float | None = None,
        known_mask: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        streams: dict[str, torch.Tensor] | None = None,
        present: dict[str, torch.Tensor] | None = None,
        given: list[str] | None = None,
        text_start: torch.Tensor | None = None,
    ) -> TokComOutput:
        """The loss of the objective that `set_stage` has chosen; `objective_tokcom.py` says what
        each one reads.

        Args:
            input_ids, attention_mask (`(B, T)`): a text, 0 on padding; of a model of pictures or
                clips, the captions.
            timestep (`float`, *optional*): one t in [0, 1] for all latents, in stage flow; drawn by
                default.
            known_mask (`(B, T)`, *optional*): 1 on tokens that are given, such as a prompt. They
                are clean and not predicted, and a share `context_dropout` of the rows does without
                them.
            latents (`(B, N, C)`, *optional*): what `encode` gives for this text, which saves
                encoding it; no token may be padding.
            pixel_values (`(B, 3, H, W)`, of clips `(B, c, F, H, W)`): what a model of pictures or
                clips learns.
            streams, present: as `encode` reads them. given (`list[str]`, *optional*): streams that
                are clean in all rows that have them; by default every row draws a task of its own.
            text_start (`torch.BoolTensor` of shape `(B,)`, *optional*): rows that begin where a
                text begins, for models with `start_latents`; all by default.

        Raises `ValueError` for an input that is missing, or that this objective does not read.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "timestep": timestep,
            "known_mask": known_mask,
            "latents": latents,
            "pixel_values": pixel_values,
            "streams": streams,
            "present": present,
            "given": given,
            "text_start": text_start,
        }
        # an objective names what it reads, so an input that it would ignore is an error
        inputs = {name: value for name, value in inputs.items() if value is not None}
        self._check_inputs(inputs)
        return self.objective.loss(self, **inputs)

    def _check_inputs(self, inputs: dict[str, Any]) -> None:
        """Raise `ValueError` for inputs that are missing, of the wrong kind, or ids outside the
        vocabulary."""
        read = inspect.signature(self.objective.loss).parameters
        name = self.config.codec_config.input_name
        # encoded latents replace what was encoded, unless the loss needs it too
        if "latents" not in inputs or read[name].default is inspect.Parameter.empty:
            self.require(inputs.get(name), name)
        unread = sorted(set(inputs) - set(read))
        if unread:
            raise ValueError(
                f"{type(self.objective).__name__} does not read {unread}; leave them out."
            )
        captions = [inputs.get("input_ids")]  # unless the texts are what is encoded
        for ids in self.codec.token_ids(inputs.get(name)) or captions:
            # on other devices the check would wait for them at every step
            if ids is not None and ids.device.type == "cpu":
                self._check_ids(ids)

    def channel_times(self, timestep: torch.Tensor) -> torch.Tensor:
        """Times of latents `(B, N)` -> t of each channel in [0, 1], `(B, N, C)`, or `(B, N, 1)` if
        all have the same."""
        if self.token_head is None:
            return timestep[..., None].clamp(0, 1)
        # every token has its own share of the channels, and its own time
        channels = self.config.codec_config.latent_channels // self.token_head.num_symbols
        return self.token_head.place_times(timestep).repeat_interleave(channels, dim=-1)

    # ---- training: noise, and a pass over it ----

    @torch.no_grad()
    def clean_latents(self, latents: torch.Tensor | None, *source) -> TokComCodecOutput:
        """What the frozen codec makes of the data, or the `latents` that were encoded before."""
        if latents is not None:
            return self.codec.known(latents.to(self.dtype))
        with self.without_autocast():
            return self.codec.encode(*source)

    def without_autocast(self) -> torch.autocast:
        """Latents are targets: those that are encoded now must be those that were cached."""
        return torch.autocast(self.device.type, enabled=False)

    def mean_squared_error(self, clean: TokComCodecOutput, found: NoisedPass) -> torch.Tensor:
        """Mean over trained latents, draws and channels of the squared error of x1."""
        # float32: a mean over many small squares
        errors = self.quantize(found.states.float()) - clean.latents[:, None].float()
        count = (found.states.shape[1] * found.loss_mask.sum()).clamp_min(1)  # all M draws count
        weights = found.loss_mask[:, None] / count  # (B, 1, N)
        return (errors.square().mean(-1) * weights).sum()

    @property
    def shows_some(self) -> bool:
        """Whether training shows a part of every row clean: of bidirectional models that know times
        apart."""
        config = self.config.transformer_config
        return config.block_size is None and config.per_latent_timestep

    def predict_noised(
        self,
        objective: TokComFlowObjective | TokComStreamObjective,
        clean: TokComCodecOutput,
        timestep: float | None = None,
        known_latents: torch.Tensor | None = None,
        known_tokens: torch.Tensor | None = None,
        hides_known: bool = False,
        task: tuple[torch.Tensor, torch.Tensor] | None = None,
        chunks: torch.Tensor | None = None,
        symbols: TokComSymbols | None = None,
        prefix: tuple[torch.Tensor, ...] | None = None,
    ) -> NoisedPass:
        """Noise the latents M times, with one time per block, and predict from them.

        Args:
            objective: says M and how often context is dropped and gaps are made, in training.
            known_latents (`(B, N)`), known_tokens (`(B, N, K)`): what is clean, if that is known.
            hides_known: rows that lose their context do not see what is known, so it is no noise.
            task: of several streams, which latents are given and which are used, `(B, N)` each.
            chunks (`(B, N, K)`), symbols: ids and table of a token head.
            prefix: what `condition` gives.
        """
        valid = clean.mask  # (B, N), False on padding
        block_size = self.config.transformer_config.block_size
        draws = objective.noise_draws if self.training else 1
        dropout = objective.context_dropout if self.training else 0.0
        infill_rate = objective.infill_rate if self.training else 0.0
        if known_tokens is not None:
            known_latents = known_tokens.all(-1)  # (B, N): half a chunk is not known as a latent

        # times, masks and losses all follow from the order
        group_size = self.config.codec_config.group_size
        order = generation_order(valid, block_size, infill_rate, group_size)  # (B, N)
        times = sample_times(self.config, order, draws)  # (B, M, N)
        if timestep is not None:
            times = torch.full_like(times, timestep)
        times = times.flatten(1)  # (B, M * N), draw after draw
        # dropped for whole rows: guidance needs the model without any context
        sees_context = torch.rand(len(valid), device=valid.device) >= dropout

        # what is given is not predicted, and padding never is
        loss_mask = valid & ~known_latents if hides_known else valid
        if block_size is not None:
            mask = block_causal_mask(order, valid, sees_context, draws)
            seen = _Seen(times, times, mask, loss_mask)
        else:
            if known_latents is None:  # several streams draw it, too: a seed keeps its meaning
                known_latents = self._draw_known(valid, infill_rate)
            seen = self._see_all(
                valid, known_latents, times, sees_context, hides_known, task, loss_mask
            )
        if known_tokens is not None:
            known_tokens = known_tokens & sees_context[:, None, None]  # (B, N, K)
        noisy, place_times = self._add_noise(clean.latents, seen.times, draws, known_tokens)
        if prefix is not None:
            # rows that lose their context lose the caption, too
            prefix = (prefix[0], prefix[1] & sees_context[:, None], prefix[2])
        states = self._predict_from(clean, noisy, seen, place_times, chunks, symbols, prefix, draws)
        return NoisedPass(states, seen.loss_mask, noisy, seen.times, place_times)

    def _draw_known(self, valid: torch.Tensor, infill_rate: float) -> torch.Tensor:
        """What a bidirectional model is shown clean in training, `(B, N)`; nothing in eval mode."""
        if self.training and self.shows_some:
            return draw_known(valid, infill_rate, self.config.codec_config.group_size)
        return torch.zeros_like(valid)

    def _see_all(
        self, valid, known, times, sees_context, hides_known: bool, task, loss_mask
    ) -> _Seen:
        """What a bidirectional model sees: everything at once, the known part of it clean."""
        if task is not None:
            known, attention_mask = task  # a stream that is not used is hidden
            loss_mask = attention_mask
        else:
            attention_mask = valid
            if hides_known:  # rows without context see it neither clean nor as noise
                attention_mask = valid & ~(known & ~sees_context[:, None])
            known = known & sees_context[:, None]
        # t = 1 is clean
        known_times = torch.where(known, 1.0, times)
        # a network with one time for all tells known latents the time of their neighbours
        told = known_times if self.config.transformer_config.per_latent_timestep else times
        return _Seen(known_times, told, attention_mask, loss_mask & ~known)

    def _add_noise(
        self, latents, times, draws: int, known_tokens
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Noisy copies `(B, M * N, C)` of latents; with a token head also the times `(B, M * N, K)`
        of places."""
        # M noisy copies of every latent
        targets = latents.repeat(1, draws, 1)
        noise = torch.randn_like(targets) * self.config.noise_std  # x0
        place_times = None
        signal = times[..., None].clamp(0, 1)
        if self.token_head is not None:
            place_times = self.token_head.place_times(times)
            if known_tokens is not None:
                place_times = torch.where(known_tokens.repeat(1, draws, 1), 1.0, place_times)
            # the tokens of a chunk have times of their own, and each its own channels
            channels = targets.shape[-1] // place_times.shape[-1]  # of a token
            signal = place_times.repeat_interleave(channels, dim=-1)  # (B, M * N, C)
        # the flow: x_t = (1 - t) x0 + t x1
        return (1 - signal) * noise + signal * targets, place_times

    def _predict_from(
        self, clean, noisy, seen, place_times, chunks, symbols, prefix, draws: int
    ) -> torch.Tensor:
        """The transformer's outputs `(B, M, N, ...)`; block-causal models read the clean latents
        first."""
        batch, length = clean.mask.shape
        is_causal = self.config.transformer_config.block_size is not None
        features = None
        if self.token_head is not None:
            features = self.token_head.read(symbols, noisy, place_times, chunks.repeat(1, draws, 1))
            if is_causal:
                ones = torch.ones_like(place_times[:, :length])  # clean
                context = self.token_head.read(symbols, clean.latents, ones, chunks)
                features = torch.cat((context, features), dim=1)  # (B, (1 + M) N, K * E)
        inputs = noisy
        told = seen.told.clamp(0, 1)
        position_ids = clean.position_ids
        if is_causal:
            # clean latents are context for all draws, so they are read once
            inputs = torch.cat((clean.latents, noisy), dim=1)  # (B, (1 + M) N, C)
            told = torch.cat((told.new_ones(batch, length), told), dim=1)  # clean is t = 1
            position_ids = position_ids.repeat(1, 1 + draws, 1)  # each copy where its latent is
        output = self.transformer(
            inputs.to(self.dtype),
            told,
            position_ids,
            seen.attention_mask,
            num_context=length if is_causal else 0,
            features=features,
            prefix=prefix,
            group_size=clean.group_size,
        )
        return output.latents[:, -draws * length :].unflatten(1, (draws, length))  # no context


TokComConfig.register_for_auto_class()
TokComModel.register_for_auto_class("AutoModel")

__all__ = ["TokComModel", "TokComOutput"]
