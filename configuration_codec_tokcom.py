"""Configurations of the codecs: token chunks, pixels, images as ordered tokens, clips and sounds as patches, and several at once.

Notable choices: every codec says what it codes (`modality`) and how its latents relate to it through the same few properties
(`chunk_size`, `length_multiple`, `has_symbols`, `group_size`); all checks live in `validate_architecture`.

Shape legend: B batch, T tokens, K tokens per chunk, N = T/K latents, C latent channels, D width, V vocabulary.
"""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

MAX_PARAMETERS = 10**12
MAX_LAYERS = 1024


def check_positive(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"`{name}` ({getattr(config, name)}) must be at least 1.")


def check_known_keys(
    config_class: type[PreTrainedConfig], values: dict[str, Any], prefix: str
) -> None:
    """Reject misspelt keys, which `PreTrainedConfig` would keep as attributes that nothing reads."""
    known = {k for c in config_class.__mro__ for k in getattr(c, "__annotations__", {})}
    for key in set(values) - known:
        if key not in config_class().to_dict() and not key.startswith("_"):
            raise ValueError(
                f"unknown configuration key '{prefix}{key}'; see {config_class.__name__}."
            )


def check_size(config: PreTrainedConfig, parameters: int) -> None:
    """Refuse what no machine can hold, before anything is allocated."""
    layers = max(
        getattr(config, f"num_{name}_layers", 0)
        for name in ("hidden", "expert", "styled", "decoder")
    )
    if layers > MAX_LAYERS or parameters > MAX_PARAMETERS:
        raise ValueError(
            f"{type(config).__name__} asks for about {parameters:.1e} parameters in {layers} layers; at most "
            f"{MAX_PARAMETERS:.0e} in {MAX_LAYERS} are built. Check its sizes, or whom the file comes from."
        )


def check_heads(config: PreTrainedConfig) -> None:
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


def check_quantizer(config: PreTrainedConfig) -> None:
    if config.quantizer not in ("none", "vq", "fsq"):
        raise ValueError(f"`quantizer` ({config.quantizer!r}) must be 'none', 'vq' or 'fsq'.")
    if config.quantizer == "vq" and (config.num_codes < 2 or config.num_quantizers < 1):
        raise ValueError(
            f"`num_codes` ({config.num_codes}) must be at least 2 and `num_quantizers` ({config.num_quantizers}) at least 1."
        )
    if config.quantizer == "fsq" and len(config.fsq_levels or ()) != config.latent_channels:
        raise ValueError(
            f"`fsq_levels` ({config.fsq_levels}) must give the levels of every one of the {config.latent_channels} "
            "`latent_channels`."
        )
    if config.quantizer == "fsq" and math.prod(config.fsq_levels) >= 2**63:
        raise ValueError(
            f"`fsq_levels` ({config.fsq_levels}) have {math.prod(config.fsq_levels):.1e} codes, more than 64 bits; lower the "
            "levels or `latent_channels`."
        )


class TokComCodecConfig(PreTrainedConfig):
    """What all codecs say of themselves; the defaults are those of codecs without tokens."""

    base_config_key = "codec_config"
    modality = "text"  # what is coded: "text", "image", "video", "audio" or "several"

    @property
    def has_tokens(self) -> bool:
        """Whether its latents stand for token ids."""
        return self.modality == "text"

    @property
    def kind(self) -> str:
        """The modality as a user sees it: a clip of one frame is an image."""
        return self.modality

    @property
    def text_vocab_size(self) -> int:
        """Ids of the texts that it codes, the mask token included; 0 if it codes none."""
        return self.vocab_size if self.has_tokens else 0

    @property
    def num_position_axes(self) -> int:
        """A, numbers that say where a latent stands."""
        return 1

    @property
    def has_symbols(self) -> bool:
        """Whether a latent is the concatenation of its symbols' latents, so that `prediction_type="tokens"` can be used."""
        return False

    @property
    def chunk_size(self) -> int:
        """K, tokens per latent."""
        return 1

    @property
    def length_multiple(self) -> int:
        """Tokens of which a text must hold a multiple."""
        return 1

    @property
    def latents_multiple(self) -> int:
        """The same in latents."""
        return self.length_multiple // self.chunk_size

    @property
    def num_symbols(self) -> int:
        """What a latent gives probabilities to."""
        return 1

    @property
    def symbol_vocab_size(self) -> int:
        return 0

    @property
    def impossible_symbol(self) -> int | None:
        """The id that is never predicted, if there is one: that of the pad token."""
        return None

    @property
    def group_size(self) -> int:
        """Latents that are known or unknown, and generated, together: those of one moment of a clip."""
        return 1


@strict
class TokComChunkCodecConfig(TokComCodecConfig):
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
        encoder_type (`str`): `"chunk"`, a network over the K tokens, or `"token"`, C / K channels per token, which makes
            the mean latent of token probabilities exact (`prediction_type="tokens"`).
        quantizer (`str`): `"none"`, `"vq"` or `"fsq"`: latents take one of finitely many values, so that a text is stored as
            codes. Then there is no posterior noise and no KL.
        num_codes (`int`), num_quantizers (`int`): for `"vq"`: codes of a codebook, and codebooks, each of which quantises what
            the ones before it left over.
        fsq_levels (`list[int]`): for `"fsq"`: levels of every latent channel.
    """

    model_type = "tokcom_chunk_codec"

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
    quantizer: str = "none"
    num_codes: int = 1024
    num_quantizers: int = 1
    fsq_levels: list[int] | None = None
    initializer_range: float = 0.02

    @property
    def bits_per_token(self) -> float | None:
        """Bits that store one token as codes; None without a quantiser."""
        if self.quantizer == "none":
            return None
        sizes = (
            self.fsq_levels if self.quantizer == "fsq" else [self.num_codes] * self.num_quantizers
        )
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
    def impossible_symbol(self) -> int | None:
        return self.pad_token_id if self.pad_token_id == self.mask_token_id else None

    @property
    def symbol_vocab_size(self) -> int:
        return self.vocab_size

    def validate_architecture(self):
        sizes = (
            "vocab_size",
            "chunk_size",
            "latent_channels",
            "embedding_size",
            "hidden_size",
            "intermediate_size",
        )
        check_positive(
            self, *sizes, "num_hidden_layers", "num_attention_heads", "num_key_value_heads"
        )
        if self.layer_type not in ("mlp", "attention"):
            raise ValueError(f"`layer_type` ({self.layer_type!r}) must be 'mlp' or 'attention'.")
        if self.encoder_type not in ("chunk", "token"):
            raise ValueError(f"`encoder_type` ({self.encoder_type!r}) must be 'chunk' or 'token'.")
        if self.encoder_type == "token" and (
            self.latent_channels % self.chunk_size or not self.variational
        ):
            raise ValueError(
                f"`encoder_type='token'` needs `variational=True` and `latent_channels` ({self.latent_channels}) to be a "
                f"multiple of `chunk_size` ({self.chunk_size})."
            )
        check_quantizer(self)
        if self.quantizer != "none" and self.encoder_type != "chunk":
            raise ValueError(
                f"`quantizer` ({self.quantizer!r}) needs `encoder_type='chunk'`, not {self.encoder_type!r}."
            )
        if self.layer_type == "attention":
            check_heads(self)
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
                raise ValueError(
                    f"`{name}` ({getattr(self, name)}) must be in [0, vocab_size={self.vocab_size})."
                )
        layer = self.hidden_size * (
            4 * self.hidden_size * (self.layer_type == "attention") + 3 * self.intermediate_size
        )
        chunk = self.chunk_size * self.embedding_size
        parameters = self.vocab_size * self.embedding_size + 2 * self.num_hidden_layers * layer
        parameters += self.hidden_size * (2 * chunk + 3 * self.latent_channels)
        if self.quantizer == "vq":
            parameters += 2 * self.num_quantizers * self.num_codes * self.latent_channels
        check_size(self, parameters)


@strict
class TokComColorCodecConfig(TokComCodecConfig):
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
        position_axes (`int`): 2, the row and column of a patch in the image, or 1, its number in reading order, which a model with
            context layers needs: they are told what stands before a patch.
    """

    model_type = "tokcom_color_codec"

    vocab_size: int = 4097
    mask_token_id: int = 4096
    pad_token_id: int = 4096
    digits: str = "color"
    symbols: str = "digits"
    patch_size: int = 4
    layout: str = "contiguous"
    image_size: int = 64
    standardize: bool = True
    position_axes: int = 2

    @property
    def num_position_axes(self) -> int:
        return self.position_axes

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
    def impossible_symbol(self) -> int | None:
        last = self.vocab_size - 1
        return last if self.symbols == "tokens" and self.mask_token_id == last else None

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
        check_positive(self, "vocab_size", "patch_size", "image_size")
        if self.digits not in ("color", "bits"):
            raise ValueError(f"`digits` ({self.digits!r}) must be 'color' or 'bits'.")
        if self.symbols not in ("digits", "tokens"):
            raise ValueError(f"`symbols` ({self.symbols!r}) must be 'digits' or 'tokens'.")
        if self.layout not in ("contiguous", "raster"):
            raise ValueError(f"`layout` ({self.layout!r}) must be 'contiguous' or 'raster'.")
        if self.position_axes not in (1, 2):
            raise ValueError(
                f"`position_axes` ({self.position_axes}) must be 2, row and column, or 1, reading order."
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"`image_size` ({self.image_size}) must be a multiple of `patch_size` ({self.patch_size})."
            )
        if self.digits == "color" and self.vocab_size > 256**3:
            raise ValueError(
                f"`vocab_size` ({self.vocab_size}) is more than the {256**3} colors; use digits='bits'."
            )


@strict
class TokComStyleCodecConfig(TokComCodecConfig):
    r"""Configuration of the codec `image <-> ordered tokens` (Styled_vae_vq).

    Args:
        image_size (`int`), patch_size (`int`): pixels of a side, and of a patch's side; there are three colors.
        num_tokens (`int`): N, latents of an image, from coarse to fine; two for every styled layer.
        latent_channels (`int`): C, channels of a token.
        hidden_size, intermediate_size, num_attention_heads, num_hidden_layers (`int`): of the encoder's plain layers.
        num_expert_layers, expert_intermediate_size (`int`): last layers of the encoder, in which every token has a
            feed-forward network of its own, and the width of those.
        decoder_hidden_size, decoder_intermediate_size, decoder_num_attention_heads (`int`): of the decoder.
        num_decoder_layers (`int`): plain layers after them.
        bottleneck (`str`): `"gaussian"`, a posterior; `"sphere"`, tokens of one length, with noise in training;
            `"cosine"`, mean-centred weights of a soft codebook.
        num_codes (`int`): size of a codebook of all tokens that k-means has made after training; 0 is none.
    """

    model_type = "tokcom_style_codec"
    modality = "image"

    image_size: int = 64
    patch_size: int = 8
    num_tokens: int = 36
    latent_channels: int = 16
    hidden_size: int = 192
    intermediate_size: int = 768
    num_attention_heads: int = 4
    num_hidden_layers: int = 4
    num_expert_layers: int = 2
    expert_intermediate_size: int = 384
    decoder_hidden_size: int = 192
    decoder_intermediate_size: int = 384
    decoder_num_attention_heads: int = 4
    num_decoder_layers: int = 2
    rms_norm_eps: float = 1e-6
    bottleneck: str = "gaussian"
    num_codes: int = 0
    initializer_range: float = 0.02

    @property
    def num_styled_layers(self) -> int:
        """Decoder layers that two tokens each style and join."""
        return self.num_tokens // 2

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def validate_architecture(self):
        sizes = ("image_size", "patch_size", "num_tokens", "latent_channels", "hidden_size")
        check_positive(
            self, *sizes, "intermediate_size", "num_attention_heads", "expert_intermediate_size"
        )
        check_positive(
            self, "decoder_hidden_size", "decoder_intermediate_size", "decoder_num_attention_heads"
        )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"`image_size` ({self.image_size}) must be a multiple of `patch_size` ({self.patch_size})."
            )
        if self.num_tokens % 2:
            raise ValueError(
                f"`num_tokens` ({self.num_tokens}) must be even: every styled layer takes two tokens."
            )
        for width, heads in (
            ("hidden_size", "num_attention_heads"),
            ("decoder_hidden_size", "decoder_num_attention_heads"),
        ):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"`{width}` ({getattr(self, width)}) must be a multiple of `{heads}` ({getattr(self, heads)})."
                )
        if min(self.num_hidden_layers, self.num_expert_layers, self.num_decoder_layers) < 0:
            raise ValueError(
                "`num_hidden_layers`, `num_expert_layers` and `num_decoder_layers` must not be negative."
            )
        if self.bottleneck not in ("gaussian", "sphere", "cosine"):
            raise ValueError(
                f"`bottleneck` ({self.bottleneck!r}) must be 'gaussian', 'sphere' or 'cosine'."
            )
        if self.num_codes < 0 or self.num_codes == 1:
            raise ValueError(f"`num_codes` ({self.num_codes}) must be 0 or at least 2.")
        width = self.hidden_size
        experts = self.num_tokens * self.expert_intermediate_size + self.intermediate_size
        parameters = self.num_hidden_layers * width * (4 * width + 2 * self.intermediate_size)
        parameters += self.num_expert_layers * width * (4 * width + 2 * experts)
        width = self.decoder_hidden_size
        layer = width * (4 * width + 2 * self.decoder_intermediate_size)
        parameters += (self.num_styled_layers + self.num_decoder_layers) * layer
        parameters += self.num_styled_layers * 6 * width * self.latent_channels
        patch = 3 * self.patch_size**2
        parameters += (self.hidden_size + width) * (patch + self.num_patches + self.num_tokens)
        parameters += self.latent_channels * (2 * self.hidden_size + 2 * self.num_codes)
        check_size(self, parameters)


@strict
class TokComVideoCodecConfig(TokComCodecConfig):
    r"""Configuration of the codec `clip <-> one latent per patch of space and time`.

    Args:
        num_frames, height, width (`int`): F, H and W of the clips that training sees; other sizes that patches divide fit, too.
        num_channels (`int`): 3 for pixels, or the channels of an external autoencoder whose latents the clips are.
        spatial_compression, temporal_compression (`int`): pixels of a side, and frames, that one value of those latents stands
            for; 1 for pixels.
        frames_per_patch, patch_size (`int`): frames, and pixels of a side, of a patch.
        hidden_size, intermediate_size, num_hidden_layers (`int`): residual MLP between a patch and its latent, on either side;
            `hidden_size` 0 is none: the values of a patch are its latent, and nothing is lost.
        latent_channels (`int`): C; 0, the only choice without a network, is the number of values in a patch.
        quantizer, num_codes, num_quantizers, fsq_levels: as in `TokComChunkCodecConfig`.
    """

    model_type = "tokcom_video_codec"
    modality = "video"

    num_frames: int = 8
    height: int = 32
    width: int = 32
    num_channels: int = 3
    spatial_compression: int = 1
    temporal_compression: int = 1
    frames_per_patch: int = 1
    patch_size: int = 8
    hidden_size: int = 0
    intermediate_size: int = 512
    num_hidden_layers: int = 1
    latent_channels: int = 0
    quantizer: str = "none"
    num_codes: int = 1024
    num_quantizers: int = 1
    fsq_levels: list[int] | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.latent_channels = self.latent_channels or self.patch_values
        super().__post_init__(**kwargs)

    @property
    def kind(self) -> str:
        return "image" if self.num_frames == 1 else "video"

    @property
    def num_position_axes(self) -> int:
        return 3

    @property
    def patch_values(self) -> int:
        return self.num_channels * self.frames_per_patch * self.patch_size**2

    @property
    def group_size(self) -> int:
        return (self.height // self.patch_size) * (self.width // self.patch_size)

    @property
    def num_tokens(self) -> int:
        """N, latents of a clip."""
        return self.num_frames // self.frames_per_patch * self.group_size

    @property
    def image_size(self) -> list[int]:
        """Height and width in pixels."""
        return [self.height * self.spatial_compression, self.width * self.spatial_compression]

    @property
    def clip_length(self) -> int:
        """Frames of a clip of pixels; an autoencoder that compresses time codes the first frame on its own."""
        return (self.num_frames - 1) * self.temporal_compression + 1

    def validate_architecture(self):
        check_positive(
            self, "num_frames", "height", "width", "num_channels", "frames_per_patch", "patch_size"
        )
        check_positive(
            self,
            "spatial_compression",
            "temporal_compression",
            "intermediate_size",
            "latent_channels",
        )
        self.check_shape(self.num_frames, self.height, self.width)
        if min(self.hidden_size, self.num_hidden_layers) < 0:
            raise ValueError("`hidden_size` and `num_hidden_layers` must not be negative.")
        check_quantizer(self)
        if not self.hidden_size and (
            self.latent_channels != self.patch_values or self.quantizer != "none"
        ):
            raise ValueError(
                f"without a network (`hidden_size` 0) `latent_channels` ({self.latent_channels}) must be the "
                f"{self.patch_values} values of a patch, and `quantizer` ({self.quantizer!r}) 'none'; set `hidden_size`."
            )
        layer = 3 * self.hidden_size * self.intermediate_size
        parameters = (
            2 * self.hidden_size * (self.patch_values + self.latent_channels)
            + 2 * self.num_hidden_layers * layer
        )
        if self.quantizer == "vq":
            parameters += 2 * self.num_quantizers * self.num_codes * self.latent_channels
        check_size(self, parameters)

    def check_shape(self, frames: int, height: int, width: int) -> None:
        """Raise `ValueError` unless patches divide a clip of this size."""
        if (
            frames % self.frames_per_patch
            or height % self.patch_size
            or width % self.patch_size
            or not frames
        ):
            raise ValueError(
                f"a clip of {frames} frames of {height} x {width} does not divide into patches of "
                f"`frames_per_patch` ({self.frames_per_patch}) frames and `patch_size` ({self.patch_size}) squared; cut it to "
                "a multiple of these."
            )


@strict
class TokComAudioCodecConfig(TokComVideoCodecConfig):
    r"""Configuration of the codec `sound <-> one latent per patch of log-mel frames`: a clip whose channels are the bands.

    Args:
        sampling_rate (`int`): samples a second; training resamples other sounds.
        fft_length, hop_length (`int`): samples of a frame's window, and from frame to frame.
        num_channels (`int`): mel bands.
        num_frames (`int`): frames of a sound; shorter ones end in silence, longer ones are cut.
        frames_per_patch (`int`): frames of a latent.
        hidden_size, intermediate_size, num_hidden_layers, latent_channels, quantizer ...: as in `TokComVideoCodecConfig`.
    """

    model_type = "tokcom_audio_codec"
    modality = "audio"

    sampling_rate: int = 8000
    fft_length: int = 512
    hop_length: int = 128
    num_frames: int = 64
    height: int = 1
    width: int = 1
    num_channels: int = 40
    frames_per_patch: int = 4
    patch_size: int = 1

    @property
    def kind(self) -> str:
        return "audio"

    @property
    def num_samples(self) -> int:
        """Samples of a sound of `num_frames`."""
        return (self.num_frames - 1) * self.hop_length

    def validate_architecture(self):
        super().validate_architecture()
        check_positive(self, "sampling_rate", "fft_length", "hop_length")
        if (self.height, self.width, self.patch_size) != (1, 1, 1) or self.num_frames < 2:
            raise ValueError(
                f"`height` ({self.height}), `width` ({self.width}) and `patch_size` ({self.patch_size}) of a sound must be 1, and "
                f"`num_frames` ({self.num_frames}) at least 2."
            )
        if self.hop_length > self.fft_length or 2 * self.num_channels > self.fft_length:
            raise ValueError(
                f"`fft_length` ({self.fft_length}) must be at least `hop_length` ({self.hop_length}) and twice `num_channels` "
                f"({self.num_channels}), or some bands hold nothing."
            )


STREAM_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    config.model_type: config
    for config in (
        *(TokComChunkCodecConfig, TokComColorCodecConfig, TokComStyleCodecConfig),
        *(TokComVideoCodecConfig, TokComAudioCodecConfig),
    )
}


def vocabulary_fields(size: int) -> dict[str, Any]:
    """A tokenizer of `size` tokens and the mask token, which also pads."""
    return {"vocab_size": size + 1, "mask_token_id": size, "pad_token_id": size}


__all__ = [
    "TokComCodecConfig",
    "TokComChunkCodecConfig",
    "TokComColorCodecConfig",
    "TokComStyleCodecConfig",
    "TokComVideoCodecConfig",
    "TokComAudioCodecConfig",
    "STREAM_CONFIGS",
]
