"""TokCom configuration: one codec, one transformer, and how the flow between noise and latents is trained.

Notable choices: every field exists because two published presets differ in it; all checks live in
`validate_architecture`, which the strict dataclass runs after construction; a preset is a small dictionary.

Shape legend used in every file: B batch, T tokens, K tokens per chunk, N = T/K latents, C latent channels,
D width, H heads, A position axes, V vocabulary.
"""

import math
from copy import deepcopy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

MAX_PARAMETERS = 10**12
MAX_LAYERS = 1024


def _check_positive(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"`{name}` ({getattr(config, name)}) must be at least 1.")


def _check_fraction(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ValueError(f"`{name}` ({getattr(config, name)}) is a probability and must be in [0, 1).")


def _check_size(config: PreTrainedConfig, parameters: int) -> None:
    """Refuse what no machine can hold, before anything is allocated."""
    if config.num_hidden_layers > MAX_LAYERS or parameters > MAX_PARAMETERS:
        raise ValueError(
            f"{type(config).__name__} asks for about {parameters:.1e} parameters in {config.num_hidden_layers} layers; at most "
            f"{MAX_PARAMETERS:.0e} in {MAX_LAYERS} are built. Check its sizes, or whom the file comes from."
        )


def _check_heads(config: PreTrainedConfig) -> None:
    if config.hidden_size % (2 * config.num_attention_heads):
        raise ValueError(
            f"`hidden_size` ({config.hidden_size}) must be an even multiple of `num_attention_heads` "
            f"({config.num_attention_heads}); rotary embedding pairs the channels of a head."
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"`num_attention_heads` ({config.num_attention_heads}) must be a multiple of `num_key_value_heads` "
            f"({config.num_key_value_heads}) for grouped-query attention."
        )


@strict
class TokComChunkCodecConfig(PreTrainedConfig):
    r"""Configuration of the codec `tokens <-> one latent per chunk`.

    Args:
        vocab_size (`int`): V, the tokenizer's length plus one: the last row is the learned mask token.
        mask_token_id (`int`): id of that extra token. It replaces dropped and padded tokens at the encoder and is the
            decoder's query in the attention form (the published "omni" token).
        pad_token_id (`int`): id written into padded places before encoding; `mask_token_id` except in converted v5.2.
        chunk_size (`int`): K, tokens per latent.
        latent_channels (`int`): C.
        layer_type (`str`): `"mlp"`, residual SwiGLU layers on the concatenated embeddings of a chunk, or
            `"attention"`, the published transformer inside each chunk.
        embedding_size (`int`): width of the tied token embedding; equals `hidden_size` in the attention form.
        variational (`bool`): a Gaussian posterior head and linear maps to and from C channels. `False` is the
            published autoencoder, whose latent is the last hidden state, so `latent_channels == hidden_size`.
        kl_weight (`float`), kl_free_nats (`float`): weight of the KL term, and the nats per channel that cost nothing.
        encoder_type (`str`): `"chunk"`, a network over the K tokens, or `"token"`, C / K channels per token, which makes
            the mean latent of token probabilities exact (`prediction_type="tokens"`).
        token_dropout (`float`), latent_dropout (`float`): training probabilities in [0, 1).
        num_micro_decoder_layers (`int`): layers of a causal network inside the chunk, which decodes each token given the
            latent and the tokens before it; 0 decodes all K independently.
        micro_decoder_dropout (`float`): share of the tokens fed back that training masks.
        quantizer (`str`): `"none"`, `"vq"` or `"fsq"`: latents take one of finitely many values, so that a text is stored as
            codes. Then there is no posterior noise and no KL.
        num_codes (`int`), num_quantizers (`int`): for `"vq"`: codes of a codebook, and codebooks, each of which quantises what
            the ones before it left over.
        fsq_levels (`list[int]`): for `"fsq"`: levels of every latent channel.
        quantized_latents (`bool`): whether the flow learns the quantised latents, or those before the quantiser, which then is
            the first part of the decoder.
    """

    model_type = "tokcom_chunk_codec"
    base_config_key = "codec_config"

    vocab_size: int = 4097
    mask_token_id: int = 4096
    pad_token_id: int = 4096
    chunk_size: int = 4
    latent_channels: int = 64
    layer_type: str = "mlp"
    encoder_type: str = "chunk"
    embedding_size: int = 128
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    attention_bias: bool = False
    qk_norm: bool = True
    rope_theta: float | int = 10000.0
    rms_norm_eps: float = 1e-6
    variational: bool = True
    kl_weight: float | int = 1e-3
    kl_free_nats: float | int = 0.5
    token_dropout: float | int = 0.15
    latent_dropout: float | int = 0.15
    num_micro_decoder_layers: int = 0
    micro_decoder_dropout: float | int = 0.3
    quantizer: str = "none"
    num_codes: int = 1024
    num_quantizers: int = 1
    fsq_levels: list[int] | None = None
    quantized_latents: bool = True
    initializer_range: float = 0.02

    @property
    def bits_per_token(self) -> float | None:
        """Bits that store one token as codes; None without a quantiser."""
        if self.quantizer == "none":
            return None
        sizes = self.fsq_levels if self.quantizer == "fsq" else [self.num_codes] * self.num_quantizers
        return sum(math.log2(size) for size in sizes) / self.chunk_size

    @property
    def length_multiple(self) -> int:
        """Tokens of which a text must hold a multiple."""
        return self.chunk_size

    @property
    def has_symbols(self) -> bool:
        """Whether a latent is the concatenation of what its symbols look like."""
        return self.encoder_type == "token"

    @property
    def num_symbols(self) -> int:
        """Symbols of a chunk, each of which has channels of its own; here the tokens."""
        return self.chunk_size

    @property
    def symbol_vocab_size(self) -> int:
        return self.vocab_size

    def validate_architecture(self):
        sizes = ("vocab_size", "chunk_size", "latent_channels", "embedding_size", "hidden_size", "intermediate_size")
        _check_positive(self, *sizes, "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        _check_fraction(self, "token_dropout", "latent_dropout", "micro_decoder_dropout")
        if self.num_micro_decoder_layers < 0 or (self.num_micro_decoder_layers and self.chunk_size == 1):
            raise ValueError(
                f"`num_micro_decoder_layers` ({self.num_micro_decoder_layers}) must be 0, or positive with a "
                f"`chunk_size` ({self.chunk_size}) above 1: it orders the tokens inside a chunk."
            )
        if self.layer_type not in ("mlp", "attention"):
            raise ValueError(f"`layer_type` ({self.layer_type!r}) must be 'mlp' or 'attention'.")
        if self.encoder_type not in ("chunk", "token"):
            raise ValueError(f"`encoder_type` ({self.encoder_type!r}) must be 'chunk' or 'token'.")
        if self.encoder_type == "token" and (self.latent_channels % self.chunk_size or not self.variational):
            raise ValueError(
                f"`encoder_type='token'` needs `variational=True` and `latent_channels` ({self.latent_channels}) to be a "
                f"multiple of `chunk_size` ({self.chunk_size})."
            )
        self._validate_quantizer()
        if self.layer_type == "attention":
            _check_heads(self)
            if self.embedding_size != self.hidden_size:
                raise ValueError(
                    f"`embedding_size` ({self.embedding_size}) must equal `hidden_size` ({self.hidden_size}) "
                    "when `layer_type` is 'attention'."
                )
        if not self.variational and self.latent_channels != self.hidden_size:
            raise ValueError(
                f"`latent_channels` ({self.latent_channels}) must equal `hidden_size` ({self.hidden_size}) when "
                "`variational` is False, because the hidden state itself is the latent; set `variational=True`."
            )
        for name in ("mask_token_id", "pad_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"`{name}` ({getattr(self, name)}) must be in [0, vocab_size={self.vocab_size}).")
        layer = self.hidden_size * (
            4 * self.hidden_size * (self.layer_type == "attention") + 3 * self.intermediate_size
        )
        chunk = self.chunk_size * self.embedding_size
        parameters = self.vocab_size * self.embedding_size + 2 * self.num_hidden_layers * layer
        parameters += self.hidden_size * (2 * chunk + 3 * self.latent_channels)
        parameters += self.num_micro_decoder_layers * layer + self.hidden_size * chunk
        if self.quantizer == "vq":
            parameters += 2 * self.num_quantizers * self.num_codes * self.latent_channels
        _check_size(self, parameters)

    def _validate_quantizer(self):
        if self.quantizer not in ("none", "vq", "fsq"):
            raise ValueError(f"`quantizer` ({self.quantizer!r}) must be 'none', 'vq' or 'fsq'.")
        if self.quantizer != "none" and self.encoder_type != "chunk":
            raise ValueError(
                f"`quantizer` ({self.quantizer!r}) needs `encoder_type='chunk'`, not {self.encoder_type!r}."
            )
        if self.quantizer == "vq" and (self.num_codes < 2 or self.num_quantizers < 1):
            raise ValueError(
                f"`num_codes` ({self.num_codes}) must be at least 2 and `num_quantizers` ({self.num_quantizers}) at least 1."
            )
        if self.quantizer == "fsq" and len(self.fsq_levels or ()) != self.latent_channels:
            raise ValueError(
                f"`fsq_levels` ({self.fsq_levels}) must give the levels of every one of the {self.latent_channels} "
                "`latent_channels`."
            )
        if self.quantizer == "fsq" and math.prod(self.fsq_levels) >= 2**63:
            raise ValueError(
                f"`fsq_levels` ({self.fsq_levels}) have {math.prod(self.fsq_levels):.1e} codes, more than 64 bits; lower the "
                "levels or `latent_channels`."
            )


@strict
class TokComTransformerConfig(PreTrainedConfig):
    r"""Configuration of the transformer that predicts clean latents.

    Args:
        latent_channels (`int`): C, equal to the codec's.
        max_position_embeddings (`int`): the longest sequence in latents that training sees. Longer prompts are an error;
            block-causal generation goes on over a window of this size.
        num_position_axes (`int`): A, the axes of `position_ids (B, N, A)` among which a head's channels are split.
        conditioning_size (`int`): width of the timestep embedding that feeds adaLN.
        timestep_scale (`float`): factor on t before the sinusoids. 1000 tells neighbouring times apart; the published
            v5.2 used 1.
        adaln_gates (`bool`): gated adaLN-zero (a block is the identity at init); `False` is the published form.
        input_projection (`bool`): a linear map C -> D before the blocks; `False` (published) needs `C == D`.
        self_conditioning (`bool`): the previous estimate of x1 is a second input.
        per_latent_timestep (`bool`): known latents are told t = 1. `False` (published): one t for the whole sequence,
            so training never shows a clean prompt and sampling tells it the time of its neighbours.
        block_size (`int`, *optional*): Q, latents denoised at once under block-causal attention; `None` is the
            published bidirectional model.
        num_context_layers (`int`): the first layers, which only clean latents pass, once; noisy latents enter after
            them and are all that is repeated at every sampling step. 0 is one network for both.
        head_attention (`bool`): whether the layers after the context layers attend to context and block, or see the
            context only through the state of its last latent.
        feature_size (`int`): width of an input that is read instead of the latents, and of the output; 0 reads and
            predicts latents. Set by `prediction_type="tokens"`.
    """

    model_type = "tokcom_transformer"
    base_config_key = "transformer_config"

    latent_channels: int = 64
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    max_position_embeddings: int = 128
    num_position_axes: int = 1
    attention_bias: bool = False
    qk_norm: bool = True
    rope_theta: float | int = 10000.0
    rms_norm_eps: float = 1e-6
    conditioning_size: int = 128
    timestep_scale: float | int = 1000.0
    adaln_gates: bool = True
    input_projection: bool = True
    self_conditioning: bool = True
    per_latent_timestep: bool = True
    block_size: int | None = 4
    num_context_layers: int = 0
    head_attention: bool = True
    feature_size: int = 0
    initializer_range: float = 0.02

    def validate_architecture(self):
        _check_positive(self, "latent_channels", "hidden_size", "intermediate_size", "num_hidden_layers")
        _check_positive(self, "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
        _check_positive(self, "num_position_axes", "conditioning_size")
        _check_heads(self)
        head_size = self.hidden_size // self.num_attention_heads
        if head_size % (2 * self.num_position_axes):
            raise ValueError(
                f"the head size ({head_size}) must be a multiple of 2 x `num_position_axes` "
                f"({self.num_position_axes}); change `hidden_size` or `num_attention_heads`."
            )
        if self.conditioning_size % 2:
            raise ValueError(f"`conditioning_size` ({self.conditioning_size}) must be even: half cosines, half sines.")
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"`block_size` ({self.block_size}) must be at least 1, or None for bidirectional.")
        if self.block_size is not None and self.block_size >= self.max_position_embeddings:
            raise ValueError(
                f"`block_size` ({self.block_size}) must be smaller than `max_position_embeddings` "
                f"({self.max_position_embeddings}), or nothing fits before a block; use None to see all at once."
            )
        if not 0 <= self.num_context_layers < self.num_hidden_layers:
            raise ValueError(
                f"`num_context_layers` ({self.num_context_layers}) must be at least 0 and below `num_hidden_layers` "
                f"({self.num_hidden_layers}): the rest denoise."
            )
        if self.num_context_layers and self.block_size is None:
            raise ValueError(
                f"`num_context_layers` ({self.num_context_layers}) needs a `block_size`: a bidirectional model has no "
                "context that is finished."
            )
        if not self.head_attention and (self.block_size != 1 or not self.num_context_layers):
            raise ValueError(
                f"`head_attention=False` needs `block_size=1` (got {self.block_size}) and context layers "
                f"(got {self.num_context_layers}): the latents of a block would not see each other."
            )
        if not self.per_latent_timestep and self.block_size is not None:
            raise ValueError(
                f"`per_latent_timestep=False` needs `block_size=None`, got {self.block_size}: block-causal generation "
                "conditions on clean latents."
            )
        if not self.input_projection and (self.latent_channels != self.hidden_size or self.self_conditioning):
            raise ValueError(
                f"`input_projection=False` needs `latent_channels` ({self.latent_channels}) equal to `hidden_size` "
                f"({self.hidden_size}) and no self-conditioning; set `input_projection=True`."
            )
        layer = self.hidden_size * (4 * self.hidden_size + 3 * self.intermediate_size + 6 * self.conditioning_size)
        ends = self.hidden_size * (2 * self.feature_size + 3 * self.latent_channels)
        _check_size(self, self.num_hidden_layers * layer + ends)


@strict
class TokComColorCodecConfig(PreTrainedConfig):
    r"""Configuration of the codec `token id <-> pixel` (PixelDLM), which has no parameters.

    Args:
        vocab_size, mask_token_id, pad_token_id (`int`): as in `TokComChunkCodecConfig`; the mask token is never decoded to.
        digits (`str`): `"color"`, three digits of base 256 (red, green, blue), or `"bits"`, the binary digits (analog
            bits, Chen et al. 2023).
        symbols (`str`): what `prediction_type="tokens"` gives probabilities to: `"digits"`, each on its own, or `"tokens"`,
            whole tokens of which the digits are noisy channels.
        patch_size (`int`): a latent is a patch of `patch_size` x `patch_size` tokens.
        layout (`str`): `"contiguous"`, a patch holds consecutive tokens, or `"raster"`, tokens fill the rows of an image.
        image_size (`int`): width of that image in pixels, a multiple of `patch_size`; also spaces the patches' positions.
        standardize (`bool`): give every digit mean 0 and standard deviation 1 over the vocabulary; `False` maps 0..255 to
            -1..1 as published, which leaves high digits that hardly vary to the noise.
        digit_sigma (`float`): width, in digits, of the Gaussian that turns a predicted channel into digit logits.
    """

    model_type = "tokcom_color_codec"
    base_config_key = "codec_config"

    vocab_size: int = 4097
    mask_token_id: int = 4096
    pad_token_id: int = 4096
    digits: str = "color"
    symbols: str = "digits"
    patch_size: int = 4
    layout: str = "contiguous"
    image_size: int = 64
    standardize: bool = True
    digit_sigma: float | int = 0.25

    @property
    def has_symbols(self) -> bool:
        """A patch is the concatenation of its digits."""
        return True

    @property
    def chunk_size(self) -> int:
        """K, tokens per patch."""
        return self.patch_size**2

    @property
    def digits_per_token(self) -> int:
        return 3 if self.digits == "color" else max(1, (self.vocab_size - 1).bit_length())

    @property
    def base(self) -> int:
        """How many values a digit has."""
        return 256 if self.digits == "color" else 2

    @property
    def symbol_vocab_size(self) -> int:
        return self.vocab_size if self.symbols == "tokens" else self.base

    @property
    def num_symbols(self) -> int:
        """Digits or tokens of a patch."""
        return self.chunk_size if self.symbols == "tokens" else self.latent_channels

    @property
    def latent_channels(self) -> int:
        return self.chunk_size * self.digits_per_token

    @property
    def num_valid_ids(self) -> int:
        """Ids that decoding may give: all but a mask token at the end."""
        return self.vocab_size - (self.mask_token_id == self.vocab_size - 1)

    @property
    def length_multiple(self) -> int:
        """Tokens of which a text must hold a multiple: a patch, or in raster order a row of patches."""
        return self.chunk_size if self.layout == "contiguous" else self.image_size * self.patch_size

    def validate_architecture(self):
        _check_positive(self, "vocab_size", "patch_size", "image_size")
        if self.digits not in ("color", "bits"):
            raise ValueError(f"`digits` ({self.digits!r}) must be 'color' or 'bits'.")
        if self.symbols not in ("digits", "tokens"):
            raise ValueError(f"`symbols` ({self.symbols!r}) must be 'digits' or 'tokens'.")
        if self.layout not in ("contiguous", "raster"):
            raise ValueError(f"`layout` ({self.layout!r}) must be 'contiguous' or 'raster'.")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"`image_size` ({self.image_size}) must be a multiple of `patch_size` ({self.patch_size})."
            )
        if self.digits == "color" and self.vocab_size > 256**3:
            raise ValueError(f"`vocab_size` ({self.vocab_size}) is more than the {256**3} colors; use digits='bits'.")
        if self.digit_sigma <= 0:
            raise ValueError(f"`digit_sigma` ({self.digit_sigma}) must be positive.")


STAGES = ("codec", "flow", "head")
CODEC_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    config.model_type: config for config in (TokComChunkCodecConfig, TokComColorCodecConfig)
}


@strict
class TokComConfig(PreTrainedConfig):
    r"""Configuration of a TokCom model: codec, transformer, and the flow-matching objective.

    Args:
        codec_config, transformer_config: sub-configurations or their dictionaries; a codec dictionary's `model_type`
            chooses the codec class.
        stage (`str`): `"codec"`, `"flow"` or `"head"`: which loss `forward` returns and which part is trainable.
        prediction_type (`str`): `"latents"`, the transformer predicts x1; or `"tokens"`, it predicts token
            probabilities and x1 is the mean latent under them.
        token_embedding_size (`int`): width of the embedding through which `"tokens"` reads and predicts tokens.
        token_stagger (`float`): in [0, 1], for `"tokens"`: how much later each token of a chunk is denoised than the one
            before it; 0 is all together, 1 one after the other.
        latent_stagger (`float`): in [0, 1], for `"tokens"`: the same for the latents of a block.
        token_shift (`float`): for `"tokens"`: warp of each token's time; above 1 spends more of it on noise.
        noise_std (`float`): standard deviation of x0; 1 on standardised latents, 0.05 in published v5.2.
        timestep_sampling (`str`): `"logit_normal"`, t = 1 - sigmoid(N(timestep_loc, 1)), or `"uniform"`.
        timestep_loc (`float`): larger is noisier; the sampling grid is shifted by the same amount.
        mse_weight, ce_weight (`float`): weights of the x1 regression and of the cross-entropy through the decoder.
        ce_share (`float`): in (0, 1], for `"latents"`: share of the latents, drawn at every training step, that the
            cross-entropy is computed of; the decoder is most of a step where it is as deep as the transformer.
        frequency_weight (`float`): weight of the mean absolute error of the estimate's DCT-II coefficients, for pixels that are
            regressed (`"latents"` and a color codec); 0 is off.
        latent_head (`str`), latent_refiner (`str`): networks between the estimate and the decoder, for `"latents"`: `"none"`,
            `"mlp"` or `"vq"` (an MLP and a codebook), and `"none"`, `"mlp"` or for pixels `"unet"`. Trained in stage `"head"`.
        latent_head_size (`int`), latent_refiner_size (`int`), latent_head_codes (`int`): their widths and codes.
        noise_draws (`int`): noisy copies of every latent that one pass over the clean text trains; the cross-entropy
            is computed on the first.
        context_dropout (`float`): share of training rows that lose their context, for classifier-free guidance.
        infill_rate (`float`): share of training rows with a gap that is generated after what follows it.
        num_inference_steps (`int`), sampling_temperature (`float`), sampling_top_p (`float`): what the pipeline samples with
            if the caller names no other: steps per block, and how token probabilities are sharpened.
    """

    model_type = "tokcom"
    sub_configs = {"codec_config": TokComChunkCodecConfig, "transformer_config": TokComTransformerConfig}

    codec_config: PreTrainedConfig | dict[str, Any] | None = None
    transformer_config: PreTrainedConfig | dict[str, Any] | None = None
    stage: str = "codec"
    prediction_type: str = "latents"
    token_embedding_size: int = 128
    token_stagger: float | int = 0.0
    latent_stagger: float | int = 0.0
    token_shift: float | int = 3.0
    noise_std: float | int = 1.0
    timestep_sampling: str = "logit_normal"
    timestep_loc: float | int = 0.6
    mse_weight: float | int = 1.0
    ce_weight: float | int = 0.2
    ce_share: float | int = 1.0
    frequency_weight: float | int = 0.0
    latent_head: str = "none"
    latent_refiner: str = "none"
    latent_head_size: int = 4096
    latent_refiner_size: int = 256
    latent_head_codes: int = 8192
    noise_draws: int = 1
    context_dropout: float | int = 0.1
    infill_rate: float | int = 0.1
    num_inference_steps: int = 16
    sampling_temperature: float | int = 1.0
    sampling_top_p: float | int = 1.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if not isinstance(self.codec_config, PreTrainedConfig):
            fields = dict(self.codec_config or {})
            codec_type = fields.pop("model_type", TokComChunkCodecConfig.model_type)
            if codec_type not in CODEC_CONFIGS:
                raise ValueError(f"unknown codec type {codec_type!r}; known are {sorted(CODEC_CONFIGS)}.")
            _check_known_keys(CODEC_CONFIGS[codec_type], fields, "codec_config.")
            self.codec_config = CODEC_CONFIGS[codec_type](**fields)
        if not isinstance(self.transformer_config, PreTrainedConfig):
            fields = {k: v for k, v in (self.transformer_config or {}).items() if k != "model_type"}
            _check_known_keys(TokComTransformerConfig, fields, "transformer_config.")
            self.transformer_config = TokComTransformerConfig(**fields)
        if isinstance(self.codec_config, TokComColorCodecConfig):  # follows from the vocabulary
            self.transformer_config.latent_channels = self.codec_config.latent_channels
        width = self.codec_config.num_symbols * self.token_embedding_size if self.prediction_type == "tokens" else 0
        self.transformer_config.feature_size = width
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        if self.codec_config.latent_channels != self.transformer_config.latent_channels:
            raise ValueError(
                f"`codec_config.latent_channels` ({self.codec_config.latent_channels}) and "
                f"`transformer_config.latent_channels` ({self.transformer_config.latent_channels}) must be equal."
            )
        if self.stage not in STAGES:
            raise ValueError(f"`stage` ({self.stage!r}) must be one of {STAGES}.")
        self._validate_head()
        if self.timestep_sampling not in ("logit_normal", "uniform"):
            raise ValueError(f"`timestep_sampling` ({self.timestep_sampling!r}) must be 'logit_normal' or 'uniform'.")
        if self.prediction_type not in ("latents", "tokens"):
            raise ValueError(f"`prediction_type` ({self.prediction_type!r}) must be 'latents' or 'tokens'.")
        if self.prediction_type == "tokens" and not self.codec_config.has_symbols:
            raise ValueError(
                "`prediction_type='tokens'` needs `codec_config.encoder_type='token'`, or a codec of digits: only then is "
                "the mean latent of token probabilities known."
            )
        block_size = self.transformer_config.block_size
        if self.latent_stagger and (self.prediction_type != "tokens" or block_size is None):
            raise ValueError(
                f"`latent_stagger` ({self.latent_stagger}) needs `prediction_type='tokens'` (got {self.prediction_type!r}) "
                f"and a `block_size` (got {block_size}); set it to 0."
            )
        if not 0 <= self.token_stagger <= 1 or not 0 <= self.latent_stagger <= 1 or self.token_shift <= 0:
            raise ValueError(
                f"`token_stagger` ({self.token_stagger}) and `latent_stagger` ({self.latent_stagger}) must be in [0, 1] "
                f"and `token_shift` ({self.token_shift}) positive."
            )
        if self.noise_std <= 0:
            raise ValueError(f"`noise_std` ({self.noise_std}) must be positive.")
        if self.mse_weight < 0 or self.ce_weight < 0 or self.mse_weight + self.ce_weight == 0:
            raise ValueError(
                f"`mse_weight` ({self.mse_weight}) and `ce_weight` ({self.ce_weight}) must not be negative, "
                "and one of them must be positive."
            )
        _check_fraction(self, "context_dropout", "infill_rate")
        if self.noise_draws < 1 or (self.noise_draws > 1 and self.transformer_config.block_size is None):
            raise ValueError(
                f"`noise_draws` ({self.noise_draws}) must be at least 1, and 1 for a bidirectional model "
                "(`block_size=None`), which has no clean half to share."
            )

    @property
    def has_latent_head(self) -> bool:
        return self.latent_head != "none" or self.latent_refiner != "none"

    def _validate_head(self):
        colors = isinstance(self.codec_config, TokComColorCodecConfig)
        if self.latent_head not in ("none", "mlp", "vq") or self.latent_refiner not in ("none", "mlp", "unet"):
            raise ValueError(
                f"`latent_head` ({self.latent_head!r}) must be 'none', 'mlp' or 'vq', and `latent_refiner` "
                f"({self.latent_refiner!r}) 'none', 'mlp' or 'unet'."
            )
        if self.has_latent_head and self.prediction_type != "latents":
            raise ValueError(
                f"`latent_head` ({self.latent_head!r}) and `latent_refiner` ({self.latent_refiner!r}) need "
                "`prediction_type='latents'`: tokens that are drawn have exact latents."
            )
        if self.stage == "head" and not self.has_latent_head:
            raise ValueError("stage 'head' trains `latent_head` and `latent_refiner`, but both are 'none'.")
        if self.latent_refiner == "unet" and (not colors or self.transformer_config.block_size is not None):
            raise ValueError(
                "`latent_refiner='unet'` works on whole pictures: it needs a color codec and `block_size=None`; use 'mlp'."
            )
        if self.frequency_weight < 0 or (self.frequency_weight and (self.prediction_type != "latents" or not colors)):
            raise ValueError(
                f"`frequency_weight` ({self.frequency_weight}) must not be negative, and needs `prediction_type='latents'` "
                "and a color codec."
            )
        if not 0 < self.ce_share <= 1:
            raise ValueError(f"`ce_share` ({self.ce_share}) must be in (0, 1].")
        _check_positive(self, "latent_head_size", "latent_refiner_size", "latent_head_codes", "token_embedding_size")
        channels = self.codec_config.latent_channels
        head = channels * (self.latent_head_size + self.latent_refiner_size + self.latent_head_codes)
        if max(head, self.codec_config.symbol_vocab_size * self.token_embedding_size) > MAX_PARAMETERS:
            raise ValueError(
                f"`latent_head_size` ({self.latent_head_size}), `latent_refiner_size` ({self.latent_refiner_size}), "
                f"`latent_head_codes` ({self.latent_head_codes}) or `token_embedding_size` ({self.token_embedding_size}) ask for more "
                f"than {MAX_PARAMETERS:.0e} parameters."
            )

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: in the sub-configurations, too, only what differs from the library's defaults."""
        fields = super().to_diff_dict()
        for name in self.sub_configs:
            own = getattr(self, name).to_diff_dict()
            fields[name] = {key: value for key, value in own.items() if key != "transformers_version"}
        return fields

    @classmethod
    def from_preset(cls, name: str, vocab_size: int | None = None, **overrides) -> "TokComConfig":
        """Build the configuration of a named preset.

        `vocab_size` is the *tokenizer's* length; the model's vocabulary is one larger (the mask token).
        `overrides` are dictionaries for `codec_config` and `transformer_config`, or top-level values.
        Raises `ValueError` for an unknown name or an unknown key.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known are {sorted(PRESETS)}.")
        fields = deepcopy(PRESETS[name])
        merge_overrides(fields, overrides)
        if vocab_size is not None:
            fields["codec_config"].update(_vocabulary(vocab_size))
        return cls(**fields)


def _check_known_keys(config_class: type[PreTrainedConfig], values: dict[str, Any], prefix: str) -> None:
    """Reject misspelt keys, which `PreTrainedConfig` would keep as attributes that nothing reads."""
    known = {k for c in config_class.__mro__ for k in getattr(c, "__annotations__", {})}
    for key in set(values) - known:
        if key not in config_class().to_dict() and not key.startswith("_"):
            raise ValueError(f"unknown configuration key '{prefix}{key}'; see {config_class.__name__}.")


def merge_overrides(fields: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Write `overrides`, top-level values or dictionaries for a sub-configuration, into the `fields` of a TokComConfig.

    Raises `ValueError` for an unknown top-level key; unknown keys of sub-configurations fail when the config is built.
    """
    _check_known_keys(TokComConfig, overrides, "")
    for key, value in overrides.items():
        fields[key] = {**fields.get(key, {}), **value} if isinstance(value, dict) else value


def _vocabulary(size: int) -> dict[str, int]:
    """A tokenizer of `size` tokens and the mask token, which also pads."""
    return {"vocab_size": size + 1, "mask_token_id": size, "pad_token_id": size}


def _pixels(
    hidden_size: int,
    layers: int,
    heads: int,
    patch_size: int,
    image_size: int,
    embedding: int,
    vocabulary: int = 151665,
    **codec,
) -> dict[str, Any]:
    """A pixel transformer (JiT, Li and He 2025) over the patches of a condition and of a target image."""
    patches = 2 * (image_size // patch_size) ** 2
    return {
        "codec_config": {
            **_vocabulary(vocabulary),
            **dict(model_type="tokcom_color_codec", patch_size=patch_size, image_size=image_size, **codec),
        },
        "transformer_config": {
            **dict(hidden_size=hidden_size, intermediate_size=hidden_size * 8 // 3),
            **dict(
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads, num_position_axes=2
            ),
            **dict(max_position_embeddings=patches, conditioning_size=hidden_size, block_size=None),
            **dict(self_conditioning=False),
        },
        **dict(prediction_type="tokens", token_embedding_size=embedding, token_shift=10.0, num_inference_steps=20),
        **dict(timestep_sampling="uniform"),
    }


PRESETS: dict[str, dict[str, Any]] = {
    # TokCom v5.2 as published: Qwen2-0.5B-shaped layers, latent = hidden state, bidirectional, CE objective.
    "v5.2": {
        "codec_config": {
            **_vocabulary(32016),
            **dict(chunk_size=4, layer_type="attention", variational=False, latent_channels=896, embedding_size=896),
            **dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
            **dict(num_key_value_heads=2, attention_bias=True, qk_norm=False, rope_theta=1e6, rms_norm_eps=1e-6),
            **dict(kl_weight=0.0, token_dropout=0.0, latent_dropout=0.0),
        },
        "transformer_config": {
            **dict(latent_channels=896, hidden_size=896, intermediate_size=4864, num_hidden_layers=24),
            **dict(num_attention_heads=14, num_key_value_heads=2, attention_bias=True, qk_norm=False, rope_theta=1e6),
            **dict(max_position_embeddings=256, conditioning_size=896, timestep_scale=1.0, adaln_gates=False),
            **dict(input_projection=False, self_conditioning=False, per_latent_timestep=False, block_size=None),
        },
        **dict(noise_std=0.05, timestep_sampling="uniform", timestep_loc=0.0, mse_weight=0.0, ce_weight=1.0),
        **dict(context_dropout=0.0, infill_rate=0.0, num_inference_steps=50),
    },
    "base": {
        "codec_config": {
            **_vocabulary(8192),
            **dict(chunk_size=4, latent_channels=128, embedding_size=256, hidden_size=512, intermediate_size=1536),
            **dict(num_hidden_layers=3, encoder_type="token"),
        },
        "transformer_config": {
            **dict(latent_channels=128, hidden_size=640, intermediate_size=1728, num_hidden_layers=13),
            **dict(num_attention_heads=10, num_key_value_heads=10, max_position_embeddings=256),
            **dict(conditioning_size=256, block_size=1, num_context_layers=10, head_attention=False),
            **dict(self_conditioning=False),
        },
        **dict(prediction_type="tokens", token_stagger=1.0, token_shift=10.0, noise_draws=4),
        **dict(
            token_embedding_size=320, timestep_sampling="uniform", num_inference_steps=4, sampling_temperature=0.85
        ),
    },
    "tiny": {
        "codec_config": {
            **_vocabulary(4096),
            **dict(chunk_size=4, latent_channels=64, embedding_size=128, hidden_size=256, intermediate_size=768),
            **dict(num_hidden_layers=2, encoder_type="token"),
        },
        "transformer_config": {
            **dict(latent_channels=64, hidden_size=256, intermediate_size=704, num_hidden_layers=8),
            **dict(num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128),
            **dict(conditioning_size=128, block_size=1, num_context_layers=6, head_attention=False),
            **dict(self_conditioning=False),
        },
        **dict(prediction_type="tokens", token_stagger=1.0, token_shift=10.0, noise_draws=4),
        **dict(timestep_sampling="uniform", num_inference_steps=4, sampling_temperature=0.85),
    },
    # bits that spell whole tokens, one after the other within a patch, win in docs/pixels.md; the published shapes are kept
    "pixel-tiny": {
        **_pixels(256, 6, 4, 4, 32, 64, vocabulary=4096, digits="bits", symbols="tokens"),
        **dict(token_stagger=1.0, num_inference_steps=16),
    },
    "pixel-b4": _pixels(768, 12, 12, 4, 64, 16),
    "pixel-b16": _pixels(768, 12, 12, 16, 256, 2),
    "pixel-b32": _pixels(768, 12, 12, 32, 256, 1),
    "pixel-l16": _pixels(1024, 24, 16, 16, 256, 2),
    "pixel-l32": _pixels(1024, 24, 16, 32, 256, 1),
    "pixel-h16": _pixels(1280, 32, 16, 16, 256, 2),
    "pixel-h32": _pixels(1280, 32, 16, 32, 256, 1),
    "debug": {
        "codec_config": {
            **_vocabulary(512),
            **dict(chunk_size=4, latent_channels=16, embedding_size=48, hidden_size=64, intermediate_size=128),
            **dict(num_hidden_layers=1),
        },
        "transformer_config": {
            **dict(latent_channels=16, hidden_size=64, intermediate_size=128, num_hidden_layers=2),
            **dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64),
            **dict(conditioning_size=32, block_size=4),
        },
    },
}

__all__ = [
    "TokComConfig",
    "TokComChunkCodecConfig",
    "TokComColorCodecConfig",
    "TokComTransformerConfig",
    "merge_overrides",
    "CODEC_CONFIGS",
    "STAGES",
    "PRESETS",
]
