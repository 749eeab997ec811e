"""TokComModel: a codec and the transformer that learns the flow between noise and the codec's latents.

Notable choices: `x_t = (1 - t) x0 + t x1` with t = 1 clean; the transformer predicts x1 and is trained by regression,
with cross-entropy through the frozen decoder as an auxiliary; `forward` returns the loss of the stage in
`config.stage`; the order in which latents are generated is a tensor, so left-to-right blocks, infilling and the
bidirectional model share one code path.

Shape legend: B batch, T tokens, K tokens per chunk, N = T/K latents, C latent channels, A position axes, V vocabulary.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel  # noqa: F401  diffusers looks the base class up in the module of a component
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

try:
    from .codec_chunk_tokcom import TokComChunkCodec, TokComCodecOutput, TokComDecoderOutput
    from .configuration_tokcom import TokComChunkCodecConfig, TokComConfig
    from .layers_tokcom import CROSS_ENTROPY_CHUNK, TokComPreTrainedModel, TokComTokenEmbedding
    from .transformer_tokcom import TokComTransformer, TokComTransformerOutput, block_causal_mask
except ImportError:
    if __package__:
        raise
    import codec_chunk_tokcom as _codec_chunk
    import configuration_tokcom as _configuration
    import layers_tokcom as _layers
    import transformer_tokcom as _transformer

    TokComChunkCodec, TokComCodecOutput = _codec_chunk.TokComChunkCodec, _codec_chunk.TokComCodecOutput
    TokComDecoderOutput = _codec_chunk.TokComDecoderOutput
    TokComChunkCodecConfig, TokComConfig = _configuration.TokComChunkCodecConfig, _configuration.TokComConfig
    CROSS_ENTROPY_CHUNK, TokComPreTrainedModel = _layers.CROSS_ENTROPY_CHUNK, _layers.TokComPreTrainedModel
    TokComTokenEmbedding = _layers.TokComTokenEmbedding
    TokComTransformer, TokComTransformerOutput = _transformer.TokComTransformer, _transformer.TokComTransformerOutput
    block_causal_mask = _transformer.block_causal_mask

EARLY = 0.1  # training begins with a token this long before its time, since sampling steps are not infinitely small
MIN_SIGMA = 0.05  # the likelihood of clean latents would be infinite
CODECS = {TokComChunkCodecConfig.model_type: TokComChunkCodec}


@dataclass
class TokComOutput(ModelOutput):
    """What `TokComModel.forward` returns.

    Args:
        loss (`torch.FloatTensor`): scalar loss of the current stage; the only field with a gradient.
        ce_loss (`torch.FloatTensor`): cross-entropy through the decoder, nats per real token.
        mse_loss (`torch.FloatTensor`, *optional*): flow stage: squared error of x1 per channel.
        kl_loss (`torch.FloatTensor`, *optional*): codec stage: KL, nats per chunk.
        token_losses (`torch.FloatTensor` of shape `(B, N, K)`, *optional*): flow stage: the cross-entropy of each token,
            0 where nothing is predicted.
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


def generation_order(valid: torch.Tensor, block_size: int | None, infill_rate: float) -> torch.Tensor:
    """Draw, for training, the step at which each latent is generated.

    Blocks of `block_size` in reading order from a random offset, so that a prompt may end anywhere; in a share
    `infill_rate` of the rows one random span is generated last, after the text that follows it. `None` is one block.

    Args: `valid (B, N)` gives shape and device. Returns `torch.LongTensor` of shape `(B, N)`.
    """
    batch, length = valid.shape
    index = torch.arange(length, device=valid.device).expand(batch, -1)
    if block_size is None:
        return torch.zeros_like(index)
    draws = torch.rand(4, batch, 1, device=valid.device)
    order = (index + (draws[0] * block_size).long()) // block_size
    start, end = (draws[1:3] * (length + 1)).long().sort(dim=0).values  # (B, 1) each
    in_gap = (index >= start) & (index < end) & (draws[3] < infill_rate)
    return torch.where(in_gap, length + (index - start) // block_size, order)


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
        self.chunk_size, self.noise_std = config.codec_config.chunk_size, config.noise_std
        self.stagger, self.shift = config.token_stagger, config.token_shift
        self.embedding = TokComTokenEmbedding(config.codec_config.vocab_size, config.token_embedding_size)
        self.bias = nn.Parameter(torch.zeros(config.codec_config.vocab_size))

    def progress(self, timestep: torch.Tensor) -> torch.Tensor:
        """Times of latents `(...)` -> how far each place has come, `(..., K)`; below 0 is not begun, above 1 is done."""
        places = torch.arange(self.chunk_size, device=timestep.device)
        return timestep[..., None] * (1 + self.stagger * (self.chunk_size - 1)) - self.stagger * places

    def place_times(self, timestep: torch.Tensor) -> torch.Tensor:
        """Times of latents `(...)` -> t of each place `(..., K)`: 0 is noise, 1 is clean."""
        left = 1 - self.progress(timestep).clamp(0, 1)
        return 1 - self.shift * left / (1 + (self.shift - 1) * left)

    def _rows(self, function: Callable, chosen, table, latents, times, *extra) -> torch.Tensor:
        """`function(log-likelihood (R, V), table (V, C / K), *extra rows)` of the tokens that `chosen (B, N, K)` marks.

        Args: `table (K, V, C / K)`, `latents (B, N, C)`, `times (B, N, K)`, `extra` tensors `(B, N, K, ...)`. Works on
        some rows of one place at a time and recomputes them in the backward pass. Returns `(B, N, K, ...)`, 0 elsewhere.
        """

        def piece(signal, latents, table, *extra):
            with torch.autocast(latents.device.type, enabled=False):
                noise = (1 - signal).clamp_min(MIN_SIGMA) * self.noise_std
                likelihood = signal * (latents @ table.T) - 0.5 * signal.square() * table.square().sum(-1)  # (R, V)
                likelihood = likelihood / noise.square()
            return function(likelihood, table, *extra)

        size, index, results = self.chunk_size, [], []
        own = latents.float().unflatten(-1, (size, -1))  # (B, N, K, C / K)
        rows = [x.flatten(0, 1) for x in (times[..., None].float(), own, *extra)]
        run = partial(checkpoint, piece, use_reentrant=False) if torch.is_grad_enabled() else piece
        for place in range(size):
            where = chosen[..., place].flatten().nonzero()[:, 0]
            index.append(where * size + place)
            for part in where.split(CROSS_ENTROPY_CHUNK):
                signal, noisy, *more = (x[part, place] for x in rows)
                results.append(run(signal, noisy, table[place], *more))
        values = torch.cat(results)
        whole = values.new_zeros(chosen.numel(), *values.shape[1:])
        return whole.index_copy(0, torch.cat(index), values).view(*chosen.shape, *values.shape[1:])

    def read(
        self, table: torch.Tensor, latents: torch.Tensor, timestep: torch.Tensor, chunks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean token embeddings `(B, N, K * E)` given each token's own noisy channels and its frequency.

        `chunks (B, N, K)`, if given, are the true ids of what is clean already, which saves work.
        """
        times, weight = self.place_times(timestep), self.embedding.weight
        prior = self.bias.detach()

        def mean(likelihood: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            return F.linear((likelihood + prior).softmax(-1).to(weight.dtype), weight.T)

        if chunks is None:
            chunks = self._rows(lambda likelihood, table: likelihood.argmax(-1), times == 1, table, latents, times)
        embeddings = self._rows(mean, (times > 0) & (times < 1), table, latents, times)
        frequent = F.linear(prior.softmax(-1)[None].to(weight.dtype), weight.T)[0]  # (E,)
        embeddings = torch.where((times == 0)[..., None], frequent, embeddings)
        embeddings = torch.where((times == 1)[..., None], self.embedding(chunks).to(embeddings.dtype), embeddings)
        return embeddings.flatten(2) * weight.shape[1] ** 0.5

    def nll(self, states, table, latents, timestep, chunks, chosen) -> torch.Tensor:
        """Nats per token `(B, N, K)` of the `chosen (B, N, K)` among ids `chunks`; `states (B, N, K * E)` is what the
        network expects."""

        def loss(likelihood: torch.Tensor, table: torch.Tensor, states: torch.Tensor, ids: torch.Tensor):
            return F.cross_entropy(self._logits(states) + likelihood, ids, reduction="none")

        states = states.unflatten(-1, (self.chunk_size, -1))
        return self._rows(loss, chosen, table, latents, self.place_times(timestep), states, chunks)

    def expected_latents(
        self, states, table, latents, timestep, temperature: float = 1.0, step: float = 1.0
    ) -> torch.Tensor:
        """E[x1 | x_t] `(B, N, C)`; `temperature` divides what the network expects, not the likelihood.

        Tokens that are clean stay as they are; those whose turn does not come before `timestep + step` are left at 0.
        """

        def mean(likelihood: torch.Tensor, table: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
            return (self._logits(states) / temperature + likelihood).softmax(-1) @ table

        times = self.place_times(timestep)
        chosen = (times < 1) & (self.progress(timestep + step) > 0)
        states = states.unflatten(-1, (self.chunk_size, -1))
        means = self._rows(mean, chosen, table, latents, times, states)  # (B, N, K, C / K)
        return torch.where((times == 1)[..., None], latents.float().view(means.shape), means).flatten(2)

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        return F.linear(states, self.embedding.weight, self.bias.to(states.dtype)).float()


class TokComModel(TokComPreTrainedModel):
    """Latent generative model of tokens: `encode`, `denoise`, `decode`, and the training loss of both stages."""

    config: TokComConfig
    main_input_name = "input_ids"

    def __init__(self, config: TokComConfig):
        super().__init__(config)
        self.codec = CODECS[config.codec_config.model_type]._from_config(config.codec_config)
        self.transformer = TokComTransformer._from_config(config.transformer_config)
        self.token_head = TokComTokenHead(config) if config.prediction_type == "tokens" else None
        self.post_init()
        self.set_stage(config.stage)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.set_stage(model.config.stage)  # loading replaces the parameters, and with them what was frozen
        return loaded

    def get_input_embeddings(self):
        return self.codec.get_input_embeddings()

    def set_stage(self, stage: str) -> None:
        """Choose the stage, `"codec"` or `"flow"`, that `forward` trains; the other half is frozen."""
        if stage not in ("codec", "flow"):
            raise ValueError(f"`stage` ({stage!r}) must be 'codec' or 'flow'.")
        self.config.stage = stage
        self.codec.requires_grad_(stage == "codec")
        self.transformer.requires_grad_(stage == "flow")
        if self.token_head is not None:
            self.token_head.requires_grad_(stage == "flow")

    def _check_ids(self, input_ids: torch.Tensor) -> None:
        vocab_size = self.config.codec_config.vocab_size
        if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocab_size:
            bad = int(input_ids.min()) if int(input_ids.min()) < 0 else int(input_ids.max())
            raise ValueError(
                f"token id {bad} is outside the model's vocabulary of {vocab_size}; "
                "tokenize with the tokenizer saved beside the model."
            )

    @_entry_point
    def encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> TokComCodecOutput:
        """Token ids -> standardised latents.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): T a multiple of K, ids below V.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 marks padding.

        Returns: `latents (B, N, C)`, `position_ids (B, N, A)`, `mask (B, N)`. Raises `ValueError` on a bad length or id.
        """
        self._check_ids(input_ids)
        return self.codec.encode(input_ids, attention_mask)

    @_entry_point
    def denoise(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        self_condition: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        temperature: float = 1.0,
        step: float = 1.0,
        token_table: torch.Tensor | None = None,
        **kwargs,
    ) -> TokComTransformerOutput:
        """Estimate the clean latents: `.latents (B, S, C)`.

        `timestep` in [0, 1], 1 = clean, is `(B, S)`; `(B,)` or a scalar is broadcast over the latents. The other
        arguments are those of `TokComTransformer.forward`. `temperature` divides the logits of a model that predicts
        token probabilities; `ValueError` if it is not positive, or not 1 for other models. `step` is how far the caller
        will move in t: tokens whose turn does not come before are not estimated. `token_table` is what the method of
        that name gives, for callers that denoise many times.
        """
        if temperature <= 0 or (temperature != 1.0 and self.token_head is None):
            raise ValueError(
                f"`temperature` ({temperature}) must be positive, and 1 for `prediction_type="
                f"{self.config.prediction_type!r}`: only 'tokens' has probabilities."
            )
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=latents.device)
        if timestep.ndim == 1:
            timestep = timestep[:, None]
        timestep, features = timestep.expand(latents.shape[:2]), None
        if self.token_head is not None:
            table = self.token_table() if token_table is None else token_table
            features = self.token_head.read(table, latents, timestep)
        output = self.transformer(
            latents.to(self.dtype),
            timestep,
            position_ids=position_ids,
            attention_mask=attention_mask,
            self_condition=None if self_condition is None else self_condition.to(self.dtype),
            past_key_values=past_key_values,
            features=features,
            **kwargs,
        )
        if self.token_head is not None:
            arguments = output.latents, table, latents, timestep, temperature, step
            output.latents = self.token_head.expected_latents(*arguments).to(latents.dtype)
        return output

    @_entry_point
    @torch.no_grad()
    def token_table(self) -> torch.Tensor | None:
        """The codec's latents of every token, `(K, V, C / K)`; None for models that do not predict tokens."""
        return None if self.token_head is None else self.codec.token_table()

    @_entry_point
    def decode(self, latents: torch.Tensor) -> TokComDecoderOutput:
        """Standardised latents `(B, N, C)` -> `.logits (B, N * K, V)`."""
        return self.codec.decode(latents)

    @_entry_point
    def to_ids(self, latents: torch.Tensor) -> torch.Tensor:
        """Standardised latents `(B, N, C)` -> the most likely token ids `(B, N * K)`."""
        return self.codec.to_ids(latents)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        timestep: float | None = None,
    ) -> TokComOutput:
        """Loss of `config.stage` on token ids `(B, T)`; `attention_mask (B, T)` is 0 on padding.

        `timestep` in [0, 1] fixes t in the flow stage, which evaluation uses to measure CE(t); by default it is drawn.
        In eval mode nothing is dropped, every block follows its whole context, and there is no self-conditioning.
        """
        if input_ids.device.type == "cpu":  # elsewhere the check would wait for the device at every step
            self._check_ids(input_ids)
        if self.config.stage == "codec":
            loss, parts = self.codec.training_loss(input_ids, attention_mask)
            return TokComOutput(loss=loss, **parts)
        with torch.no_grad():
            clean = self.codec.encode(input_ids, attention_mask)
        if self.token_head is not None:
            return self._token_loss(clean, input_ids, attention_mask, timestep)
        prediction, loss_mask, _, _ = self._predict_noised(clean, timestep)
        squared_error = (prediction.float() - clean.latents[:, None].float()).square().mean(-1)  # (B, M, N)
        mse = (squared_error * loss_mask[:, None]).sum() / (prediction.shape[1] * loss_mask.sum()).clamp_min(1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.ce_weight > 0):
            tokens = self.codec.loss(prediction[:, 0], input_ids, attention_mask) * loss_mask[..., None]  # (B, N, K)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        count = (real.view(tokens.shape) * loss_mask[..., None]).sum().clamp_min(1)
        cross_entropy = tokens.sum() / count
        loss = self.config.mse_weight * mse + self.config.ce_weight * cross_entropy
        return TokComOutput(
            loss=loss, ce_loss=cross_entropy.detach(), mse_loss=mse.detach(), token_losses=tokens.detach()
        )

    def _token_loss(self, clean, input_ids, attention_mask, timestep) -> TokComOutput:
        chunks, real = self.codec.to_chunks(input_ids, attention_mask)  # (B, N, K)
        table = self.token_table()
        states, loss_mask, noisy, t = self._predict_noised(clean, timestep, chunks, table)  # (B, M, N, K * E)
        draws = states.shape[1]
        progress = self.token_head.progress(t)  # (B, M * N, K)
        chosen = (real & loss_mask[..., None]).repeat(1, draws, 1) & (progress > -EARLY) & (progress < 1)
        tokens = self.token_head.nll(states.flatten(1, 2), table, noisy, t, chunks.repeat(1, draws, 1), chosen)
        count = chosen.sum().clamp_min(1)
        tokens = tokens.unflatten(1, (draws, -1))  # (B, M, N, K)
        cross_entropy = tokens.sum() / count
        return TokComOutput(
            loss=cross_entropy,
            ce_loss=cross_entropy.detach(),
            mse_loss=cross_entropy.new_zeros(()),
            token_losses=tokens[:, 0].detach(),
        )

    def channel_times(self, timestep: torch.Tensor) -> torch.Tensor:
        """Times of latents `(B, N)` -> t of each channel, `(B, N, C)`, or `(B, N, 1)` if all have the same."""
        if self.token_head is None:
            return timestep[..., None]
        channels = self.config.codec_config.latent_channels // self.token_head.chunk_size
        return self.token_head.place_times(timestep).repeat_interleave(channels, dim=-1)

    def _sample_timestep(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        if self.config.timestep_sampling == "uniform":
            return torch.rand(shape, device=device)
        return 1 - torch.sigmoid(torch.randn(shape, device=device) + self.config.timestep_loc)

    def _predict_noised(
        self,
        clean: TokComCodecOutput,
        timestep: float | None,
        chunks: torch.Tensor | None = None,
        table: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Noise the latents, M = `noise_draws` times with one time per block, and estimate them again.

        A token head needs the ids `chunks (B, N, K)` and the codec's `table`.
        Returns the transformer's outputs `(B, M, N, ...)`, the loss mask `(B, N)`, and what it saw: the noisy latents
        `(B, M * N, C)` and their times `(B, M * N)`.
        """
        config, latents, valid = self.config, clean.latents, clean.mask
        batch, length = valid.shape
        draws = config.noise_draws if self.training else 1
        block_size = config.transformer_config.block_size
        order = generation_order(valid, block_size, config.infill_rate if self.training else 0.0)
        t = self._sample_timestep((batch, draws * (2 * length + 1)), latents.device)
        t = t.unflatten(1, (draws, -1)).gather(2, order[:, None].expand(-1, draws, -1)).flatten(1)  # (B, M * N)
        if timestep is not None:
            t = torch.full_like(t, timestep)
        dropout = config.context_dropout if self.training else 0.0
        sees_context = torch.rand(batch, device=latents.device) >= dropout
        loss_mask, position_ids = valid, clean.position_ids
        if block_size is None:
            known = self._sample_known(valid) & sees_context[:, None]
            t, loss_mask = torch.where(known, 1.0, t), valid & ~known
            attention_mask = valid
        else:
            attention_mask = block_causal_mask(order, valid, sees_context, draws)
            position_ids = position_ids.repeat(1, 1 + draws, 1)
        targets = latents.repeat(1, draws, 1)
        noise = torch.randn_like(targets) * config.noise_std
        signal = self.channel_times(t)
        noisy = (1 - signal) * noise + signal * targets  # (B, M * N, C)

        features = None
        if self.token_head is not None:
            features = self.token_head.read(table, noisy, t, chunks.repeat(1, draws, 1))
            if block_size is not None:
                known = self.token_head.read(table, latents, torch.ones_like(t[:, :length]), chunks)
                features = torch.cat((known, features), dim=1)

        def predict(self_condition: torch.Tensor | None) -> torch.Tensor:
            inputs, time, known = noisy, t, 0
            if block_size is not None:
                inputs, known = torch.cat((latents, noisy), dim=1), length
                time = torch.cat((t.new_ones(batch, length), t), dim=1)
                if self_condition is not None:
                    self_condition = torch.cat((torch.zeros_like(latents), self_condition), dim=1)
            output = self.transformer(
                inputs.to(self.dtype),
                time,
                position_ids,
                attention_mask,
                self_condition,
                num_context=known,
                features=features,
            )
            return output.latents[:, -draws * length :]

        estimate = None
        # the coin is Python's generator, which all processes share: sharded passes must be the same in number
        if self.training and config.transformer_config.self_conditioning and random.random() < 0.5:
            with torch.no_grad():
                estimate = predict(None)
                if self.token_head is not None:
                    estimate = self.token_head.expected_latents(estimate, table, noisy, t)
        return predict(estimate).unflatten(1, (draws, length)), loss_mask, noisy, t

    def _sample_known(self, valid: torch.Tensor) -> torch.Tensor:
        """Latents a bidirectional model is shown clean: nothing, a prefix, or all but a gap; `(B, N)`."""
        if not (self.training and self.config.transformer_config.per_latent_timestep):
            return torch.zeros_like(valid)
        batch, length = valid.shape
        draws = torch.rand(3, batch, 1, device=valid.device)
        index = torch.arange(length, device=valid.device)
        start, end = (draws[:2] * length).long().sort(dim=0).values
        gap = torch.where(draws[2] < self.config.infill_rate, index > end, False)
        return valid & ((index < start) | gap)


TokComConfig.register_for_auto_class()
TokComModel.register_for_auto_class("AutoModel")

__all__ = ["TokComModel", "TokComOutput"]
