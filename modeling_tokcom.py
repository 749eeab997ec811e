"""TokComModel: a codec and the transformer that learns the flow between noise and the codec's latents.

Notable choices: `x_t = (1 - t) x0 + t x1` with t = 1 clean; the transformer predicts x1 and is trained by regression,
with cross-entropy through the frozen decoder as an auxiliary; `forward` returns the loss of the stage in
`config.stage`; the order in which latents are generated is a tensor, so left-to-right blocks, infilling and the
bidirectional model share one code path.

Shape legend: B batch, T tokens, K tokens per chunk, N = T/K latents, C latent channels, A position axes, V vocabulary.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
from transformers import PreTrainedModel  # noqa: F401  diffusers looks the base class up in the module of a component
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .codec_chunk_tokcom import TokComCodecOutput, TokComDecoderOutput
from .codec_composite_tokcom import STREAM_CODECS, TokComAudioOutput, TokComCompositeCodec
from .codec_style_tokcom import TokComImageOutput
from .codec_video_tokcom import TokComVideoOutput
from .configuration_codec_tokcom import TokComCompositeCodecConfig
from .configuration_tokcom import STAGES, TokComConfig
from .heads_tokcom import TokComChoice, TokComLatentHead, TokComSymbols, TokComTokenHead
from .layers_tokcom import TokComPreTrainedModel, TokComTokenEmbedding
from .objective_tokcom import EARLY, token_loss
from .transformer_tokcom import TokComTransformer, TokComTransformerOutput, block_causal_mask

CODECS = {**STREAM_CODECS, TokComCompositeCodecConfig.model_type: TokComCompositeCodec}


@dataclass
class TokComOutput(ModelOutput):
    """What `TokComModel.forward` returns.

    Args:
        loss (`torch.FloatTensor`): scalar loss of the current stage; the only field with a gradient.
        ce_loss (`torch.FloatTensor`, *optional*): cross-entropy through the decoder, nats per real token; None for images.
        mse_loss (`torch.FloatTensor`, *optional*): flow stage: squared error of x1 per channel; codec stage of images: of
            pixels.
        kl_loss (`torch.FloatTensor`, *optional*): codec stage: KL, nats per latent.
        token_losses (`torch.FloatTensor` of shape `(B, N, K)`, *optional*): flow stage: the cross-entropy of each token,
            0 where nothing is predicted; None in training with `ce_share` below 1.
    """

    loss: torch.FloatTensor | None = None
    ce_loss: torch.FloatTensor | None = None
    mse_loss: torch.FloatTensor | None = None
    kl_loss: torch.FloatTensor | None = None
    token_losses: torch.FloatTensor | None = None


def _entry_point(method: Callable) -> Callable:
    """Let accelerate's offload hook, which is installed for `forward`, act for this method too."""

    @wraps(method)
    def wrapper(self, *args, **kwargs):
        if hasattr(getattr(self, "_hf_hook", None), "pre_forward"):
            self._hf_hook.pre_forward(self)
        return method(self, *args, **kwargs)

    return wrapper


def _check_shards(directory: str | os.PathLike) -> None:
    """Refuse an index of weights that names files outside its own directory."""
    index = os.path.join(directory, "model.safetensors.index.json")
    if not os.path.isfile(index):
        return
    with open(index, encoding="utf-8") as file:
        names = set(json.load(file).get("weight_map", {}).values())
    for name in sorted(names):
        if os.path.basename(name) != name:
            raise ValueError(
                f"{index} names the file {name!r}, which is not in its directory; do not use this checkpoint."
            )


def generation_order(
    valid: torch.Tensor, block_size: int | None, infill_rate: float, group_size: int = 1
) -> torch.Tensor:
    """Draw, for training, the step at which each latent is generated.

    Blocks of `block_size` in reading order from a random offset, so that a prompt may end anywhere; in a share
    `infill_rate` of the rows one random span is generated last, after the text that follows it. `None` is one block. Offset and
    span are multiples of `group_size`.

    Args: `valid (B, N)` gives shape and device. Returns `torch.LongTensor` of shape `(B, N)`.
    """
    batch, length = valid.shape
    index = torch.arange(length, device=valid.device).expand(batch, -1)
    if block_size is None:
        return torch.zeros_like(index)
    draws = torch.rand(4, batch, 1, device=valid.device)
    groups = length // group_size
    order = (index + (draws[0] * (block_size // group_size)).long() * group_size) // block_size
    start, end = (draws[1:3] * (groups + 1)).long().sort(dim=0).values * group_size  # (B, 1) each
    in_gap = (index >= start) & (index < end) & (draws[3] < infill_rate)
    return torch.where(in_gap, length + (index - start) // block_size, order)


def draw_known(valid: torch.Tensor, infill_rate: float, group_size: int = 1) -> torch.Tensor:
    """Latents a bidirectional model is shown clean in training: nothing, a prefix, or in a share `infill_rate` of the rows all but
    a gap, in whole groups of `group_size`; `(B, N)` in and out. At least one group that exists stays unknown."""
    draws = torch.rand(3, len(valid), 1, device=valid.device)
    rank = (valid.cumsum(1) - 1) // group_size  # among those that exist
    count = valid.sum(1, keepdim=True) // group_size
    start, end = (draws[:2] * count).long().sort(dim=0).values
    gap = torch.where(draws[2] < infill_rate, rank > end, False)
    return valid & ((rank < start) | gap)


def signal_time(signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The time t of the flow at which the ratio of signal to noise is that of `signal * x1 + noise * x0`."""
    return signal / (signal + noise)


def diffusion_times(shares: torch.Tensor, schedule: str) -> torch.Tensor:
    """Times of the flow that stand for `shares` in [0, 1] of the way from clean to noise in a variance-preserving diffusion, with
    `"linear"` betas from 0.0001 to 0.02 in 1000 steps or the `"cosine"` of Nichol and Dhariwal 2021."""
    if schedule == "linear":
        remains = torch.exp(-(0.1 * shares + (20 - 0.1) * shares.square() / 2))
    else:
        remains = (
            torch.cos((shares + 0.008) / 1.008 * torch.pi / 2).square() / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        )
    remains = remains.clamp(0, 1)
    return signal_time(remains.sqrt(), (1 - remains).sqrt())


class TokComModel(TokComPreTrainedModel):
    """Latent generative model of tokens: `encode`, `denoise`, `decode`, and the training loss of both stages."""

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
        self.set_stage(config.stage)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path=None, *args, **kwargs):
        if pretrained_model_name_or_path is not None:
            _check_shards(pretrained_model_name_or_path)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.set_stage(model.config.stage)  # loading replaces the parameters, and with them what was frozen
        return loaded

    def get_input_embeddings(self):
        return self.codec.get_input_embeddings()

    def set_stage(self, stage: str) -> None:
        """Choose the stage, `"codec"`, `"flow"` or `"head"`, that `forward` trains; all other parts are frozen."""
        if stage not in STAGES or (stage == "head" and self.latent_head is None):
            raise ValueError(f"`stage` ({stage!r}) must be one of {STAGES}, and 'head' needs `latent_head`.")
        self.config.stage = stage
        flow = [self.transformer, self.token_head, self.condition_embedding]
        parts = {"codec": [self.codec], "flow": flow, "head": [self.latent_head]}
        for name, modules in parts.items():
            for module in modules:
                if module is not None:
                    module.requires_grad_(name == stage)

    def compilable_parts(self) -> list[torch.nn.Module]:
        """The networks that the stage trains; their `.compile()` works in place and keeps the names of parameters."""
        if self.config.transformer_config.start_latents and self.config.stage == "flow":
            return list(self.transformer.layers)  # how many rows pass them differs from step to step
        if self.config.stage != "codec":
            return [self.transformer]
        return [part for part in (getattr(self.codec, "encoder", None), getattr(self.codec, "decoder", None)) if part]

    def _check_ids(self, input_ids: torch.Tensor) -> None:
        vocab_size = self.config.text_vocab_size
        if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocab_size:
            bad = int(input_ids.min()) if int(input_ids.min()) < 0 else int(input_ids.max())
            raise ValueError(
                f"token id {bad} is outside the model's vocabulary of {vocab_size}; "
                "tokenize with the tokenizer saved beside the model."
            )

    @_entry_point
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
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`, of clips `(B, c, F, H, W)`): what a model of images or
                clips encodes instead.
            streams (`dict[str, torch.Tensor]`, *optional*): what a model of several streams encodes: ids `(B, T)`, pixels,
                log-mel `(B, mel bands, F)`, by name.
            present (`dict[str, torch.BoolTensor]`, *optional*): rows `(B,)` that have a stream; by default all.

        Returns: `latents (B, N, C)`, `position_ids (B, N, A)`, `mask (B, N)`. Raises `ValueError` on a bad length or id.
        """
        if self.config.codec_config.modality == "several":
            self._check_streams(self._required(streams, "streams"))
            return self.codec.encode(streams, present)
        if not self.config.codec_config.has_tokens:
            return self.codec.encode(self._required(pixel_values, "pixel_values"))
        self._check_ids(self._required(input_ids, "input_ids"))
        return self.codec.encode(input_ids, attention_mask)

    def _check_streams(self, streams: dict[str, torch.Tensor]) -> None:
        self.codec.check_names(streams)
        for name, value in streams.items():
            if self.codec.streams[name].config.has_tokens:
                self._check_ids(value)

    def _required(self, value: torch.Tensor | None, name: str) -> torch.Tensor:
        if value is None:
            raise ValueError(f"`{name}` is missing, which a model with {self.config.codec_config.model_type!r} reads.")
        return value

    @_entry_point
    def condition(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Caption ids `(B, L)` -> what the transformer reads before an image's latents, `(B, L, D)`, which of it exists, `(B, L)`,
        and where it stands, `(L,)`: from -`condition_length` on, however much padding follows.

        Raises `ValueError` for captions that are longer than that.
        """
        if self.condition_embedding is None:
            raise ValueError(
                "this model was trained without captions (`condition_vocab_size` is 0); leave the prompt out."
            )
        longest, length = self.config.condition_length, input_ids.shape[1]
        if length > longest:
            raise ValueError(
                f"a caption has {length} tokens, more than the model's maximum of {longest} (`condition_length`); shorten it."
            )
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        return self.condition_embedding(input_ids), real, torch.arange(length, device=input_ids.device) - longest

    def denoise(
        self, latents: torch.Tensor, timestep: torch.Tensor | float, *args, **kwargs
    ) -> TokComTransformerOutput:
        """Estimate the clean latents: `.latents (B, S, C)`. The arguments are those of `predict`."""
        output = self.predict(latents, timestep, *args, **kwargs)
        if self.token_head is not None:
            times = self.token_head.place_times(self._spread(timestep, latents))
            means = self.token_head.mean_latents(output.latents, self.symbols(), latents, times)
            output.latents = means.to(latents.dtype)
        output.latents = self.quantize(output.latents)
        return output

    def quantize(self, latents: torch.Tensor) -> torch.Tensor:
        """An estimate `(..., N, C)` as it is used: with `quantize_prediction` the nearest codes, otherwise itself."""
        return self.codec.snap(latents) if self.config.quantize_prediction else latents

    @_entry_point
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
        **kwargs,
    ) -> TokComTransformerOutput:
        """What the network predicts, as `.latents`: the clean latents, or what a token head reads, `(B, S, K * E)`.

        `timestep`, 1 = clean, is `(B, S)`; `(B,)` or a scalar is broadcast over the latents. It may lie outside [0, 1]:
        not begun, or done. The other arguments are those of `TokComTransformer.forward`. Callers that denoise many times
        save work with `symbols`, what the method of that name gives, `times (B, S, K)`, the head's `place_times`,
        `chunks (B, S, K)`, the ids of the tokens that are clean already, `uncertain`, those that are partly noise, and
        `entry (M * B, S, D)`: M of them per latent, such as with and without context, give M predictions in one pass.
        """
        timestep, features = self._spread(timestep, latents), None
        if self.token_head is not None:
            times = self.token_head.place_times(timestep) if times is None else times
            symbols = self.symbols() if symbols is None else symbols
            features = self.token_head.read(symbols, latents, times, chunks, uncertain)
        inputs = latents.to(self.dtype), timestep.clamp(0, 1), features
        if entry is not None and len(entry) != len(latents):
            copies = len(entry) // len(latents)
            inputs = (None if x is None else torch.cat([x] * copies) for x in inputs)
        latents, timestep, features = inputs
        return self.transformer(
            latents,
            timestep,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            features=features,
            entry=entry,
            **kwargs,
        )

    @staticmethod
    def _spread(timestep: torch.Tensor | float, latents: torch.Tensor) -> torch.Tensor:
        """Times of any shape that fits as `(B, S)`, float32."""
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=latents.device)
        if timestep.ndim == 1:
            timestep = timestep[:, None]
        return timestep.expand(latents.shape[:2])

    @_entry_point
    def symbols(self) -> TokComSymbols | None:
        """What the codec's tokens look like; None for models that do not predict tokens."""
        if self.token_head is None:
            return None
        with torch.no_grad():
            table = self.codec.symbol_table().to(self.device)
        return self.token_head.symbols(table)

    @_entry_point
    def refine(self, latents: torch.Tensor) -> torch.Tensor:
        """What is decoded for the transformer's final estimate `(B, N, C)`: itself, unless there is a latent head."""
        if self.latent_head is None:
            return latents
        return self.latent_head(latents.to(self.dtype))[0].to(latents.dtype)

    @_entry_point
    def from_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(B, N, R)` of a codec with a quantiser -> standardised latents `(B, N, C)`; raises `ValueError` for others."""
        quantizer = getattr(self.codec, "quantizer", None)
        if quantizer is not None:
            levels, size = getattr(quantizer, "num_levels", 1), quantizer.num_codes
            if codes.ndim != 3 or codes.shape[2] != levels:
                raise ValueError(
                    f"codes have shape {tuple(codes.shape)} but (B, N, {levels}) is needed; give what encode gave."
                )
            if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
                raise ValueError(
                    f"codes lie between {int(codes.min())} and {int(codes.max())} but there are {size}; give what encode gave."
                )
        return self.codec.from_codes(codes)

    @_entry_point
    def decode(self, latents: torch.Tensor, **kwargs) -> TokComDecoderOutput | TokComImageOutput | TokComVideoOutput:
        """Standardised latents `(B, N, C)` -> `.logits (B, N * K, V)`, or `.pixel_values (B, 3, H, W)` of images, for which
        `num_tokens` keeps the first ones only, or `(B, c, F, H, W)` of clips, for which `height` and `width` may differ from
        those of training."""
        return self.codec.decode(latents, **kwargs)

    @_entry_point
    def decode_stream(
        self, name: str, latents: torch.Tensor
    ) -> TokComDecoderOutput | TokComImageOutput | TokComVideoOutput | TokComAudioOutput:
        """The stream `name` of standardised latents `(B, N, C)` of several -> what its codec's `decode` gives."""
        return self.codec.decode_stream(name, latents)

    @_entry_point
    def to_ids(self, latents: torch.Tensor, **kwargs) -> torch.Tensor:
        """Standardised latents `(B, N, C)` -> the most likely token ids `(B, N * K)`; those of `from_codes` are `quantized=True`."""
        return self.codec.to_ids(latents, **kwargs)

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
        """Loss of `config.stage` on token ids `(B, T)`; `attention_mask (B, T)` is 0 on padding.

        Of a model of images, `pixel_values (B, 3, H, W)` are what it learns, of clips `(B, c, F, H, W)`, and the ids their
        captions, if it reads any.

        `known_mask (B, T)` is 1 on tokens that are given, such as a prompt: in the flow stage they are clean and not predicted,
        and a share `context_dropout` of the rows does without them. Models that regress latents know whole latents only.

        `text_start (B,)` is true for rows that begin where a text begins, by default all, and matters to models with
        `start_latents`.

        Of a model of several `streams`, as `encode` reads them, the streams named by `given` are clean in all rows that have them
        and the others generated; by default every row draws a task of its own.

        `latents (B, N, C)`, what `encode` gives for these ids, save encoding them; then no token may be padding.

        `timestep` in [0, 1] fixes t in the flow stage, which evaluation uses to measure CE(t); by default it is drawn.
        In eval mode nothing is dropped, every block follows its whole context, and there is no self-conditioning.
        """
        if self.config.codec_config.modality == "several":
            self._check_streams(self._required(streams, "streams"))
            return self._stream_loss(streams, present, given, timestep)
        if self.config.codec_config.has_tokens:
            source = self._required(input_ids, "input_ids"), attention_mask
        else:
            source = (None if latents is not None else self._required(pixel_values, "pixel_values")), None
        # elsewhere the check would wait for the device at every step
        if input_ids is not None and input_ids.device.type == "cpu":
            self._check_ids(input_ids)
        if self.config.stage == "codec":
            loss, parts = self.codec.training_loss(*source)
            return TokComOutput(loss=loss, **parts)
        if self.config.transformer_config.start_latents:
            loss, tokens = token_loss(self, *source, timestep, known_mask, text_start)
            return TokComOutput(
                loss=loss, ce_loss=loss.detach(), mse_loss=loss.new_zeros(()), token_losses=tokens.detach()
            )
        with torch.no_grad():
            clean = self.codec.encode(*source) if latents is None else self.codec.known(latents.to(self.dtype))
        if self.token_head is not None:
            return self._token_loss(clean, input_ids, attention_mask, timestep, known_mask)
        return self._latent_loss(clean, input_ids, attention_mask, timestep, known_mask)

    def _latent_loss(self, clean, input_ids, attention_mask, timestep, known_mask) -> TokComOutput:
        config, trains_head, prefix = self.config, self.config.stage == "head", None
        if self.condition_embedding is not None:
            prefix = self.condition(self._required(input_ids, "input_ids"), attention_mask)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not trains_head):
            known = None if known_mask is None else self.codec.to_chunks(known_mask, None)[0].bool().all(-1)
            prediction, loss_mask, *_ = self._predict_noised(
                clean, timestep, known=known, hides_known=known is not None, prefix=prefix
            )
        errors = self.quantize(prediction.float()) - clean.latents[:, None].float()
        counted = loss_mask[:, None] / (prediction.shape[1] * loss_mask.sum()).clamp_min(1)  # (B, 1, N)
        mse = (errors.square().mean(-1) * counted).sum()
        loss = config.mse_weight * mse
        if not config.codec_config.has_tokens:
            return TokComOutput(loss=loss, mse_loss=mse.detach())
        if trains_head:
            estimate, loss = self.latent_head(prediction[:, 0])
        else:
            estimate = prediction[:, 0]
        with torch.set_grad_enabled(torch.is_grad_enabled() and (trains_head or config.ce_weight > 0)):
            tokens, count = self._decoded_nll(estimate, loss_mask, input_ids, attention_mask)
            cross_entropy = tokens.sum() / count
        loss = loss + (1.0 if trains_head else config.ce_weight) * cross_entropy
        tokens = None if tokens.shape[1] != loss_mask.shape[1] else tokens.detach()
        return TokComOutput(loss=loss, ce_loss=cross_entropy.detach(), mse_loss=mse.detach(), token_losses=tokens)

    def _stream_loss(self, streams, present, given, timestep) -> TokComOutput:
        """Loss of several streams: of each row the ones that its task generates."""
        config = self.config
        if config.stage == "codec":
            loss, parts = self.codec.training_loss(streams, present)
            return TokComOutput(loss=loss, **parts)
        with torch.no_grad():
            clean = self.codec.encode(streams, present)
        if given is None:
            task = self.codec.draw_task(clean.mask, config.context_dropout if self.training else 0.0)
        else:
            self.codec.check_names(given)
            everywhere = clean.mask.new_ones(len(clean.mask))
            known = self.codec.exists(dict.fromkeys(given, everywhere), len(everywhere), everywhere.device)
            task = known & clean.mask, clean.mask
        shown = [name for name in streams if clean.mask[:, self.codec.places[name].start].any()]
        if not shown:
            raise ValueError("no row of this batch has any stream; `present` must be true somewhere.")
        prediction, loss_mask = self._predict_streams(clean, timestep, task, shown)
        mse = self.codec.squared_error(prediction.float() - clean.latents[:, None].float(), loss_mask)
        loss, cross_entropy = config.mse_weight * mse, None
        if config.ce_weight:
            cross_entropy = self.codec.text_nll(prediction[:, 0], streams, loss_mask)
            loss = loss if cross_entropy is None else loss + config.ce_weight * cross_entropy
            cross_entropy = loss.new_zeros(()) if cross_entropy is None else cross_entropy.detach()
        return TokComOutput(loss=loss, ce_loss=cross_entropy, mse_loss=mse.detach())

    def _predict_streams(self, clean, timestep, task, names) -> tuple[torch.Tensor, torch.Tensor]:
        """`_predict_noised` of the latents of the streams `names`; the others are not in the sequence, and 0 in what is returned."""
        if len(names) == len(self.codec.names):
            return self._predict_noised(clean, timestep, task=task)[:2]
        places = self.codec.index_of(names, clean.latents.device)
        part = TokComCodecOutput(*(value[:, places] for value in (clean.latents, clean.position_ids, clean.mask)))
        found, wanted, *_ = self._predict_noised(part, timestep, task=tuple(mask[:, places] for mask in task))
        prediction = found.new_zeros(*found.shape[:2], *clean.latents.shape[1:]).index_copy(2, places, found)
        return prediction, torch.zeros_like(clean.mask).index_copy(1, places, wanted)

    def _decoded_nll(self, estimate, loss_mask, input_ids, attention_mask) -> tuple[torch.Tensor, torch.Tensor]:
        """Nats `(B, n, K)` of the tokens that `estimate (B, N, C)` stands for, where `loss_mask (B, N)`, and how many they
        are; n is N, or in training a share `ce_share` of it, drawn at random."""
        chunks, real = self.codec.to_chunks(input_ids, attention_mask)  # (B, N, K)
        counted = real & loss_mask[..., None]
        if self.training and self.config.ce_share < 1:
            count = max(1, round(self.config.ce_share * estimate.shape[1]))
            chosen = torch.rand(loss_mask.shape, device=loss_mask.device).argsort(1)[:, :count, None]
            estimate, chunks, counted = (
                x.gather(1, chosen.expand(-1, -1, x.shape[2])) for x in (estimate, chunks, counted)
            )
        return self.codec.nll(estimate, chunks) * counted, counted.sum().clamp_min(1)

    def _token_loss(self, clean, input_ids, attention_mask, timestep, known_mask) -> TokComOutput:
        chunks, real = self.codec.symbols(input_ids, attention_mask)  # (B, N, K)
        symbols, given = self.symbols(), None
        if known_mask is not None:
            given = self.codec.symbols(input_ids, known_mask)[1]
        elif self.training and self._shows_some:
            tokens = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            known_tokens = draw_known(tokens.bool(), self.config.infill_rate)
            given = self.codec.symbols(input_ids, known_tokens)[1]
        states, _, noisy, t, times = self._predict_noised(
            clean, timestep, chunks, symbols, given, hides_known=known_mask is not None
        )
        draws = states.shape[1]
        progress = self.token_head.progress(t)  # (B, M * N, K)
        wanted = real if given is None else real & ~given
        chosen = wanted.repeat(1, draws, 1) & (progress > -EARLY) & (progress < 1)
        repeated = chunks.repeat(1, draws, 1)
        cross_entropy, tokens = self.token_head.nll(states.flatten(1, 2), symbols, noisy, times, repeated, chosen)
        return TokComOutput(
            loss=cross_entropy,
            ce_loss=cross_entropy.detach(),
            mse_loss=cross_entropy.new_zeros(()),
            token_losses=tokens.unflatten(1, (draws, -1))[:, 0].detach(),
        )

    def channel_times(self, timestep: torch.Tensor) -> torch.Tensor:
        """Times of latents `(B, N)` -> t of each channel in [0, 1], `(B, N, C)`, or `(B, N, 1)` if all have the same."""
        if self.token_head is None:
            return timestep[..., None].clamp(0, 1)
        channels = self.config.codec_config.latent_channels // self.token_head.num_symbols
        return self.token_head.place_times(timestep).repeat_interleave(channels, dim=-1)

    def _sample_times(self, order: torch.Tensor, draws: int) -> torch.Tensor:
        """Times `(B, M, N)` of the latents of blocks `order (B, N)`: one per block and draw, the draws in strata."""
        batch, length = order.shape
        shares = torch.rand(batch, draws, 2 * length + 1, device=order.device)
        shares = (shares + torch.arange(draws, device=order.device)[:, None]) / draws
        if self.config.timestep_sampling in ("linear", "cosine"):
            shares = diffusion_times(shares, self.config.timestep_sampling)
        elif self.config.timestep_sampling == "logit_normal":
            normal = torch.special.ndtri(shares.clamp(1e-6, 1 - 1e-6))
            shares = 1 - torch.sigmoid(normal + self.config.timestep_loc)
        return shares.gather(2, order[:, None].expand(-1, draws, -1))

    @property
    def _shows_some(self) -> bool:
        """Whether training shows a part of every text or picture clean: of a bidirectional model that knows times apart."""
        config = self.config.transformer_config
        return config.block_size is None and config.per_latent_timestep

    def _predict_noised(
        self,
        clean: TokComCodecOutput,
        timestep: float | None,
        chunks: torch.Tensor | None = None,
        symbols: TokComSymbols | None = None,
        given: torch.Tensor | None = None,
        known: torch.Tensor | None = None,
        hides_known: bool = False,
        prefix: tuple[torch.Tensor, ...] | None = None,
        task: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Noise the latents, M = `noise_draws` times with one time per block, and estimate them again.

        Args:
            chunks, symbols, given: for a token head, the ids `(B, N, K)`, the codec's `symbols`, and which tokens are
                clean, `(B, N, K)`.
            known (`torch.BoolTensor` of shape `(B, N)`): instead, latents that are clean; without either a bidirectional
                model in training draws some.
            hides_known (`bool`): rows that lose their context, a share `context_dropout`, do not see what is known;
                otherwise it is unknown there.
            prefix: what `condition` gives. task: of several streams, which latents are known and which are seen at all.

        Returns: the transformer's outputs `(B, M, N, ...)`, the loss mask `(B, N)`, the noisy latents `(B, M * N, C)`, the
        times of latents `(B, M * N)` and, with a token head, of places `(B, M * N, K)`.
        """
        config, latents, valid = self.config, clean.latents, clean.mask
        batch, length = valid.shape
        draws = config.noise_draws if self.training else 1
        block_size = config.transformer_config.block_size
        group, infill_rate = config.codec_config.group_size, config.infill_rate if self.training else 0.0
        order = generation_order(valid, block_size, infill_rate, group)
        t = self._sample_times(order, draws)
        if timestep is not None:
            t = torch.full_like(t, timestep)
        t = t.flatten(1)  # (B, M * N)
        dropout = config.context_dropout if self.training else 0.0
        sees_context = torch.rand(batch, device=latents.device) >= dropout
        loss_mask, position_ids = valid, clean.position_ids
        if given is not None:
            known = given.all(-1)
            given = given & sees_context[:, None, None]
        if hides_known:
            loss_mask = valid & ~known
        if block_size is None:
            if known is None:
                shows = self.training and self._shows_some
                known = draw_known(valid, infill_rate, group) if shows else torch.zeros_like(valid)
            attention_mask = valid & ~(known & ~sees_context[:, None]) if hides_known else valid
            known = known & sees_context[:, None]
            if task is not None:
                known, attention_mask = task
                loss_mask = attention_mask
            told, t, loss_mask = t, torch.where(known, 1.0, t), loss_mask & ~known
            if config.transformer_config.per_latent_timestep:  # else what is known has its neighbours' time
                told = t
        else:
            told, attention_mask = t, block_causal_mask(order, valid, sees_context, draws)
            position_ids = position_ids.repeat(1, 1 + draws, 1)
        if prefix is not None:
            prefix = prefix[0], prefix[1] & sees_context[:, None], prefix[2]
        targets = latents.repeat(1, draws, 1)
        noise = torch.randn_like(targets) * config.noise_std
        times, signal = None, t[..., None].clamp(0, 1)
        if self.token_head is not None:
            times = self.token_head.place_times(t)
            if given is not None:
                times = torch.where(given.repeat(1, draws, 1), 1.0, times)
            signal = times.repeat_interleave(targets.shape[-1] // times.shape[-1], dim=-1)
        noisy = (1 - signal) * noise + signal * targets  # (B, M * N, C)

        features = None
        if self.token_head is not None:
            features = self.token_head.read(symbols, noisy, times, chunks.repeat(1, draws, 1))
            if block_size is not None:
                known = self.token_head.read(symbols, latents, torch.ones_like(times[:, :length]), chunks)
                features = torch.cat((known, features), dim=1)

        inputs, time, num_context = noisy, told.clamp(0, 1), 0
        if block_size is not None:
            inputs, num_context = torch.cat((latents, noisy), dim=1), length
            time = torch.cat((t.new_ones(batch, length), time), dim=1)
        output = self.transformer(
            inputs.to(self.dtype),
            time,
            position_ids,
            attention_mask,
            num_context=num_context,
            features=features,
            prefix=prefix,
        )
        estimate = output.latents[:, -draws * length :].unflatten(1, (draws, length))
        return estimate, loss_mask, noisy, t, times


TokComConfig.register_for_auto_class()
TokComModel.register_for_auto_class("AutoModel")

__all__ = ["TokComModel", "TokComOutput"]
