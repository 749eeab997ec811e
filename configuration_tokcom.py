"""TokCom configuration: one codec, one transformer, and how the flow between noise and latents is trained.

Notable choices: every field exists because two published presets differ in it; all checks live in
`validate_architecture`, which the strict dataclass runs after construction; a preset is a small dictionary.

Shape legend used in every file: B batch, T tokens, K tokens per chunk, N = T/K latents, C latent channels,
D width, H heads, A position axes, V vocabulary.
"""

import warnings
from copy import deepcopy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_codec_tokcom import (
    CODEC_CONFIGS,
    MAX_PARAMETERS,
    TokComChunkCodecConfig,
    TokComColorCodecConfig,
    TokComCompositeCodecConfig,
    TokComStyleCodecConfig,
    TokComVideoCodecConfig,
    check_fraction,
    check_heads,
    check_known_keys,
    check_positive,
    check_size,
    vocabulary_fields,
)

# fields of earlier versions, and the value at which leaving them out changes nothing
REMOVED = {
    "latent_stagger": 0.0,
    "frequency_weight": 0.0,
    "self_conditioning": False,
    "num_micro_decoder_layers": 0,
    "micro_decoder_dropout": None,  # had no effect without such layers
}


def drop_removed(*parts: dict[str, Any]) -> None:
    """Take the fields of earlier versions out of `parts` of a configuration, with one warning that names them.

    Raises `ValueError` for one that was in use: such a model cannot be what it was.
    """
    found = {name: part.pop(name) for part in parts for name in REMOVED if name in part}
    used = {name: value for name, value in found.items() if REMOVED[name] is not None and value != REMOVED[name]}
    if used:
        raise ValueError(
            f"this model was trained with {used}, which version 0.2 removed after it had lost its ablation; use version 0.1."
        )
    if found:
        warnings.warn(f"dropped fields that no longer exist: {', '.join(sorted(found))}.", stacklevel=3)


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
        per_latent_timestep (`bool`): known latents are told t = 1. `False` (published): one t for the whole sequence,
            so training never shows a clean prompt and sampling tells it the time of its neighbours.
        block_size (`int`, *optional*): Q, latents denoised at once under block-causal attention; `None` is the
            published bidirectional model.
        num_context_layers (`int`): the first layers, which only clean latents pass, once; noisy latents enter after
            them and are all that is repeated at every sampling step. 0 is one network for both.
        head_attention (`bool`): whether the layers after the context layers attend to context and block, or see the
            context only through the state of its last latent.
        start_latents (`bool`): for `prediction_type="tokens"`: a learned latent stands before the first one: one kind at the start of a text, another
            where a window begins inside one. It may see what follows a gap that nothing precedes.
        attention_type (`str`): `"full"`, or for clips `"factorized"`: even layers attend within a moment, odd ones along time at
            one place (Bertasius et al. 2021), so that the cost grows with F^2 + (H W)^2 instead of (F H W)^2.
        stream_channels (`list[int]`, *optional*): for several streams in one sequence: how many of the C channels each uses, one
            after the other; the first axis of `position_ids` is the stream. Set by a composite codec.
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
    per_latent_timestep: bool = True
    block_size: int | None = 4
    num_context_layers: int = 0
    head_attention: bool = True
    start_latents: bool = False
    attention_type: str = "full"
    stream_channels: list[int] | None = None
    feature_size: int = 0
    initializer_range: float = 0.02

    def validate_architecture(self):
        check_positive(self, "latent_channels", "hidden_size", "intermediate_size", "num_hidden_layers")
        check_positive(self, "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
        check_positive(self, "num_position_axes", "conditioning_size")
        check_heads(self)
        head_size = self.hidden_size // self.num_attention_heads
        if head_size < 2 * self.num_position_axes:
            raise ValueError(
                f"the head size ({head_size}) must be at least 2 x `num_position_axes` ({self.num_position_axes}); change "
                "`hidden_size` or `num_attention_heads`."
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
        if self.start_latents and self.head_attention:
            raise ValueError(
                "`start_latents` needs context layers and `head_attention=False`: the head reads the context through "
                "the latent before it."
            )
        if self.attention_type not in ("full", "factorized"):
            raise ValueError(f"`attention_type` ({self.attention_type!r}) must be 'full' or 'factorized'.")
        if self.attention_type == "factorized" and (self.block_size is not None or self.num_position_axes != 3):
            raise ValueError(
                f"`attention_type='factorized'` needs `block_size=None` (got {self.block_size}) and three position axes (got "
                f"{self.num_position_axes}): time, row and column."
            )
        if not self.per_latent_timestep and self.block_size is not None:
            raise ValueError(
                f"`per_latent_timestep=False` needs `block_size=None`, got {self.block_size}: block-causal generation "
                "conditions on clean latents."
            )
        if not self.input_projection and self.latent_channels != self.hidden_size:
            raise ValueError(
                f"`input_projection=False` needs `latent_channels` ({self.latent_channels}) equal to `hidden_size` "
                f"({self.hidden_size}); set `input_projection=True`."
            )
        layer = self.hidden_size * (4 * self.hidden_size + 3 * self.intermediate_size + 6 * self.conditioning_size)
        ends = self.hidden_size * (2 * self.feature_size + 3 * self.latent_channels)
        check_size(self, self.num_hidden_layers * layer + ends)


STAGES = ("codec", "flow", "head")
TIMESTEP_SAMPLINGS = ("logit_normal", "uniform", "linear", "cosine")


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
        turn_share (`float`): in [0, 1], with `token_stagger=1`: share of the training rows whose times are exactly those
            at which a token's turn begins, which is where K steps sample; the others' are anywhere in between.
        token_shift (`float`): for `"tokens"`: warp of each token's time; above 1 spends more of it on noise.
        noise_std (`float`): standard deviation of x0; 1 on standardised latents, 0.05 in published v5.2.
        timestep_sampling (`str`): `"logit_normal"`, t = 1 - sigmoid(N(timestep_loc, 1)), `"uniform"`, or the times at which
            the diffusion with betas `"linear"` (DDPM, Ho et al. 2020) or a `"cosine"` (Nichol and Dhariwal 2021) has the same
            ratio of signal to noise; DDIM samples the last two.
        timestep_loc (`float`): larger is noisier; the sampling grid is shifted by the same amount.
        mse_weight, ce_weight (`float`): weights of the x1 regression and of the cross-entropy through the decoder.
        ce_share (`float`): in (0, 1], for `"latents"`: share of the latents, drawn at every training step, that the
            cross-entropy is computed of; the decoder is most of a step where it is as deep as the transformer.
        quantize_prediction (`bool`): every estimate becomes the nearest codes of a video codec's quantiser, its gradient passing
            straight through, as in the published video model.
        latent_head (`str`), latent_refiner (`str`): networks between the estimate and the decoder, for `"latents"`: `"none"`,
            `"mlp"` or `"vq"` (an MLP and a codebook), and `"none"` or `"mlp"`. Trained in stage `"head"`.
        latent_head_size (`int`), latent_refiner_size (`int`), latent_head_codes (`int`): their widths and codes.
        condition_vocab_size (`int`): of models of images: ids of the captions they are generated for, those of the tokenizer
            and one more; 0 is without captions.
        condition_length (`int`): the longest caption in tokens; captions stand so many positions before the image.
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
    turn_share: float | int = 0.0
    token_shift: float | int = 3.0
    noise_std: float | int = 1.0
    timestep_sampling: str = "logit_normal"
    timestep_loc: float | int = 0.6
    mse_weight: float | int = 1.0
    ce_weight: float | int = 0.2
    ce_share: float | int = 1.0
    quantize_prediction: bool = False
    latent_head: str = "none"
    latent_refiner: str = "none"
    latent_head_size: int = 4096
    latent_refiner_size: int = 256
    latent_head_codes: int = 8192
    condition_vocab_size: int = 0
    condition_length: int = 64
    noise_draws: int = 1
    context_dropout: float | int = 0.1
    infill_rate: float | int = 0.1
    num_inference_steps: int = 16
    sampling_temperature: float | int = 1.0
    sampling_top_p: float | int = 1.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        subs = [
            dict(sub or {}) for sub in (self.codec_config, self.transformer_config) if isinstance(sub, dict | None)
        ]
        drop_removed(kwargs, *subs)
        if not isinstance(self.codec_config, PreTrainedConfig):
            fields = subs.pop(0)
            codec_type = fields.pop("model_type", TokComChunkCodecConfig.model_type)
            if codec_type not in CODEC_CONFIGS:
                raise ValueError(f"unknown codec type {codec_type!r}; known are {sorted(CODEC_CONFIGS)}.")
            check_known_keys(CODEC_CONFIGS[codec_type], fields, "codec_config.")
            self.codec_config = CODEC_CONFIGS[codec_type](**fields)
        if not isinstance(self.transformer_config, PreTrainedConfig):
            fields = {k: v for k, v in subs.pop(0).items() if k != "model_type"}
            check_known_keys(TokComTransformerConfig, fields, "transformer_config.")
            self.transformer_config = TokComTransformerConfig(**fields)
        codec, transformer = self.codec_config, self.transformer_config
        composite = isinstance(codec, TokComCompositeCodecConfig)
        if composite or isinstance(codec, (TokComColorCodecConfig, TokComVideoCodecConfig)):  # the codec decides
            transformer.latent_channels = codec.latent_channels
        if composite:
            transformer.stream_channels = [stream.latent_channels for stream in codec.stream_configs().values()]
            transformer.num_position_axes = codec.num_position_axes
        width = self.codec_config.num_symbols * self.token_embedding_size if self.prediction_type == "tokens" else 0
        self.transformer_config.feature_size = width
        if not width:  # the start of a text only matters to models that predict tokens
            self.transformer_config.start_latents = False
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
        self._validate_images()
        if self.timestep_sampling not in TIMESTEP_SAMPLINGS:
            raise ValueError(f"`timestep_sampling` ({self.timestep_sampling!r}) must be one of {TIMESTEP_SAMPLINGS}.")
        if self.timestep_sampling in ("linear", "cosine") and (
            self.prediction_type != "latents" or self.noise_std != 1
        ):
            raise ValueError(
                f"`timestep_sampling` ({self.timestep_sampling!r}) needs `prediction_type='latents'` (got "
                f"{self.prediction_type!r}) and `noise_std` 1 (got {self.noise_std}), as DDIM does."
            )
        if self.prediction_type not in ("latents", "tokens"):
            raise ValueError(f"`prediction_type` ({self.prediction_type!r}) must be 'latents' or 'tokens'.")
        if self.prediction_type == "tokens" and not self.codec_config.has_symbols:
            raise ValueError(
                "`prediction_type='tokens'` needs `codec_config.encoder_type='token'`, or a codec of digits: only then is "
                "the mean latent of token probabilities known."
            )
        block_size = self.transformer_config.block_size
        row = self.codec_config.latents_multiple
        if block_size is not None and block_size % row:
            raise ValueError(f"`block_size` ({block_size}) must be a multiple of the {row} patches of a raster's row.")
        if not 0 <= self.token_stagger <= 1 or self.token_shift <= 0:
            raise ValueError(
                f"`token_stagger` ({self.token_stagger}) must be in [0, 1] and `token_shift` ({self.token_shift}) positive."
            )
        if not 0 <= self.turn_share <= 1 or (self.turn_share and self.token_stagger != 1):
            raise ValueError(
                f"`turn_share` ({self.turn_share}) must be in [0, 1], and needs `token_stagger=1`, got {self.token_stagger}."
            )
        if self.noise_std <= 0:
            raise ValueError(f"`noise_std` ({self.noise_std}) must be positive.")
        if self.mse_weight < 0 or self.ce_weight < 0 or self.mse_weight + self.ce_weight == 0:
            raise ValueError(
                f"`mse_weight` ({self.mse_weight}) and `ce_weight` ({self.ce_weight}) must not be negative, "
                "and one of them must be positive."
            )
        check_fraction(self, "context_dropout", "infill_rate")
        if self.noise_draws < 1 or (self.noise_draws > 1 and self.transformer_config.block_size is None):
            raise ValueError(
                f"`noise_draws` ({self.noise_draws}) must be at least 1, and 1 for a bidirectional model "
                "(`block_size=None`), which has no clean half to share."
            )

    @property
    def text_vocab_size(self) -> int:
        """Ids of the text that a model reads: the tokenizer's and the mask token; 0 if it reads none."""
        return self.codec_config.text_vocab_size or self.condition_vocab_size

    @property
    def has_latent_head(self) -> bool:
        return self.latent_head != "none" or self.latent_refiner != "none"

    def _validate_images(self):
        codec, transformer, condition = self.codec_config, self.transformer_config, self.condition_vocab_size
        images = not codec.has_tokens
        if condition < 0 or (condition and (not images or transformer.block_size is not None)):
            raise ValueError(
                f"`condition_vocab_size` ({condition}) must not be negative, and needs a codec of images or clips and "
                "`transformer_config.block_size=None`; a text continues its prompt."
            )
        self._validate_streams()
        if not codec.text_vocab_size and (self.prediction_type != "latents" or self.ce_weight or self.has_latent_head):
            raise ValueError(
                f"images have no tokens to predict: `prediction_type` ({self.prediction_type!r}) must be 'latents', "
                f"`ce_weight` ({self.ce_weight}) 0, and `latent_head` and `latent_refiner` 'none'."
            )
        if images and transformer.max_position_embeddings < codec.num_tokens:
            raise ValueError(
                f"`transformer_config.max_position_embeddings` ({transformer.max_position_embeddings}) must hold "
                f"the {codec.num_tokens} tokens of {codec.modality} data."
            )
        if transformer.attention_type == "factorized" and (codec.modality != "video" or condition):
            raise ValueError(
                f"`attention_type='factorized'` is for clips without captions, not for {codec.modality!r} with "
                f"`condition_vocab_size` {condition}; use 'full'."
            )
        if transformer.block_size is not None and transformer.block_size % codec.group_size:
            raise ValueError(
                f"`transformer_config.block_size` ({transformer.block_size}) must be a multiple of the {codec.group_size} latents "
                "of one moment of a clip, which are generated together."
            )
        if (
            self.quantize_prediction
            and getattr(codec, "quantizer", "none") == "none"
            or (self.quantize_prediction and codec.modality != "video")
        ):
            raise ValueError("`quantize_prediction` needs a video codec with a `quantizer`.")

    def _validate_streams(self):
        codec, transformer = self.codec_config, self.transformer_config
        several = codec.modality == "several"
        if codec.modality == "audio":
            raise ValueError(
                "a sound is a stream of a composite codec; use `model_type='tokcom_composite_codec'` with one stream."
            )
        if several != (transformer.stream_channels is not None):
            raise ValueError(
                f"`transformer_config.stream_channels` ({transformer.stream_channels}) is set by a composite codec, not by "
                f"{codec.model_type!r}; leave it out."
            )
        if several and (transformer.block_size is not None or not transformer.per_latent_timestep):
            raise ValueError(
                f"several streams need `transformer_config.block_size=None` (got {transformer.block_size}) and "
                f"`per_latent_timestep=True` (got {transformer.per_latent_timestep}): what is given is clean."
            )
        if several and (self.has_latent_head or self.condition_vocab_size or self.ce_share != 1):
            raise ValueError(
                f"several streams have no captions besides (`condition_vocab_size` {self.condition_vocab_size}), no latent head "
                f"({self.latent_head!r}, {self.latent_refiner!r}) and `ce_share` 1 (got {self.ce_share})."
            )

    def _validate_head(self):
        if self.latent_head not in ("none", "mlp", "vq") or self.latent_refiner not in ("none", "mlp"):
            raise ValueError(
                f"`latent_head` ({self.latent_head!r}) must be 'none', 'mlp' or 'vq', and `latent_refiner` "
                f"({self.latent_refiner!r}) 'none' or 'mlp'."
            )
        if self.has_latent_head and self.prediction_type != "latents":
            raise ValueError(
                f"`latent_head` ({self.latent_head!r}) and `latent_refiner` ({self.latent_refiner!r}) need "
                "`prediction_type='latents'`: tokens that are drawn have exact latents."
            )
        if self.stage == "head" and not self.has_latent_head:
            raise ValueError("stage 'head' trains `latent_head` and `latent_refiner`, but both are 'none'.")
        if not 0 < self.ce_share <= 1:
            raise ValueError(f"`ce_share` ({self.ce_share}) must be in (0, 1].")
        check_positive(self, "latent_head_size", "latent_refiner_size", "latent_head_codes", "token_embedding_size")
        check_positive(self, "condition_length")
        channels = self.codec_config.latent_channels
        head = channels * (self.latent_head_size + self.latent_refiner_size + self.latent_head_codes)
        table = self.codec_config.symbol_vocab_size * self.token_embedding_size
        captions = self.condition_vocab_size * self.transformer_config.hidden_size
        if max(head, table, captions) > MAX_PARAMETERS:
            raise ValueError(
                f"`latent_head_size` ({self.latent_head_size}), `latent_refiner_size` ({self.latent_refiner_size}), "
                f"`latent_head_codes` ({self.latent_head_codes}), `token_embedding_size` ({self.token_embedding_size}) or "
                f"`condition_vocab_size` ({self.condition_vocab_size}) ask for more than {MAX_PARAMETERS:.0e} parameters."
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

        `vocab_size` is the *tokenizer's* length; the model's vocabulary, of an image model that of its captions, is one
        larger (the mask token).
        `overrides` are dictionaries for `codec_config` and `transformer_config`, or top-level values.
        Raises `ValueError` for an unknown name or an unknown key.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known are {sorted(PRESETS)}.")
        fields = deepcopy(PRESETS[name])
        merge_overrides(fields, overrides)
        codec = CODEC_CONFIGS[fields["codec_config"].get("model_type", TokComChunkCodecConfig.model_type)]
        if vocab_size is not None and codec.modality == "several":
            streams = fields["codec_config"].get("streams") or {"text": {}}
            fields["codec_config"]["streams"] = streams
            for stream in (stream for stream in streams.values() if stream is not None):
                kind = CODEC_CONFIGS.get(stream.get("model_type", TokComChunkCodecConfig.model_type))
                if kind is not None and kind.modality == "text":
                    stream.update(vocabulary_fields(vocab_size))
        elif vocab_size is not None and codec.modality != "text":
            fields["condition_vocab_size"] = vocab_size + 1
        elif vocab_size is not None:
            fields["codec_config"].update(vocabulary_fields(vocab_size))
        return cls(**fields)


def merge_overrides(fields: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Write `overrides`, top-level values or dictionaries for a sub-configuration, into the `fields` of a TokComConfig.

    Raises `ValueError` for an unknown top-level key; unknown keys of sub-configurations fail when the config is built.
    """
    check_known_keys(TokComConfig, overrides, "")
    _merge(fields, overrides)


def _merge(fields: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Dictionaries are merged, but those of another codec replaced."""
    for key, value in overrides.items():
        known = fields.get(key)
        if isinstance(value, dict) and isinstance(known, dict):
            kind = known.get("model_type", TokComChunkCodecConfig.model_type)
            if value.get("model_type", kind) == kind:
                merged = dict(known)
                _merge(merged, value)
                value = merged
        fields[key] = value


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
            **vocabulary_fields(vocabulary),
            **dict(model_type="tokcom_color_codec", patch_size=patch_size, image_size=image_size, **codec),
        },
        "transformer_config": {
            **dict(hidden_size=hidden_size, intermediate_size=hidden_size * 8 // 3),
            **dict(
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads, num_position_axes=2
            ),
            **dict(max_position_embeddings=patches, conditioning_size=hidden_size, block_size=None),
        },
        **dict(prediction_type="tokens", token_embedding_size=embedding, token_shift=10.0, num_inference_steps=20),
        **dict(timestep_sampling="uniform"),
    }


def _styled(width: int, channels: int) -> dict[str, Any]:
    """Styled_vae_vq as published: a decoder of this width and tokens of so many channels, 256x256 pixels in 36 tokens."""
    return {
        "codec_config": {
            **dict(model_type="tokcom_style_codec", image_size=256, patch_size=16, latent_channels=channels),
            **dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=18),
            **dict(num_expert_layers=6, expert_intermediate_size=4096, bottleneck="cosine", tail_dropout=0.0),
            **dict(decoder_hidden_size=width, decoder_intermediate_size=4 * width),
            **dict(decoder_num_attention_heads=width // 64, num_styled_layers=18, num_decoder_layers=6),
        },
        "transformer_config": {
            **dict(latent_channels=channels, hidden_size=1024, intermediate_size=2816, num_hidden_layers=16),
            **dict(num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=36),
            **dict(conditioning_size=256, block_size=None, per_latent_timestep=False),
        },
        **dict(ce_weight=0.0, timestep_loc=0.0, num_inference_steps=32),
    }


def _video(
    width: int, layers: int, heads: int, frames: int, size: int, codes: int, code_channels: int, **more
) -> dict:
    """The published quantised video diffusion: latents `(16, F, size, size)` of an external autoencoder, a codebook of `codes`
    codes, and a transformer every estimate of which passes that codebook."""
    latents = frames * (size // 2) ** 2
    return {
        "codec_config": {
            **dict(model_type="tokcom_video_codec", num_frames=frames, height=size, width=size, num_channels=16),
            **dict(
                spatial_compression=8, patch_size=2, hidden_size=code_channels, intermediate_size=2 * code_channels
            ),
            **dict(latent_channels=code_channels, quantizer="vq", num_codes=codes),
        },
        "transformer_config": {
            **dict(hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers, num_position_axes=3),
            **dict(num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=latents),
            **dict(conditioning_size=128, block_size=None, **more),
        },
        **dict(ce_weight=0.0, quantize_prediction=True, infill_rate=0.0, num_inference_steps=50),
    }


PRESETS: dict[str, dict[str, Any]] = {
    # TokCom v5.2 as published: Qwen2-0.5B-shaped layers, latent = hidden state, bidirectional, CE objective.
    "v5.2": {
        "codec_config": {
            **vocabulary_fields(32016),
            **dict(chunk_size=4, layer_type="attention", variational=False, latent_channels=896, embedding_size=896),
            **dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
            **dict(num_key_value_heads=2, attention_bias=True, qk_norm=False, rope_theta=1e6, rms_norm_eps=1e-6),
            **dict(kl_weight=0.0, token_dropout=0.0, latent_dropout=0.0),
        },
        "transformer_config": {
            **dict(latent_channels=896, hidden_size=896, intermediate_size=4864, num_hidden_layers=24),
            **dict(num_attention_heads=14, num_key_value_heads=2, attention_bias=True, qk_norm=False, rope_theta=1e6),
            **dict(max_position_embeddings=256, conditioning_size=896, timestep_scale=1.0, adaln_gates=False),
            **dict(input_projection=False, per_latent_timestep=False, block_size=None),
        },
        **dict(noise_std=0.05, timestep_sampling="uniform", timestep_loc=0.0, mse_weight=0.0, ce_weight=1.0),
        **dict(context_dropout=0.0, infill_rate=0.0, num_inference_steps=50),
    },
    "base": {
        "codec_config": {
            **vocabulary_fields(8192),
            **dict(chunk_size=4, latent_channels=128, embedding_size=256, hidden_size=512, intermediate_size=1536),
            **dict(num_hidden_layers=3, encoder_type="token"),
        },
        "transformer_config": {
            **dict(latent_channels=128, hidden_size=640, intermediate_size=1728, num_hidden_layers=13),
            **dict(num_attention_heads=10, num_key_value_heads=10, max_position_embeddings=256),
            **dict(conditioning_size=256, block_size=1, num_context_layers=10, head_attention=False),
            **dict(start_latents=True),
        },
        **dict(prediction_type="tokens", token_stagger=1.0, token_shift=10.0, noise_draws=4),
        **dict(
            token_embedding_size=320, timestep_sampling="uniform", num_inference_steps=4, sampling_temperature=0.85
        ),
        **dict(turn_share=0.75, infill_rate=0.2, context_dropout=0.05),
    },
    "tiny": {
        "codec_config": {
            **vocabulary_fields(4096),
            **dict(chunk_size=4, latent_channels=64, embedding_size=128, hidden_size=256, intermediate_size=768),
            **dict(num_hidden_layers=2, encoder_type="token"),
        },
        "transformer_config": {
            **dict(latent_channels=64, hidden_size=320, intermediate_size=864, num_hidden_layers=8),
            **dict(num_attention_heads=5, num_key_value_heads=5, max_position_embeddings=128),
            **dict(conditioning_size=128, block_size=1, num_context_layers=6, head_attention=False),
            **dict(start_latents=True),
        },
        **dict(prediction_type="tokens", token_stagger=1.0, token_shift=10.0, noise_draws=4),
        **dict(timestep_sampling="uniform", turn_share=0.75, infill_rate=0.2, context_dropout=0.05),
        **dict(num_inference_steps=4, sampling_temperature=0.85),
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
    "style-768-128": _styled(768, 128),
    "style-768-64": _styled(768, 64),
    "style-512-128": _styled(512, 128),
    "style-512-64": _styled(512, 64),
    "style-tiny": {
        "codec_config": {
            **dict(model_type="tokcom_style_codec", image_size=32, patch_size=8, latent_channels=8, hidden_size=128),
            **dict(intermediate_size=512, num_attention_heads=4, num_hidden_layers=3, num_expert_layers=1),
            **dict(expert_intermediate_size=256, decoder_hidden_size=128, decoder_intermediate_size=256),
            **dict(decoder_num_attention_heads=4, num_styled_layers=18, num_decoder_layers=1),
        },
        "transformer_config": {
            **dict(latent_channels=8, hidden_size=192, intermediate_size=512, num_hidden_layers=6),
            **dict(num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=36),
            **dict(conditioning_size=128, block_size=None, per_latent_timestep=False),
        },
        **dict(ce_weight=0.0, timestep_loc=0.0, num_inference_steps=32),
    },
    "video-small": {**_video(512, 6, 8, 8, 32, 4096, 256), "timestep_sampling": "linear"},
    "video-medium": {**_video(1024, 12, 16, 16, 32, 8192, 512), "timestep_sampling": "linear"},
    "video-large": {
        **_video(2048, 24, 32, 32, 64, 16384, 768, attention_type="factorized"),
        "timestep_sampling": "cosine",
    },
    "video-dmd": {**_video(1024, 12, 16, 16, 32, 8192, 512), "timestep_sampling": "linear", "num_inference_steps": 4},
    "video-tiny": {
        "codec_config": dict(model_type="tokcom_video_codec", num_frames=8, height=32, width=32, patch_size=8),
        "transformer_config": {
            **dict(hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_position_axes=3),
            **dict(num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128),
            **dict(conditioning_size=128, block_size=None),
        },
        **dict(ce_weight=0.0, infill_rate=0.0, timestep_loc=0.0, num_inference_steps=20),
    },
    # a text, a picture and a sound in one sequence of 42 latents
    "omni-tiny": {
        "codec_config": {
            "model_type": "tokcom_composite_codec",
            "text_latents": 10,
            "streams": {
                "text": {
                    **vocabulary_fields(1024),
                    **dict(model_type="tokcom_chunk_codec", chunk_size=2, latent_channels=32, embedding_size=64),
                    **dict(hidden_size=128, intermediate_size=384, num_hidden_layers=1),
                },
                "image": dict(model_type="tokcom_video_codec", num_frames=1, height=32, width=32, patch_size=8),
                "audio": dict(model_type="tokcom_audio_codec", num_frames=64, frames_per_patch=4, num_channels=40),
            },
        },
        "transformer_config": {
            **dict(hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4),
            **dict(num_key_value_heads=4, max_position_embeddings=42, conditioning_size=128, block_size=None),
        },
        # what is said is decided by what is given only near pure noise: at t = 0.5 a noisy word tells itself
        **dict(ce_weight=1.0, infill_rate=0.0, timestep_loc=1.5, num_inference_steps=4),
    },
    "debug": {
        "codec_config": {
            **vocabulary_fields(512),
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
    "TokComStyleCodecConfig",
    "TokComVideoCodecConfig",
    "TokComTransformerConfig",
    "merge_overrides",
    "CODEC_CONFIGS",
    "STAGES",
    "PRESETS",
]
