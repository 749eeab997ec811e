"""Configurations of the codecs of pictures, clips and sounds, and of several streams at once.

Their data always have `num_tokens` latents, and nothing to predict but latents.

Shape legend: B batch, N latents, C latent channels, F frames, H x W pixels.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_codec_tokcom import (
    TokComChunkCodecConfig,
    TokComCodecConfig,
    TokComColorCodecConfig,
    check_choice,
    check_known_keys,
    check_multiple,
    check_positive,
    check_quantizer,
    check_size,
)


class TokComMediaCodecConfig(TokComCodecConfig):
    """What codecs of pictures, clips, sounds and several streams share: N is `num_tokens`."""

    input_name = "pixel_values"
    has_tokens = False
    reads_captions = True
    clip_length = None  # frames of pixels that are read at once; None for a single picture
    reads_pixels = True  # whether it reads pixels, not the latents of an autoencoder

    @classmethod
    def set_vocabulary(cls, fields: dict[str, Any], size: int, overwrite: bool) -> bool:
        return False

    @property
    def text_vocab_size(self) -> int:
        return 0

    def stream_length(self, text_latents: int) -> int:
        return self.num_tokens

    def check_model(self, model: PreTrainedConfig) -> None:
        super().check_model(model)
        # only a composite codec may have texts among its streams
        if not self.text_vocab_size and (
            model.prediction_type != "latents" or model.has_latent_head
        ):
            raise ValueError(
                f"images have no tokens to predict: `prediction_type` ({model.prediction_type!r}) "
                f"must be 'latents', and `latent_head` ({model.latent_head!r}) and "
                f"`latent_refiner` ({model.latent_refiner!r}) 'none'."
            )
        longest = model.transformer_config.max_position_embeddings  # latents
        if longest < self.num_tokens:
            raise ValueError(
                f"`transformer_config.max_position_embeddings` ({longest}) must hold the "
                f"{self.num_tokens} tokens of {self.modality} data."
            )


@strict
class TokComStyleCodecConfig(TokComMediaCodecConfig):
    r"""Configuration of the codec `image <-> ordered tokens` (Styled_vae_vq).

    Args:
        image_size (`int`), patch_size (`int`): pixels of a side, and of a patch's side; there are
            three colors.
        num_tokens (`int`): N, latents of an image, from coarse to fine; two for every styled layer.
        latent_channels (`int`): C, channels of a token.
        hidden_size, intermediate_size, num_attention_heads, num_hidden_layers (`int`): of the
            encoder's plain layers.
        num_expert_layers, expert_intermediate_size (`int`): last layers of the encoder, in which
            every token has a feed-forward network of its own, and the width of those.
        decoder_hidden_size, decoder_intermediate_size, decoder_num_attention_heads (`int`): of the
            decoder.
        num_decoder_layers (`int`): plain layers after them.
        bottleneck (`str`): `"gaussian"`, a posterior; `"sphere"`, tokens of one length, with noise
            in training; `"cosine"`, mean-centred weights of a soft codebook.
        linear_path (`bool`): adds linear maps from patches to tokens and back beside the network,
            which remembers more after less training, but is harder to draw with.
        num_codes (`int`): size of a codebook of all tokens that k-means has made after training; 0
            is none.
    """

    model_type = "tokcom_style_codec"
    modality = "image"

    image_size: int = 64  # pixels
    patch_size: int = 8
    num_tokens: int = 36  # N
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
    linear_path: bool = False
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
        check_positive(self, "image_size", "patch_size", "num_tokens", "latent_channels")
        check_positive(self, "hidden_size", "intermediate_size", "num_attention_heads")
        check_positive(self, "expert_intermediate_size", "decoder_hidden_size")
        check_positive(self, "decoder_intermediate_size", "decoder_num_attention_heads")
        check_multiple(self, "image_size", "patch_size")
        check_multiple(self, "hidden_size", "num_attention_heads")
        check_multiple(self, "decoder_hidden_size", "decoder_num_attention_heads")
        check_choice(self, bottleneck=("gaussian", "sphere", "cosine"))
        if self.num_tokens % 2:
            raise ValueError(
                f"`num_tokens` ({self.num_tokens}) must be even: every styled layer takes two "
                "tokens."
            )
        if min(self.num_hidden_layers, self.num_expert_layers, self.num_decoder_layers) < 0:
            raise ValueError(
                "`num_hidden_layers`, `num_expert_layers` and `num_decoder_layers` must not be "
                "negative."
            )
        if self.num_codes < 0 or self.num_codes == 1:
            raise ValueError(f"`num_codes` ({self.num_codes}) must be 0 or at least 2.")
        # a bound, before anything is allocated: projections of attention and feed-forward layers
        width = self.hidden_size
        # of an expert layer: every token has a network of its own, all patches share one
        experts = self.num_tokens * self.expert_intermediate_size + self.intermediate_size
        parameters = self.num_hidden_layers * width * (4 * width + 2 * self.intermediate_size)
        parameters += self.num_expert_layers * width * (4 * width + 2 * experts)
        width = self.decoder_hidden_size
        layer = width * (4 * width + 2 * self.decoder_intermediate_size)
        parameters += (self.num_styled_layers + self.num_decoder_layers) * layer
        # each of two tokens gives a style of twice the width, and joins as a state of one
        parameters += self.num_styled_layers * 6 * width * self.latent_channels
        patch = 3 * self.patch_size**2  # values of a patch
        parameters += (self.hidden_size + width) * (patch + self.num_patches + self.num_tokens)
        if self.linear_path:
            latents = self.num_tokens * self.latent_channels
            parameters += (self.hidden_size + width) * self.num_patches * latents
        # posterior means and variances, and a codebook
        parameters += self.latent_channels * (2 * self.hidden_size + 2 * self.num_codes)
        check_size(self, parameters)


@strict
class TokComVideoCodecConfig(TokComMediaCodecConfig):
    r"""Configuration of the codec `clip <-> one latent per patch of space and time`.

    Args:
        num_frames, height, width (`int`): F, H and W of the clips that training sees; other sizes
            that patches divide fit, too.
        num_channels (`int`): 3 for pixels, or the channels of an external autoencoder whose latents
            the clips are.
        spatial_compression, temporal_compression (`int`): pixels of a side, and frames, that one
            value of those latents stands for; 1 for pixels.
        frames_per_patch, patch_size (`int`): frames, and pixels of a side, of a patch.
        hidden_size, intermediate_size, num_hidden_layers (`int`): residual MLP between a patch and
            its latent, on either side; `hidden_size` 0 is none: the values of a patch are its
            latent, and nothing is lost.
        latent_channels (`int`): C; 0, the only choice without a network, is the number of values in
            a patch.
        quantizer, num_codes, num_quantizers, fsq_levels: as in `TokComChunkCodecConfig`.
    """

    model_type = "tokcom_video_codec"
    modality = "video"
    has_moments = True

    num_frames: int = 8  # F, of an autoencoder's latents if there is one
    height: int = 32  # H, likewise
    width: int = 32  # W
    num_channels: int = 3
    spatial_compression: int = 1
    temporal_compression: int = 1
    frames_per_patch: int = 1
    patch_size: int = 8
    hidden_size: int = 0  # 0: no network
    intermediate_size: int = 512
    num_hidden_layers: int = 1
    latent_channels: int = 0  # C
    quantizer: str = "none"
    num_codes: int = 1024
    num_quantizers: int = 1
    fsq_levels: list[int] | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        # before the checks of the base class, which refuse 0
        self.latent_channels = self.latent_channels or self.patch_values
        super().__post_init__(**kwargs)

    @property
    def kind(self) -> str:
        return "image" if self.num_frames == 1 else "video"

    @property
    def num_position_axes(self) -> int:
        return 3  # time, row, column

    @property
    def quantizes_estimates(self) -> bool:
        return self.quantizer != "none"

    def fit_transformer(self, transformer: PreTrainedConfig) -> None:
        transformer.latent_channels = self.latent_channels

    @property
    def patch_values(self) -> int:
        return self.num_channels * self.frames_per_patch * self.patch_size**2  # C without a network

    @property
    def group_size(self) -> int:
        return (self.height // self.patch_size) * (self.width // self.patch_size)

    @property
    def num_tokens(self) -> int:
        """N, latents of a clip."""
        # moments times places
        return self.num_frames // self.frames_per_patch * self.group_size

    @property
    def image_size(self) -> list[int]:
        """Height and width in pixels."""
        return [self.height * self.spatial_compression, self.width * self.spatial_compression]

    @property
    def reads_pixels(self) -> bool:
        # the latents of an autoencoder have other channels, or are smaller than the picture
        return (self.num_channels, self.spatial_compression) == (3, 1)

    @property
    def clip_length(self) -> int:
        """Frames of a clip of pixels; an autoencoder that compresses time codes the first frame on
        its own."""
        return (self.num_frames - 1) * self.temporal_compression + 1

    def validate_architecture(self):
        check_positive(self, "num_frames", "height", "width", "num_channels")
        check_positive(self, "frames_per_patch", "patch_size", "spatial_compression")
        check_positive(self, "temporal_compression", "intermediate_size", "latent_channels")
        self.check_shape(self.num_frames, self.height, self.width)
        if min(self.hidden_size, self.num_hidden_layers) < 0:
            raise ValueError("`hidden_size` and `num_hidden_layers` must not be negative.")
        codebooks = check_quantizer(self)
        if not self.hidden_size and (
            self.latent_channels != self.patch_values or self.quantizer != "none"
        ):
            raise ValueError(
                f"without a network (`hidden_size` 0) `latent_channels` ({self.latent_channels}) "
                f"must be the {self.patch_values} values of a patch, and `quantizer` "
                f"({self.quantizer!r}) 'none'; set `hidden_size`."
            )
        # encoder and decoder: maps in and out, and SwiGLU layers of three maps
        ends = 2 * self.hidden_size * (self.patch_values + self.latent_channels)
        layers = 6 * self.num_hidden_layers * self.hidden_size * self.intermediate_size
        check_size(self, ends + layers + codebooks)

    def check_shape(self, frames: int, height: int, width: int) -> None:
        """Raise `ValueError` unless patches divide a clip of this size."""
        sides = height % self.patch_size or width % self.patch_size
        if not frames or frames % self.frames_per_patch or sides:
            raise ValueError(
                f"a clip of {frames} frames of {height} x {width} does not divide into patches of "
                f"`frames_per_patch` ({self.frames_per_patch}) frames and `patch_size` "
                f"({self.patch_size}) squared; give a multiple of {self.frames_per_patch} frames "
                f"and of {self.patch_size} pixels."
            )


@strict
class TokComAudioCodecConfig(TokComVideoCodecConfig):
    r"""Configuration of the codec `sound <-> one latent per patch of log-mel frames`: a clip whose
    channels are the bands.

    Args:
        sampling_rate (`int`): samples a second; training resamples other sounds.
        fft_length, hop_length (`int`): samples of a frame's window, and from frame to frame.
        num_channels (`int`): mel bands.
        num_frames (`int`): frames of a sound; shorter ones end in silence, longer ones are cut.
        frames_per_patch (`int`): frames of a latent.
        hidden_size, intermediate_size, num_hidden_layers, latent_channels, quantizer ...: as in
        `TokComVideoCodecConfig`.
    """

    model_type = "tokcom_audio_codec"
    modality = "audio"

    sampling_rate: int = 8000  # Hz; bands reach up to half of it
    fft_length: int = 512  # 64 ms at 8000 Hz
    hop_length: int = 128  # 16 ms
    num_frames: int = 64
    height: int = 1  # a sound has no rows and columns
    width: int = 1
    num_channels: int = 40  # mel bands
    frames_per_patch: int = 4
    patch_size: int = 1

    @property
    def kind(self) -> str:
        return "audio"

    def check_model(self, model: PreTrainedConfig) -> None:
        raise ValueError(
            "a sound is a stream of a composite codec; use `model_type='tokcom_composite_codec'` "
            "with one stream."
        )

    @property
    def num_samples(self) -> int:
        """Samples of a sound of `num_frames`."""
        # frames are centred: the first at sample 0, the last at the end
        return (self.num_frames - 1) * self.hop_length

    def validate_architecture(self):
        super().validate_architecture()
        check_positive(self, "sampling_rate", "fft_length", "hop_length")
        if (self.height, self.width, self.patch_size) != (1, 1, 1) or self.num_frames < 2:
            raise ValueError(
                f"`height` ({self.height}), `width` ({self.width}) and `patch_size` "
                f"({self.patch_size}) of a sound must be 1, and `num_frames` ({self.num_frames}) "
                "at least 2."
            )
        # windows must leave no gaps, and the bands share fft_length / 2 bins of a spectrum
        if self.hop_length > self.fft_length or 2 * self.num_channels > self.fft_length:
            raise ValueError(
                f"`fft_length` ({self.fft_length}) must be at least `hop_length` "
                f"({self.hop_length}) and twice `num_channels` ({self.num_channels}), or some "
                "bands hold nothing."
            )


STREAM_CONFIGS: dict[str, type[TokComCodecConfig]] = {
    config.model_type: config
    for config in (
        *(TokComChunkCodecConfig, TokComColorCodecConfig, TokComStyleCodecConfig),
        *(TokComVideoCodecConfig, TokComAudioCodecConfig),
    )
}


@strict
class TokComCompositeCodecConfig(TokComMediaCodecConfig):
    r"""Configuration of several codecs side by side, whose latents make one sequence.

    Args:
        streams (`dict[str, dict]`): name of a stream -> its codec's configuration; None removes a
            preset's. By default one text. In the sequence they follow each other by name. A latent
            uses channels of its stream only, so the transformer's maps in and out are different for
            every stream.
        text_latents (`int`): latents of a text; what is left of them after it is EOS.
    """

    model_type = "tokcom_composite_codec"
    modality = "several"
    input_name = "streams"

    streams: dict[str, dict[str, Any] | None] | None = None
    text_latents: int = 8
    initializer_range: float = 0.02

    @classmethod
    def set_vocabulary(cls, fields: dict[str, Any], size: int, overwrite: bool) -> bool:
        # one text by default, as in `stream_configs`
        fields["streams"] = fields.get("streams") or {"text": {}}
        for stream in fields["streams"].values():
            if stream is None:
                continue
            codec_type = stream.get("model_type", TokComChunkCodecConfig.model_type)
            # whoever builds the model reports an unknown type
            config = STREAM_CONFIGS.get(codec_type, TokComMediaCodecConfig)
            config.set_vocabulary(stream, size, overwrite)
        return True

    def stream_configs(self) -> dict[str, TokComCodecConfig]:
        """The configuration of every stream's codec."""
        configs = {}
        streams = {"text": {}} if self.streams is None else self.streams
        for name, fields in sorted(streams.items()):  # JSON does not keep an order
            if fields is None:
                continue
            codec_type = fields.get("model_type", TokComChunkCodecConfig.model_type)
            if codec_type not in STREAM_CONFIGS:
                raise ValueError(
                    f"stream {name!r} has the codec {codec_type!r}; known are "
                    f"{sorted(STREAM_CONFIGS)}."
                )
            fields = {key: value for key, value in fields.items() if key != "model_type"}
            check_known_keys(STREAM_CONFIGS[codec_type], fields, f"codec_config.streams.{name}.")
            configs[name] = STREAM_CONFIGS[codec_type](**fields)
        return configs

    def stream_lengths(self) -> dict[str, int]:
        """Latents of every stream."""
        configs = self.stream_configs().items()
        return {name: codec.stream_length(self.text_latents) for name, codec in configs}

    @property
    def text_vocab_size(self) -> int:
        return max((codec.text_vocab_size for codec in self.stream_configs().values()), default=0)

    @property
    def num_position_axes(self) -> int:
        """The stream's index and the axes of the stream that has most."""
        return 1 + max(
            (codec.num_position_axes for codec in self.stream_configs().values()), default=1
        )

    @property
    def latent_channels(self) -> int:
        # side by side: a latent is 0 in the channels of other streams
        return sum(codec.latent_channels for codec in self.stream_configs().values())

    @property
    def num_tokens(self) -> int:
        """N, latents of all streams."""
        return sum(self.stream_lengths().values())

    @property
    def stream_channels(self) -> list[int]:
        return [codec.latent_channels for codec in self.stream_configs().values()]

    def fit_transformer(self, transformer: PreTrainedConfig) -> None:
        transformer.latent_channels = self.latent_channels
        transformer.stream_channels = self.stream_channels
        transformer.num_position_axes = self.num_position_axes

    def check_model(self, model: PreTrainedConfig) -> None:
        super().check_model(model)
        transformer = model.transformer_config
        # a given stream is clean beside one that is noise, so times differ within a row
        if transformer.block_size is not None or not transformer.per_latent_timestep:
            raise ValueError(
                "several streams need `transformer_config.block_size=None` (got "
                f"{transformer.block_size}) and `per_latent_timestep=True` (got "
                f"{transformer.per_latent_timestep}): what is given is clean."
            )
        if model.has_latent_head or model.condition_vocab_size:
            raise ValueError(
                "several streams have no captions besides (`condition_vocab_size` "
                f"{model.condition_vocab_size}) and no latent head ({model.latent_head!r}, "
                f"{model.latent_refiner!r})."
            )

    def validate_architecture(self):
        check_positive(self, "text_latents")
        configs = self.stream_configs()
        if not configs:
            raise ValueError("`streams` is empty; name at least one stream and its codec.")
        for name in configs:
            # streams are also modules, whose names may not hold a '.'
            if not name.isidentifier():
                raise ValueError(
                    f"the stream {name!r} must be named like an argument: letters, digits and '_'."
                )
        # 0 is a stream without text
        vocabularies = {codec.text_vocab_size for codec in configs.values()} - {0}
        if len(vocabularies) > 1:
            raise ValueError(
                f"all texts share one tokenizer, but `vocab_size` is {sorted(vocabularies)}; make "
                "them equal."
            )
        for name, codec in configs.items():
            # nobody would decode the latents of an autoencoder inside a stream
            if getattr(codec, "spatial_compression", 1) != 1:
                raise ValueError(
                    f"stream {name!r} must be of pixels: `spatial_compression` "
                    f"({codec.spatial_compression}) is not 1."
                )


CODEC_CONFIGS: dict[str, type[TokComCodecConfig]] = {
    **STREAM_CONFIGS,
    TokComCompositeCodecConfig.model_type: TokComCompositeCodecConfig,
}

__all__ = [
    "CODEC_CONFIGS",
    "STREAM_CONFIGS",
    "TokComAudioCodecConfig",
    "TokComCompositeCodecConfig",
    "TokComMediaCodecConfig",
    "TokComStyleCodecConfig",
    "TokComVideoCodecConfig",
]
