"""Chunk codec: K consecutive tokens <-> one latent vector.

Notable choices:
- Chunks never see each other, so all chunks of a batch form one dense batch of M = B * N chunks.
- A clipped-KL posterior, token dropout to a learned mask token and latent dropout make the latent
  space robust to the errors of a denoiser.
- Latents leave the codec standardised per channel.
- Padding is the mask token that dropout has trained, never EOS.
- The attention form without a posterior is TokCom v5.2 as published.

Shape legend: B batch, T tokens, K tokens per chunk, N = T/K latents, C latent channels,
E embedding, V vocabulary.
"""

import difflib
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .configuration_codec_tokcom import TokComChunkCodecConfig
from .layers_tokcom import (
    TokComBlock,
    TokComMLP,
    TokComPreTrainedModel,
    TokComRMSNorm,
    chunked_cross_entropy,
    rotary_embedding,
)
from .quantization_tokcom import build_quantizer

DECODE_CHUNK = 256  # latents whose logits exist at once when only ids are wanted


@dataclass
class TokComCodecOutput(ModelOutput):
    """What every codec's `encode` returns.

    Args:
        latents (`torch.FloatTensor` of shape `(B, N, C)`): standardised latents.
        position_ids (`torch.LongTensor` of shape `(B, N, A)`): where each latent stands.
        mask (`torch.BoolTensor` of shape `(B, N)`): latents that hold at least one real token.
        codes (`torch.LongTensor` of shape `(B, N, R)`, *optional*): the codes of each latent, for
            codecs with a quantiser.
        group_size (`int`, *optional*): latents of one moment, of clips.
    """

    latents: torch.FloatTensor | None = None
    position_ids: torch.LongTensor | None = None
    mask: torch.BoolTensor | None = None
    codes: torch.LongTensor | None = None
    group_size: int | None = None


def check_settings(kind: type, settings: dict[str, Any], prefix: str = "") -> None:
    """Raise `ValueError` for a setting that the dataclass `kind` does not have, and name the
    nearest one."""
    known = [field.name for field in fields(kind)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {known}."
            raise ValueError(f"there is no setting {prefix}{name}; {hint}")


@dataclass
class TokComDecoderOutput(ModelOutput):
    """What a token codec's `decode` returns: `logits (B, N * K, V)`."""

    logits: torch.FloatTensor | None = None


class TokComResidualMLP(GradientCheckpointingLayer):
    """Pre-norm residual SwiGLU layer: the chunk codec's layer without attention."""

    def __init__(self, config: TokComChunkCodecConfig):
        super().__init__()
        self.norm = TokComRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = TokComMLP(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.mlp(self.norm(hidden_states))


class TokComChunkMLP(nn.Module):
    """Residual SwiGLU network on the concatenated tokens of a chunk.

    The encoder maps `(M, K, E)` to `(M, D)`, the decoder `(M, D)` to `(M, K, E)`. The decoder
    predicts all K places from the latent alone and ignores `query`.
    """

    def __init__(self, config: TokComChunkCodecConfig, encoder: bool):
        super().__init__()
        chunk_width = config.chunk_size * config.embedding_size  # K * E
        self.proj_in = nn.Linear(chunk_width, config.hidden_size) if encoder else nn.Identity()
        self.layers = nn.ModuleList(
            TokComResidualMLP(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = TokComRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.proj_out = nn.Identity() if encoder else nn.Linear(config.hidden_size, chunk_width)
        # logits are inner products with the embeddings, so what leaves the decoder is normed
        self.output_norm = nn.Identity()
        if not encoder:
            self.output_norm = TokComRMSNorm(config.embedding_size, config.rms_norm_eps)
        self.encoder = encoder
        self.chunk_size = config.chunk_size

    def forward(self, inputs: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
        hidden_states = self.proj_in(inputs.flatten(1))  # (M, D)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        hidden_states = self.proj_out(self.norm(hidden_states))  # (M, D) or (M, K * E)
        if self.encoder:
            return hidden_states  # (M, D)
        return self.output_norm(hidden_states.unflatten(1, (self.chunk_size, -1)))  # (M, K, E)


class TokComChunkTransformer(nn.Module):
    """The published form: a transformer inside each chunk.

    The hidden state of the last position is the latent. The decoder reads
    `[latent, query, query, ...]`.
    """

    def __init__(self, config: TokComChunkCodecConfig, encoder: bool):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            TokComBlock(config, i, modulated=False) for i in range(config.num_hidden_layers)
        )
        self.norm = TokComRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.encoder = encoder

    def forward(self, inputs: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
        size = self.config.chunk_size
        if not self.encoder:  # the latent stands first and each query asks for one more token
            queries = query.to(inputs.dtype).expand(len(inputs), size - 1, -1)
            inputs = torch.cat((inputs[:, None], queries), dim=1)  # (M, K, D)
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        positions = torch.arange(size, device=inputs.device)[None, :, None]  # (1, K, 1)
        tables = rotary_embedding(positions, head_dim, self.config.rope_theta)
        hidden_states = inputs  # (M, K, D)
        for layer in self.layers:
            hidden_states = layer(hidden_states, None, tables)  # no mask: the whole chunk is seen
        hidden_states = self.norm(hidden_states)
        return hidden_states[:, -1] if self.encoder else hidden_states


@dataclass
class TokComCodecLoss:
    """Settings of a codec's `training_loss`, by default none. They belong to a training run, not to
    a model."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if name.endswith("_dropout") and not 0 <= value < 1:
                raise ValueError(f"`{name}` ({value}) is a probability and must be in [0, 1).")
            if value < 0:
                raise ValueError(f"`{name}` ({value}) must not be negative.")


class TokComCodec(TokComPreTrainedModel):
    """Base class of all codecs. Subclasses define `encode`, `decode`, `positions` and
    `training_loss`."""

    loss_class: type[TokComCodecLoss] = TokComCodecLoss

    def set_loss(self, **settings) -> None:
        """Set the fields of `loss_class` for `training_loss`; all others take their defaults.

        Raises `ValueError` for unknown or impossible settings.
        """
        check_settings(self.loss_class, settings, "codec.objective.")
        self.loss_settings = self.loss_class(**settings)

    def from_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(B, N, R)` -> standardised latents `(B, N, C)`, of codecs that have codes."""
        raise ValueError(f"{type(self).__name__} has no codes; give latents.")

    def known(
        self,
        latents: torch.Tensor,
        mask: torch.Tensor | None = None,
        codes: torch.Tensor | None = None,
    ) -> TokComCodecOutput:
        """Wrap known `latents (B, N, C)` as `encode` would return them.

        Without `mask (B, N)`, no latent is padding.
        """
        index = torch.arange(latents.shape[1], device=latents.device).expand(len(latents), -1)
        mask = torch.ones_like(index, dtype=torch.bool) if mask is None else mask  # (B, N)
        return TokComCodecOutput(
            latents, position_ids=self.positions(index), mask=mask, codes=codes
        )

    def token_ids(self, inputs: Any) -> list[torch.Tensor]:
        """The token ids among the inputs of `encode`, which a model checks; here none."""
        return []

    def to_ids(self, latents: torch.Tensor) -> torch.Tensor | None:
        """Ids that latents stand for; None for codecs of other data than texts."""
        return None

    def as_stream(self, inputs: torch.Tensor, num_latents: int) -> torch.Tensor:
        """The inputs of `encode` for a stream of `num_latents` in a composite codec."""
        return inputs

    def stream_nll(self, latents: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor | None:
        """Nats `(B, n, K)` of a stream's tokens given its latents; None without tokens."""
        return None


class TokComTextCodec(TokComCodec):
    """Base class of codecs of texts, which also define `to_chunks`, `to_ids` and `nll`."""

    def whole_chunks(self, mask: torch.Tensor) -> torch.Tensor:
        """Which chunks `(B, N)` have all of their tokens marked by `mask (B, T)`."""
        return self.to_chunks(mask, None)[0].bool().all(-1)

    def token_ids(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        return [inputs]

    def as_stream(self, inputs: torch.Tensor, num_latents: int) -> torch.Tensor:
        length = num_latents * self.config.chunk_size
        if inputs.shape[1] != length:
            raise ValueError(
                f"a stream holds texts of {length} ids (`text_latents`), not {inputs.shape[1]}; "
                "pad them with EOS."
            )
        return inputs

    def to_image(self, ids: torch.Tensor, width: int | None = None) -> torch.Tensor:
        """Ids `(T,)` as a picture; raises `ValueError` unless tokens are pixels."""
        raise ValueError("the tokens of this model are not pixels; load a pixel model.")

    def from_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_image`."""
        raise ValueError("the tokens of this model are not pixels; load a pixel model.")

    def stream_nll(self, latents: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return self.nll(latents, self.to_chunks(inputs, None)[0])

    def loss(
        self,
        latents: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Nats per token `(B, N, K)` of `input_ids (B, T)` given standardised latents.

        Padding has loss 0.
        """
        chunks, real = self.to_chunks(input_ids, attention_mask)
        return self.nll(latents, chunks) * real


CHUNK_NETWORKS = {"mlp": TokComChunkMLP, "attention": TokComChunkTransformer}


@dataclass
class TokComChunkCodecLoss(TokComCodecLoss):
    """Settings of `TokComChunkCodec.training_loss`.

    Args:
        kl_weight: weight of the KL term.
        kl_free_nats: nats per channel that cost nothing.
        token_dropout: share of the tokens that the encoder does not see.
        latent_dropout: share of the channels that the decoder does not see.
    """

    kl_weight: float = 1e-3
    kl_free_nats: float = 0.5
    token_dropout: float = 0.15
    latent_dropout: float = 0.15


class TokComChunkCodec(TokComTextCodec):
    """Variational autoencoder of token chunks (CALM, Shao et al. 2025, and TokCom v5.2).

    The latent is the encoder's posterior mean, standardised per channel with the persistent buffers
    `latent_mean` and `latent_std`. These start as the identity; training measures them after the
    codec stage and calls `set_latent_statistics`.
    """

    config: TokComChunkCodecConfig
    loss_class = TokComChunkCodecLoss
    main_input_name = "input_ids"

    def __init__(self, config: TokComChunkCodecConfig):
        super().__init__(config)
        network = CHUNK_NETWORKS[config.layer_type]
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.encoder = network(config, encoder=True) if config.encoder_type == "chunk" else None
        self.decoder = network(config, encoder=False)
        self.to_posterior = self.from_latent = None
        if config.variational:
            inputs = config.hidden_size
            channels = config.latent_channels
            if config.encoder_type == "token":  # a table lookup: no network over the chunk
                inputs = config.embedding_size
                channels = config.latent_channels // config.chunk_size
            # mean and log-variance
            self.to_posterior = nn.Linear(inputs, 2 * channels)
            self.from_latent = nn.Linear(config.latent_channels, config.hidden_size)
        self.log_precision = None
        if config.encoder_type == "token":
            # how sharply a token is told from its own channels; learned with the decoder
            self.log_precision = nn.Parameter(torch.zeros(1))
        self.quantizer = build_quantizer(
            config.quantizer,
            config.latent_channels,
            config.num_codes,
            config.num_quantizers,
            config.fsq_levels,
        )
        self.latent_mean = nn.Buffer(torch.zeros(config.latent_channels))
        self.latent_std = nn.Buffer(torch.ones(config.latent_channels))
        self.set_loss()
        self.gradient_checkpointing = False
        self.post_init()

    def initialize_parameters(self) -> None:
        # the identity, until training has measured them
        init.zeros_(self.latent_mean)
        init.ones_(self.latent_std)
        if self.log_precision is not None:
            init.zeros_(self.log_precision)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def _posterior(self, chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ids `(M, K)` -> mean and log-variance `(M, C)`; no log-variance without a posterior."""
        hidden_states = self.embed_tokens(chunks)  # (M, K, E)
        if self.encoder is None:  # each token has channels of its own
            mean, log_variance = self._token_posterior(hidden_states).chunk(2, dim=-1)
            # the clamp keeps exp(log_variance) finite when training starts badly
            return mean.flatten(1), log_variance.flatten(1).clamp(-12.0, 4.0)
        hidden_states = self.encoder(hidden_states)  # (M, D)
        if self.to_posterior is None:
            return hidden_states, None
        mean, log_variance = self.to_posterior(hidden_states).float().chunk(2, dim=-1)
        return mean, log_variance.clamp(-12.0, 4.0)

    def _token_posterior(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings `(..., E)` -> mean and log-variance of one token, `(..., 2 C / K)`."""
        # in float32: the token head computes likelihoods from these means
        with torch.autocast(embeddings.device.type, enabled=False):
            normed = F.rms_norm(
                embeddings.float(), embeddings.shape[-1:], eps=self.config.rms_norm_eps
            )
            return F.linear(
                normed, self.to_posterior.weight.float(), self.to_posterior.bias.float()
            )

    def _token_states(self, raw_latents: torch.Tensor) -> torch.Tensor:
        """Raw latents `(M, C)` -> decoder states `(M, K, E)`.

        Their inner products with the token embeddings are the logits.
        """
        # the mask token asks for a token; the published codec calls it omni
        query = self.embed_tokens.weight[self.config.mask_token_id]
        raw_latents = raw_latents.to(query.dtype)
        if self.from_latent is not None:
            raw_latents = self.from_latent(raw_latents)
        return self.decoder(raw_latents, query)

    def _with_likelihood(
        self, states: torch.Tensor, raw_latents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoder states `(M, K, E)` -> states `(M, K, E')` and weights `(V, E')`, whose inner
        products are the logits.

        If each token has channels of its own, two terms add up: the decoder's logits, which depend
        on the other tokens of the chunk, and the Gaussian log-likelihood of the token's channels at
        a learned precision. The likelihood is an inner product too, so one matrix product gives
        both.
        """
        weight = self.embed_tokens.weight
        if self.log_precision is None:
            return states, weight
        means = self._token_posterior(weight).chunk(2, dim=-1)[0].to(weight.dtype)  # (V, C / K)
        precision = self.log_precision.exp().expand(*states.shape[:2], 1)  # (M, K, 1)
        own = raw_latents.unflatten(-1, (self.config.chunk_size, -1)).to(weight.dtype) * precision
        states = torch.cat((states.to(weight.dtype), own, precision), dim=-1)  # (M, K, E')
        # -|x - m|^2 / 2 = x m - |m|^2 / 2 up to a constant: the last column holds the norms
        norms = -0.5 * means.square().sum(-1, keepdim=True)  # (V, 1)
        return states, torch.cat((weight, means, norms), dim=-1)

    def _denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        """Standardised latents `(B, N, C)` -> raw latents `(M, C)`."""
        return (latents * self.latent_std + self.latent_mean).flatten(0, -2)  # (M, C)

    def to_chunks(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids `(B, T)` -> ids `(B, N, K)`, with `pad_token_id` at padding, and a mask of real
        tokens. Raises `ValueError` if T is no multiple of K."""
        if input_ids.shape[1] % self.config.chunk_size:
            size = self.config.chunk_size
            length = input_ids.shape[1]
            raise ValueError(
                f"the sequence length ({length}) must be a multiple of `chunk_size` ({size}); pad "
                f"to {length + -length % size} tokens and mark the padding in `attention_mask` "
                "(TokComPipeline does so)."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        real = attention_mask.bool()
        # whatever the caller left in padded places must not reach a latent
        ids = torch.where(real, input_ids, self.config.pad_token_id)
        shape = (-1, self.config.chunk_size)
        return ids.unflatten(1, shape), real.unflatten(1, shape)  # (B, N, K) each

    def encode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> TokComCodecOutput:
        """Token ids `(B, T)`, T a multiple of K -> standardised latents.

        `attention_mask (B, T)` is 0 on padding.
        """
        chunks, real = self.to_chunks(input_ids, attention_mask)  # (B, N, K) each
        mean, _ = self._posterior(chunks.flatten(0, 1))  # (M, C)
        codes = None
        if self.quantizer is not None:
            # frozen: encoding must not move the codebook, even in training mode
            quantized = self.quantizer(mean, frozen=True)
            mean = quantized.latents
            codes = quantized.codes.unflatten(0, chunks.shape[:2])
        latents = (mean - self.latent_mean) / self.latent_std
        latents = latents.unflatten(0, chunks.shape[:2])  # (B, N, C)
        return self.known(latents.to(self.embed_tokens.weight.dtype), real.any(-1), codes)

    def from_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(B, N, R)` of `encode` -> standardised latents `(B, N, C)`.

        Raises `ValueError` if the codec has no quantiser.
        """
        if self.quantizer is None:
            raise ValueError(
                "this codec has no quantiser, so its latents have no codes; train one with "
                "`quantizer=vq` or `fsq`."
            )
        latents = self.quantizer.decode(codes).to(self.latent_mean.dtype)  # raw, (B, N, C)
        return ((latents - self.latent_mean) / self.latent_std).to(self.embed_tokens.weight.dtype)

    def positions(self, index: torch.Tensor) -> torch.Tensor:
        """Index of latents in reading order `(...)` -> their positions `(..., A)`."""
        return index[..., None]

    def decode(self, latents: torch.Tensor) -> TokComDecoderOutput:
        """Standardised latents `(B, N, C)` -> logits `(B, N * K, V)`."""
        raw_latents = self._denormalize(latents)
        states = self._token_states(raw_latents)  # (B * N, K, E)
        # likelihoods are differences of large numbers: not in bfloat16
        with torch.autocast(states.device.type, enabled=False):
            states, weight = self._with_likelihood(states, raw_latents)
            logits = F.linear(states.to(weight.dtype), weight)
        logits = logits.reshape(latents.shape[0], -1, self.config.vocab_size)
        if self.config.impossible_symbol is not None:  # text never decodes to the pad token
            ids = torch.arange(self.config.vocab_size, device=logits.device)
            logits = logits.masked_fill(ids == self.config.impossible_symbol, float("-inf"))
        return TokComDecoderOutput(logits=logits)

    def symbol_table(self) -> torch.Tensor:
        """The token table: standardised latents of every id at every place of a chunk,
        `(K, V, C / K)`, float32.

        With `encoder_type="token"` the latent of a chunk is the concatenation of its tokens' rows.
        """
        table = self._token_posterior(self.embed_tokens.weight).chunk(2, dim=-1)[0]  # (V, C / K)
        shape = (self.config.chunk_size, 1, -1)  # channels of different places differ in statistics
        return (table - self.latent_mean.view(shape)) / self.latent_std.view(shape)

    def symbols(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The symbols that `symbol_table` has rows for, and their mask, as `to_chunks` returns
        them. Here a symbol is a token."""
        return self.to_chunks(input_ids, attention_mask)

    def from_chunks(self, chunks: torch.Tensor) -> torch.Tensor:
        """Ids `(B, N, K)` -> ids `(B, N * K)` in reading order: the inverse of `to_chunks`."""
        return chunks.flatten(1)

    def from_symbols(self, symbols: torch.Tensor) -> torch.Tensor:
        """Symbols `(B, N, K)` -> token ids `(B, N * K)`."""
        return symbols.flatten(1)

    def to_ids(self, latents: torch.Tensor) -> torch.Tensor:
        """Standardised latents `(B, N, C)` -> the most likely ids `(B, N * K)`.

        Works on a few latents at a time, so that the logits of a long text are never all in memory.
        """
        # chunks are decoded alone, so any grouping gives the same ids
        pieces = latents.flatten(0, 1).split(DECODE_CHUNK)
        ids = torch.cat([self.decode(piece[None]).logits[0].argmax(-1) for piece in pieces])
        return ids.view(latents.shape[0], -1)

    def nll(self, latents: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
        """Nats `(B, n, K)` of the ids `chunks (B, n, K)` given their latents `(B, n, C)`."""
        return self._token_nll(self._denormalize(latents), chunks)

    def _token_nll(self, raw_latents: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
        """Nats per token of the ids `chunks (..., K)` given raw latents `(M, C)`."""
        states = self._token_states(raw_latents)  # (M, K, E)
        states, weight = self._with_likelihood(states, raw_latents)
        if self.config.impossible_symbol == self.config.vocab_size - 1:
            # text never decodes to the pad token: leave out its row, which is the last
            weight = weight[:-1]
            chunks = chunks.clamp_max(len(weight) - 1)  # callers mask the loss of padding
        losses = chunked_cross_entropy(states.flatten(0, 1), weight, chunks.flatten())  # (M * K,)
        return losses.view(chunks.shape)

    def training_loss(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of the codec stage: K x cross-entropy per token + `kl_weight` x KL.

        The KL of each channel is clipped below at `kl_free_nats`. With a quantiser, its commitment
        loss replaces the KL. Dropouts and the noise of the posterior act in training mode only.

        Returns: the scalar loss, and its detached parts `ce_loss` (nats per token) and `kl_loss`
            (nats per chunk).
        """
        settings = self.loss_settings
        chunks, real = self.to_chunks(input_ids, attention_mask)
        inputs = chunks  # dropout changes what is read, never what is predicted
        if self.training and settings.token_dropout:
            dropped = torch.rand(chunks.shape, device=chunks.device) < settings.token_dropout
            inputs = torch.where(dropped, self.config.mask_token_id, chunks)
        latents, log_variance = self._posterior(inputs.flatten(0, 1))  # (B * N, C) each
        kl = latents.new_zeros(())  # a quantiser or no posterior has none
        if self.quantizer is not None:
            quantized = self.quantizer(latents)
            latents = quantized.latents
        elif log_variance is not None:
            divergence = 0.5 * (latents.square() + log_variance.exp() - 1 - log_variance)  # (M, C)
            # free nats: a channel that is below them has no reason to collapse further
            kl = divergence.clamp_min(settings.kl_free_nats).sum(-1)
            # a chunk of nothing but padding costs nothing
            kl = (kl * real.flatten(0, 1).any(-1)).sum() / real.any(-1).sum().clamp_min(1)
            if self.training:  # the reparametrisation trick
                latents = latents + torch.randn_like(latents) * (0.5 * log_variance).exp()
        if self.training and settings.latent_dropout:
            # the flow's estimates are never exact: the decoder must forgive what is missing
            latents = F.dropout(latents, settings.latent_dropout)
        nll = self._token_nll(latents, chunks)  # (B, N, K)
        cross_entropy = (nll * real).sum() / real.sum().clamp_min(1)
        penalty = settings.kl_weight * kl if self.quantizer is None else quantized.loss
        # nats per chunk, the unit of the KL
        loss = self.config.chunk_size * cross_entropy + penalty
        return loss, {"ce_loss": cross_entropy.detach(), "kl_loss": kl.detach()}

    @torch.no_grad()
    def set_latent_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Store mean and standard deviation `(C,)` of raw latents, measured on training text."""
        self.latent_mean.copy_(mean)
        # a channel that never varies must not be divided by 0
        self.latent_std.copy_(std.clamp_min(1e-6))


__all__ = [
    "TokComChunkCodec",
    "TokComChunkCodecLoss",
    "TokComCodec",
    "TokComCodecLoss",
    "TokComCodecOutput",
    "TokComDecoderOutput",
    "TokComTextCodec",
    "check_settings",
]
