"""Configurations of codecs: what all of them share, and those of texts (token chunks and pixels).

`configuration_media_tokcom.py` has those of pictures, clips, sounds and several streams.

Notable choices:
- Every codec says what it codes (`modality`) and how its latents relate to it through the same few
  properties (`chunk_size`, `length_multiple`, `has_symbols`, `group_size`).
- A codec checks its own fields in `validate_architecture`, and the model around it in
  `check_model`, so that no other configuration asks which codec it holds.

Shape legend: B batch, T tokens, K tokens per chunk, N = T/K latents, C latent channels, D width,
V vocabulary.
"""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

MAX_PARAMETERS = 10**12  # what a downloaded config.json may ask for at most
MAX_LAYERS = 1024
MAX_SIZE = 2**31 - 1  # of anything that is counted
# Least and greatest value of numbers that are no sizes. Beyond them a model is not merely unusual:
# it divides by 0, or all that it reads looks the same.
RANGES = {
    "rms_norm_eps": (1e-12, 0.1),
    "rope_theta": (1.0, 1e10),
    "timestep_scale": (1e-3, 1e6),
    "initializer_range": (0.0, 10.0),
    "noise_std": (1e-12, 1e3),
    "token_stagger": (0.0, 1.0),
    "token_shift": (1e-3, 1e3),
    "timestep_loc": (-20.0, 20.0),
    "sampling_temperature": (1e-3, 1e3),
    "sampling_top_p": (1e-6, 1.0),
    "sampling_guidance_scale": (0.0, 1e3),
    "num_inference_steps": (1, 10_000),
    "num_codes": (0, MAX_SIZE),
    "num_quantizers": (1, MAX_SIZE),
    "max_position_embeddings": (1, 2**24),
}


def check_numbers(config: PreTrainedConfig) -> None:
    """Refuse numbers that are not finite or beyond what they can mean; NaN passes every comparison
    but these."""
    for name, value in vars(config).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):  # True is an int, too
            continue
        low, high = RANGES.get(name, (-MAX_SIZE, MAX_SIZE))  # other numbers are counts
        if not low <= value <= high:
            # whole numbers as they are, not as 2.14748e+09
            least, most = (str(end) if isinstance(end, int) else f"{end:g}" for end in (low, high))
            bounds = f"between {least} and {most}"
            if name not in RANGES and value > high:
                bounds = f"at most {MAX_SIZE}"
            raise ValueError(f"`{name}` ({value}) must be {bounds}.")


def check_positive(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"`{name}` ({getattr(config, name)}) must be at least 1.")


def check_choice(config: PreTrainedConfig, **fields: tuple[str, ...]) -> None:
    """Raise `ValueError` for a field that has none of its choices."""
    for name, allowed in fields.items():
        if getattr(config, name) not in allowed:
            *others, last = map(repr, allowed)
            choices = f"{', '.join(others)} or {last}"
            raise ValueError(f"`{name}` ({getattr(config, name)!r}) must be {choices}.")


def check_multiple(config: PreTrainedConfig, name: str, unit: str) -> None:
    """Raise `ValueError` unless the field `name` is a multiple of the field `unit`."""
    value = getattr(config, name)
    size = getattr(config, unit)
    if value % size:
        raise ValueError(f"`{name}` ({value}) must be a multiple of `{unit}` ({size}).")


class UnknownKeyError(ValueError):
    """A key that the configuration `owner` does not have; `known` are those that it has."""

    def __init__(self, prefix: str, key: str, known: list[str], owner: str):
        super().__init__(f"unknown configuration key '{prefix}{key}'; see {owner}.")
        self.prefix = prefix
        self.key = key
        self.known = known


def check_known_keys(
    config_class: type[PreTrainedConfig], values: dict[str, Any], prefix: str
) -> None:
    """Reject misspelt keys, which `PreTrainedConfig` would keep as attributes that nothing
    reads."""
    known: set[str] = set()
    for base in config_class.__mro__:  # fields are inherited, annotations are not
        known |= set(getattr(base, "__annotations__", {}))
    for key in set(values) - known:
        # the library has fields of its own, which are in `to_dict`
        if key not in config_class().to_dict() and not key.startswith("_"):
            raise UnknownKeyError(prefix, key, sorted(known), config_class.__name__)


def check_size(config: PreTrainedConfig, parameters: int) -> None:
    """Refuse what no machine can hold, before anything is allocated."""
    # whatever a configuration calls its layers
    layers = max(
        getattr(config, f"num_{name}_layers", 0)
        for name in ("hidden", "expert", "styled", "decoder")
    )
    if layers > MAX_LAYERS or parameters > MAX_PARAMETERS:
        raise ValueError(
            f"{type(config).__name__} asks for about {parameters:.1e} parameters in {layers} "
            f"layers; at most {MAX_PARAMETERS:.0e} in {MAX_LAYERS} are built. Check its sizes, or "
            "whom the file comes from."
        )


def check_heads(config: PreTrainedConfig) -> None:
    if config.hidden_size % (2 * config.num_attention_heads):  # 2 channels a pair
        raise ValueError(
            f"`hidden_size` ({config.hidden_size}) must be an even multiple of "
            f"`num_attention_heads` ({config.num_attention_heads}); rotary embedding pairs the "
            "channels of a head."
        )
    check_multiple(config, "num_attention_heads", "num_key_value_heads")


def check_quantizer(config: PreTrainedConfig) -> int:
    """Check the fields of a quantiser; returns how many parameters its codebooks have."""
    check_choice(config, quantizer=("none", "vq", "fsq"))
    if config.quantizer == "vq" and (config.num_codes < 2 or config.num_quantizers < 1):
        raise ValueError(
            f"`num_codes` ({config.num_codes}) must be at least 2 and `num_quantizers` "
            f"({config.num_quantizers}) at least 1."
        )
    if config.quantizer == "fsq" and len(config.fsq_levels or ()) != config.latent_channels:
        raise ValueError(
            f"`fsq_levels` ({config.fsq_levels}) must give the levels of every one of the "
            f"{config.latent_channels} `latent_channels`."
        )
    if config.quantizer == "fsq" and math.prod(config.fsq_levels) >= 2**63:  # codes are int64
        raise ValueError(
            f"`fsq_levels` ({config.fsq_levels}) have {math.prod(config.fsq_levels):.1e} codes, "
            "more than 64 bits; lower the levels or `latent_channels`."
        )
    if config.quantizer != "vq":
        return 0
    # a codebook, and the moving average of the same size that updates it
    return 2 * config.num_quantizers * config.num_codes * config.latent_channels


class TokComCodecConfig(PreTrainedConfig):
    """What all codecs say of themselves; the defaults are those of codecs of texts."""

    base_config_key = "codec_config"
    modality = "text"  # what is coded: "text", "image", "video", "audio" or "several"
    input_name = "input_ids"  # what a model encodes
    has_tokens = True  # whether the latents stand for token ids
    reads_captions = False  # whether a model may generate its data for captions
    has_moments = False  # whether the latents stand at moments and places

    @classmethod
    def set_vocabulary(cls, fields: dict[str, Any], size: int, overwrite: bool) -> bool:
        """Give a codec's `fields` a tokenizer of `size` tokens and the mask token, which also pads.

        Without `overwrite` what they say stays. Returns whether such a codec holds texts.
        """
        if overwrite:
            # the tokenizer's ids are 0..size - 1, and the mask token comes behind them
            fields |= {"vocab_size": size + 1, "mask_token_id": size, "pad_token_id": size}
        last = fields.setdefault("vocab_size", size + 1) - 1  # the mask token
        # by default both are the last id of the vocabulary that is given
        fields.setdefault("mask_token_id", last)
        fields.setdefault("pad_token_id", last)
        return True

    def validate_all_numbers(self):  # validators run in the order of their names
        check_numbers(self)

    @property
    def kind(self) -> str:
        """The modality as a user sees it: a clip of one frame is an image."""
        return self.modality

    @property
    def text_vocab_size(self) -> int:
        """Ids of the texts that it codes, the mask token included; 0 if it codes none."""
        return self.vocab_size

    @property
    def num_position_axes(self) -> int:
        """A, numbers that say where a latent stands."""
        return 1

    @property
    def has_symbols(self) -> bool:
        """Whether a latent is the concatenation of its symbols' latents.

        Only then can a model have `prediction_type="tokens"`.
        """
        return False

    @property
    def chunk_size(self) -> int:
        """K, tokens per latent."""
        return 1

    @property
    def length_multiple(self) -> int:
        """Tokens of which a text must hold a multiple."""
        return self.chunk_size

    @property
    def latents_multiple(self) -> int:
        """The same in latents."""
        return self.length_multiple // self.chunk_size

    @property
    def num_symbols(self) -> int:
        """How many symbols one latent gives probabilities for."""
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
        """Latents that are generated together: those of one moment of a clip."""
        return 1

    @property
    def stream_channels(self) -> list[int] | None:
        """Channels of every stream, of a codec of several."""
        return None

    @property
    def quantizes_estimates(self) -> bool:
        """Whether estimates of latents can be replaced by their nearest codes."""
        return False

    def stream_length(self, text_latents: int) -> int:
        """How many latents a stream of this codec has in a model whose texts have
        `text_latents`."""
        return text_latents

    def fit_transformer(self, transformer: PreTrainedConfig) -> None:
        """Set the fields of a transformer's configuration that the codec decides; here none."""

    def check_model(self, model: PreTrainedConfig) -> None:
        """Raise `ValueError` where the model's configuration does not fit this codec."""
        transformer = model.transformer_config
        condition = model.condition_vocab_size
        block_size = transformer.block_size
        if condition < 0 or (condition and (not self.reads_captions or block_size is not None)):
            raise ValueError(
                f"`condition_vocab_size` ({condition}) must not be negative, and needs a codec of "
                "images or clips and `transformer_config.block_size=None`; a text continues its "
                "prompt."
            )
        # a composite codec sets it in `fit_transformer`, so it only differs if written by hand
        if transformer.stream_channels != self.stream_channels:
            raise ValueError(
                f"`transformer_config.stream_channels` ({transformer.stream_channels}) is set by a "
                f"composite codec, not by {self.model_type!r}; leave it out."
            )
        if transformer.attention_type == "factorized" and (not self.has_moments or condition):
            raise ValueError(
                "`attention_type='factorized'` is for clips without captions, not for "
                f"{self.modality!r} with `condition_vocab_size` {condition}; use 'full'."
            )
        # blocks are whole moments, or a frame would be generated in two steps
        if block_size is not None and block_size % self.group_size:
            raise ValueError(
                f"`transformer_config.block_size` ({block_size}) must be a multiple of the "
                f"{self.group_size} latents of one moment of a clip, which are generated together."
            )
        # a prompt ends with a whole row of patches, so blocks must, too
        if block_size is not None and block_size % self.latents_multiple:
            raise ValueError(
                f"`block_size` ({block_size}) must be a multiple of the {self.latents_multiple} "
                "patches of a raster's row."
            )
        if model.quantize_prediction and not self.quantizes_estimates:
            raise ValueError("`quantize_prediction` needs a video codec with a `quantizer`.")


@strict
class TokComChunkCodecConfig(TokComCodecConfig):
    r"""Configuration of the codec `tokens <-> one latent per chunk`.

    Args:
        vocab_size (`int`): V, the tokenizer's length plus one: the last row is the learned mask
            token.
        mask_token_id (`int`): id of that extra token. It replaces dropped and padded tokens at the
            encoder and is the decoder's query in the attention form (the published "omni" token).
        pad_token_id (`int`): id written into padded places before encoding; `mask_token_id` except
            in converted v5.2.
        chunk_size (`int`): K, tokens per latent.
        latent_channels (`int`): C.
        layer_type (`str`): `"mlp"`, residual SwiGLU layers on the concatenated embeddings of a
            chunk, or `"attention"`, the published transformer inside each chunk.
        embedding_size (`int`): width of the tied token embedding; equals `hidden_size` in the
            attention form.
        variational (`bool`): a Gaussian posterior head and linear maps to and from C channels.
            `False` is the published autoencoder, whose latent is the last hidden state, so
            `latent_channels == hidden_size`.
        encoder_type (`str`): `"chunk"`, a network over the K tokens, or `"token"`, C / K channels
            per token, which makes the mean latent of token probabilities exact
            (`prediction_type="tokens"`).
        quantizer (`str`): `"none"`, `"vq"` or `"fsq"`: latents take one of finitely many values, so
            that a text is stored as codes. Then there is no posterior noise and no KL.
        num_codes (`int`), num_quantizers (`int`): for `"vq"`: codes of a codebook, and codebooks,
            each of which quantises what the ones before it left over.
        fsq_levels (`list[int]`): for `"fsq"`: levels of every latent channel.
    """

    model_type = "tokcom_chunk_codec"

    vocab_size: int = 4097
    mask_token_id: int = 4096
    pad_token_id: int = 4096
    chunk_size: int = 4  # K
    latent_channels: int = 64  # C, of a whole chunk
    layer_type: str = "mlp"
    encoder_type: str = "chunk"
    embedding_size: int = 128  # E
    hidden_size: int = 256  # D
    intermediate_size: int = 768
    num_hidden_layers: int = 2
    num_attention_heads: int = 4  # of the attention form, as are the next four
    num_key_value_heads: int = 4
    attention_bias: bool = False
    qk_norm: bool = True
    rope_theta: float | int = 10000.0
    rms_norm_eps: float = 1e-6
    variational: bool = True
    quantizer: str = "none"
    num_codes: int = 1024  # of each codebook
    num_quantizers: int = 1
    fsq_levels: list[int] | None = None
    initializer_range: float = 0.02

    @property
    def bits_per_token(self) -> float | None:
        """Bits that store one token as codes; None without a quantiser."""
        if self.quantizer == "none":
            return None
        sizes = [self.num_codes] * self.num_quantizers
        if self.quantizer == "fsq":
            sizes = self.fsq_levels
        # a code is one number for each codebook or channel, each of log2(size) bits
        return sum(math.log2(size) for size in sizes) / self.chunk_size

    @property
    def has_symbols(self) -> bool:
        return self.encoder_type == "token"

    @property
    def num_symbols(self) -> int:
        """Symbols of a chunk, each of which has channels of its own; here the tokens."""
        return self.chunk_size

    @property
    def impossible_symbol(self) -> int | None:
        # converted v5.2 pads with EOS, which its texts do contain
        return self.pad_token_id if self.pad_token_id == self.mask_token_id else None

    @property
    def symbol_vocab_size(self) -> int:
        return self.vocab_size

    def validate_architecture(self):
        check_positive(self, "vocab_size", "chunk_size", "latent_channels", "embedding_size")
        check_positive(self, "hidden_size", "intermediate_size", "num_hidden_layers")
        check_positive(self, "num_attention_heads", "num_key_value_heads")
        check_choice(self, layer_type=("mlp", "attention"), encoder_type=("chunk", "token"))
        # every token has an equal share of the channels, with statistics of its own
        if self.encoder_type == "token" and (
            self.latent_channels % self.chunk_size or not self.variational
        ):
            raise ValueError(
                "`encoder_type='token'` needs `variational=True` and `latent_channels` "
                f"({self.latent_channels}) to be a multiple of `chunk_size` ({self.chunk_size})."
            )
        codebooks = check_quantizer(self)
        if self.quantizer != "none" and self.encoder_type != "chunk":
            raise ValueError(
                f"`quantizer` ({self.quantizer!r}) needs `encoder_type='chunk'`, not "
                f"{self.encoder_type!r}."
            )
        # this form has no maps between embeddings and states
        if self.layer_type == "attention":
            check_heads(self)
            if self.embedding_size != self.hidden_size:
                raise ValueError(
                    f"`embedding_size` ({self.embedding_size}) must equal `hidden_size` "
                    f"({self.hidden_size}) when `layer_type` is 'attention'."
                )
        if not self.variational and self.latent_channels != self.hidden_size:
            raise ValueError(
                f"`latent_channels` ({self.latent_channels}) must equal `hidden_size` "
                f"({self.hidden_size}) when `variational` is False, because the hidden state "
                "itself is the latent; set `variational=True`."
            )
        for name in ("mask_token_id", "pad_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"`{name}` ({getattr(self, name)}) must be in [0, "
                    f"vocab_size={self.vocab_size})."
                )
        # four projections of attention, if any, and three of SwiGLU
        layer = self.hidden_size * (
            4 * self.hidden_size * (self.layer_type == "attention") + 3 * self.intermediate_size
        )
        chunk = self.chunk_size * self.embedding_size
        # twice: encoder and decoder
        parameters = self.vocab_size * self.embedding_size + 2 * self.num_hidden_layers * layer
        parameters += self.hidden_size * (2 * chunk + 3 * self.latent_channels)  # the maps between
        check_size(self, parameters + codebooks)


@strict
class TokComColorCodecConfig(TokComCodecConfig):
    r"""Configuration of the codec `token id <-> pixel` (PixelDLM), which has no parameters.

    Args:
        vocab_size, mask_token_id, pad_token_id (`int`): as in `TokComChunkCodecConfig`; the mask
            token is never decoded to.
        digits (`str`): `"color"`, three digits of base 256 (red, green, blue), or `"bits"`, the
            binary digits (analog bits, Chen et al. 2023).
        symbols (`str`): what `prediction_type="tokens"` gives probabilities to: `"digits"`, each on
            its own, or `"tokens"`, whole tokens of which the digits are noisy channels.
        patch_size (`int`): a latent is a patch of `patch_size` x `patch_size` tokens.
        layout (`str`): `"contiguous"`, a patch holds consecutive tokens, or `"raster"`, tokens fill
            the rows of an image.
        image_size (`int`): width of that image in pixels, a multiple of `patch_size`; also spaces
            the patches' positions.
        standardize (`bool`): give every digit mean 0 and standard deviation 1 over the vocabulary;
            `False` maps 0..255 to -1..1 as published, which leaves high digits that hardly vary to
            the noise.
        position_axes (`int`): 2, the row and column of a patch in the image, or 1, its number in
            reading order, which a model with context layers needs: they are told what stands before
            a patch.
    """

    model_type = "tokcom_color_codec"

    vocab_size: int = 4097
    mask_token_id: int = 4096
    pad_token_id: int = 4096
    digits: str = "color"
    symbols: str = "digits"
    patch_size: int = 4  # pixels of a side, one token each
    layout: str = "contiguous"
    image_size: int = 64  # pixels
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
        # 3 bytes, or the bits that write the largest id
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
        # a digit is one channel
        return self.chunk_size if self.symbols == "tokens" else self.latent_channels

    @property
    def latent_channels(self) -> int:
        return self.chunk_size * self.digits_per_token

    def fit_transformer(self, transformer: PreTrainedConfig) -> None:
        transformer.latent_channels = self.latent_channels

    @property
    def num_valid_ids(self) -> int:
        """Ids that decoding may give: all but a mask token at the end."""
        return self.vocab_size - (self.mask_token_id == self.vocab_size - 1)

    @property
    def length_multiple(self) -> int:
        """Tokens of which a text must hold a multiple: a patch, or in raster order a row of
        patches."""
        # image_size pixels a row, patch_size rows: the patches of a raster lie side by side
        return self.chunk_size if self.layout == "contiguous" else self.image_size * self.patch_size

    def validate_architecture(self):
        check_positive(self, "vocab_size", "patch_size", "image_size")
        check_choice(self, digits=("color", "bits"), symbols=("digits", "tokens"))
        check_choice(self, layout=("contiguous", "raster"), position_axes=(1, 2))
        check_multiple(self, "image_size", "patch_size")
        if self.digits == "color" and self.vocab_size > 256**3:
            raise ValueError(
                f"`vocab_size` ({self.vocab_size}) is more than the {256**3} colors; use "
                "digits='bits'."
            )


__all__ = ["TokComChunkCodecConfig", "TokComCodecConfig", "TokComColorCodecConfig"]
