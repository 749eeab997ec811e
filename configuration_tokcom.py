"""TokCom configuration: what a model is. One codec, one transformer, and the flow between noise and
latents.

Notable choices:
- A field exists because two presets differ in it; the exceptions and their reasons are in
  `tests/test_configuration.py`.
- All checks live in `validate_architecture`, which the strict dataclass runs after construction.
- Presets are in `presets/*.yaml`, settings of training in `training/config.py` and
  `objective_tokcom.py`.

Shape legend used in every file: B batch, T tokens, K tokens per chunk, N = T/K latents, C latent
channels, D width, H heads, A position axes, V vocabulary.
"""

import difflib
import warnings
from copy import deepcopy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_codec_tokcom import (
    MAX_PARAMETERS,
    TokComChunkCodecConfig,
    check_choice,
    check_heads,
    check_known_keys,
    check_numbers,
    check_positive,
    check_size,
)
from .configuration_media_tokcom import CODEC_CONFIGS

# Fields of earlier versions, and the value at which leaving them out changes nothing; None is any.
REMOVED = {
    "latent_stagger": 0.0,
    "frequency_weight": 0.0,
    "self_conditioning": False,
    "num_micro_decoder_layers": 0,
    "quantized_latents": True,
    "digit_sigma": 0.25,
    "num_styled_layers": None,  # half of `num_tokens`
}

# Fields of earlier versions that say how a model was trained, not what it is.
TRAINING = frozenset(
    "stage mse_weight ce_weight ce_share noise_draws context_dropout infill_rate turn_share "
    "kl_weight kl_free_nats token_dropout latent_dropout bottleneck_noise tail_dropout "
    "gradient_weight stream_weights generation_rates micro_decoder_dropout".split()
)


def check_spelling(config: PreTrainedConfig, others: dict[str, Any]) -> None:
    """Refuse a key that resembles one of the configuration's: the library would keep it as an
    attribute that nothing reads."""
    known = list(type(config).__dataclass_fields__)
    for key in others:
        # 0.85 is a slip in a long name; other unknown keys may be those of a newer library
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if near and near[0] != key:
            raise ValueError(f"unknown configuration key {key!r}; did you mean {near[0]!r}?")


def drop_removed(*parts: dict[str, Any]) -> None:
    """Take the fields of earlier versions out of `parts` of a configuration, with one warning that
    names them.

    Raises `ValueError` for one that was in use: such a model cannot be what it was.
    """
    used = {}
    dropped = set()
    for part in parts:
        old = [name for name in part if name in TRAINING or name in REMOVED]
        for name in old:
            value = part.pop(name)
            dropped.add(name)
            if REMOVED.get(name) is not None and value != REMOVED[name]:
                used[name] = value
    if used:
        raise ValueError(
            f"this model was trained with {used}, which version 0.2 removed after it had lost its "
            "ablation; use version 0.1."
        )
    if dropped:
        warnings.warn(
            f"dropped fields that are no longer part of a model: {', '.join(sorted(dropped))}.",
            stacklevel=3,
        )


@strict
class TokComTransformerConfig(PreTrainedConfig):
    r"""Configuration of the transformer that predicts clean latents.

    Args:
        latent_channels (`int`): C, equal to the codec's.
        max_position_embeddings (`int`): the longest sequence in latents that training sees. Longer
            prompts are an error; block-causal generation goes on over a window of this size.
        num_position_axes (`int`): A, the axes of `position_ids (B, N, A)` among which a head's
            channels are split.
        conditioning_size (`int`): width of the timestep embedding that feeds adaLN.
        timestep_scale (`float`): factor on t before the sinusoids. 1000 tells neighbouring times
            apart; the published v5.2 used 1.
        adaln_gates (`bool`): gated adaLN-zero (a block is the identity at init); `False` is the
            published form.
        input_projection (`bool`): a linear map C -> D before the blocks; `False` (published) needs
            `C == D`.
        per_latent_timestep (`bool`): known latents are told t = 1. `False` (published): one t for
            the whole sequence, so training never shows a clean prompt and sampling tells it the
            time of its neighbours.
        block_size (`int`, *optional*): Q, latents denoised at once under block-causal attention;
            `None` is the published bidirectional model.
        num_context_layers (`int`): the first layers, which only clean latents pass, once; noisy
            latents enter after them and are all that is repeated at every sampling step. 0 is one
            network for both.
        head_attention (`bool`): whether the layers after the context layers attend to context and
            block, or see the context only through the state of its last latent.
        local_head (`bool`): without `head_attention`: the layers after the context layers read a
            chunk token by token and attend to the tokens before theirs (MegaByte's local model, Yu
            et al. 2023), instead of reading it as one vector at one time. One pass gives what is
            expected of all K tokens.
        start_latents (`bool`): for `prediction_type="tokens"`: a learned latent stands before the
            first one: one kind at the start of a text, another where a window begins inside one. It
            may see what follows a gap that nothing precedes.
        attention_type (`str`): `"full"`, or for clips `"factorized"`: even layers attend within a
            moment, odd ones along time at one place (Bertasius et al. 2021), so that the cost grows
            with F^2 + (H W)^2 instead of (F H W)^2.
        stream_channels (`list[int]`, *optional*): for several streams in one sequence: how many of
            the C channels each uses, one after the other; the first axis of `position_ids` is the
            stream. Set by a composite codec.
        feature_size (`int`): width of an input that is read instead of the latents, and of the
            output; 0 reads and predicts latents. Set by `prediction_type="tokens"`.
        num_places (`int`): K, of which the features are made side by side; set with them.
    """

    model_type = "tokcom_transformer"
    base_config_key = "transformer_config"

    latent_channels: int = 64  # C
    hidden_size: int = 256  # D
    intermediate_size: int = 704  # of SwiGLU; 8/3 D keeps the size of a plain layer of 4 D
    num_hidden_layers: int = 6
    num_attention_heads: int = 4  # H
    num_key_value_heads: int = 4  # fewer than H is grouped-query attention
    max_position_embeddings: int = 128  # in latents, so K times as many tokens
    num_position_axes: int = 1  # A
    attention_bias: bool = False
    qk_norm: bool = True  # RMSNorm of queries and keys per head
    rope_theta: float | int = 10000.0  # wavelengths from 2 pi to nearly 2 pi theta positions
    rms_norm_eps: float = 1e-6
    conditioning_size: int = 128
    timestep_scale: float | int = 1000.0
    adaln_gates: bool = True
    input_projection: bool = True
    per_latent_timestep: bool = True
    block_size: int | None = 4  # Q
    num_context_layers: int = 0  # of `num_hidden_layers`
    head_attention: bool = True
    local_head: bool = False
    start_latents: bool = False
    attention_type: str = "full"
    stream_channels: list[int] | None = None
    feature_size: int = 0  # K * E
    num_places: int = 1  # K
    initializer_range: float = 0.02

    def validate_all_numbers(self):  # validators run in the order of their names
        check_numbers(self)

    def validate_architecture(self):
        check_positive(
            self, "latent_channels", "hidden_size", "intermediate_size", "num_hidden_layers"
        )
        check_positive(
            self, "num_attention_heads", "num_key_value_heads", "max_position_embeddings"
        )
        check_positive(self, "num_position_axes", "conditioning_size")
        check_heads(self)
        head_size = self.hidden_size // self.num_attention_heads
        # rotary embedding turns pairs of channels, and every axis needs one
        if head_size < 2 * self.num_position_axes:
            raise ValueError(
                f"the head size ({head_size}) must be at least 2 x `num_position_axes` "
                f"({self.num_position_axes}); change `hidden_size` or `num_attention_heads`."
            )
        if self.conditioning_size % 2:
            raise ValueError(
                f"`conditioning_size` ({self.conditioning_size}) must be even: half cosines, half "
                "sines."
            )
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(
                f"`block_size` ({self.block_size}) must be at least 1, or None for bidirectional."
            )
        if self.block_size is not None and self.block_size >= self.max_position_embeddings:
            raise ValueError(
                f"`block_size` ({self.block_size}) must be smaller than `max_position_embeddings` "
                f"({self.max_position_embeddings}), or nothing fits before a block; use None to "
                "see all at once."
            )
        if not 0 <= self.num_context_layers < self.num_hidden_layers:
            raise ValueError(
                f"`num_context_layers` ({self.num_context_layers}) must be at least 0 and below "
                f"`num_hidden_layers` ({self.num_hidden_layers}): the rest denoise."
            )
        if self.num_context_layers and self.block_size is None:
            raise ValueError(
                f"`num_context_layers` ({self.num_context_layers}) needs a `block_size`: a "
                "bidirectional model has no context that is finished."
            )
        if not self.head_attention and (self.block_size != 1 or not self.num_context_layers):
            raise ValueError(
                f"`head_attention=False` needs `block_size=1` (got {self.block_size}) and context "
                f"layers (got {self.num_context_layers}): the latents of a block would not see "
                "each other."
            )
        check_choice(self, attention_type=("full", "factorized"))
        self._check_published()
        # parameters of a layer: four projections of attention, three of SwiGLU, six parts of adaLN
        layer = self.hidden_size * (
            4 * self.hidden_size + 3 * self.intermediate_size + 6 * self.conditioning_size
        )
        # the maps in and out, generously: only what no machine can hold is refused
        ends = self.hidden_size * (2 * self.feature_size + 3 * self.latent_channels)
        check_size(self, self.num_hidden_layers * layer + ends)

    def _check_published(self) -> None:
        """Options that need each other: the heads, and the forms of published models."""
        if self.start_latents and self.head_attention:
            raise ValueError(
                "`start_latents` needs context layers and `head_attention=False`: the head reads "
                "the context through the latent before it."
            )
        if self.local_head and not self.start_latents:
            raise ValueError(
                "`local_head` needs `start_latents`: its layers read the tokens of one chunk, and "
                "the context through the state before it."
            )
        if self.attention_type == "factorized" and (
            self.block_size is not None or self.num_position_axes != 3
        ):
            raise ValueError(
                f"`attention_type='factorized'` needs `block_size=None` (got {self.block_size}) "
                f"and three position axes (got {self.num_position_axes}): time, row and column."
            )
        if not self.per_latent_timestep and self.block_size is not None:
            raise ValueError(
                f"`per_latent_timestep=False` needs `block_size=None`, got {self.block_size}: "
                "block-causal generation conditions on clean latents."
            )
        if not self.input_projection and self.latent_channels != self.hidden_size:
            raise ValueError(
                f"`input_projection=False` needs `latent_channels` ({self.latent_channels}) equal "
                f"to `hidden_size` ({self.hidden_size}); set `input_projection=True`."
            )


TIMESTEP_SAMPLINGS = ("logit_normal", "uniform", "linear", "cosine")


@strict
class TokComConfig(PreTrainedConfig):
    r"""Configuration of a TokCom model: its codec, its transformer, and the flow between noise and
    latents.

    How a model is trained is not part of it: losses and their settings are in
    `objective_tokcom.py`.

    Args:
        codec_config, transformer_config: sub-configurations or their dictionaries; `model_type` of
            the codec's chooses its class.
        prediction_type (`str`): `"latents"`, the transformer predicts x1, or `"tokens"`, it
            predicts token probabilities and x1 is the mean latent under them.
        token_embedding_size (`int`): width of the embedding through which `"tokens"` reads and
            predicts tokens.
        token_stagger (`float`): in [0, 1], for `"tokens"`: how much later each token of a chunk is
            denoised than the one before it. 0 is all together, 1 one after the other.
        token_shift (`float`): for `"tokens"`: warp of each token's time; above 1 spends more of it
            on noise.
        noise_std (`float`): standard deviation of x0; 1 on standardised latents, 0.05 in published
            v5.2.
        timestep_sampling (`str`): how training draws times. `"logit_normal"`, t = 1 -
            sigmoid(N(timestep_loc, 1)), `"uniform"`, or the times at which a diffusion with
            `"linear"` betas (DDPM, Ho et al. 2020) or a `"cosine"` (Nichol and Dhariwal 2021) has
            the same signal-to-noise ratio; DDIM samples the last two.
        timestep_loc (`float`): larger is noisier; the sampling grid is shifted by the same amount.
        quantize_prediction (`bool`): every estimate becomes the nearest codes of a video codec's
            quantiser, with a straight-through gradient, as in the published video model.
        latent_head (`str`), latent_refiner (`str`): networks between the estimate and the decoder,
            for `"latents"`: `"none"`, `"mlp"` or `"vq"` (an MLP and a codebook), and `"none"` or
            `"mlp"`. Trained in stage head.
        latent_head_size, latent_refiner_size, latent_head_codes (`int`): their widths and codes.
        condition_vocab_size (`int`): of models of images and clips: ids of the captions they are
            generated for, those of the tokenizer and one more; 0 is without captions.
        condition_length (`int`): the longest caption in tokens; captions take so many positions
            before the image.
        num_inference_steps (`int`), sampling_temperature, sampling_top_p, sampling_guidance_scale
            (`float`): what the pipeline samples with by default: steps per block, how token
            probabilities are sharpened, and how much what is given is strengthened.
    """

    model_type = "tokcom"
    # a trainer that evaluates would collect them beside the logits
    keys_to_ignore_at_inference = ["past_key_values", "cache", "last_hidden_state"]
    sub_configs = {
        "codec_config": TokComChunkCodecConfig,
        "transformer_config": TokComTransformerConfig,
    }

    codec_config: PreTrainedConfig | dict[str, Any] | None = None
    transformer_config: PreTrainedConfig | dict[str, Any] | None = None
    prediction_type: str = "latents"
    token_embedding_size: int = 128  # E
    token_stagger: float | int = 0.0  # of a turn
    token_shift: float | int = 3.0
    noise_std: float | int = 1.0  # of x0, in units of standardised latents
    timestep_sampling: str = "logit_normal"
    timestep_loc: float | int = 0.6  # median logit of sigma
    quantize_prediction: bool = False
    latent_head: str = "none"
    latent_refiner: str = "none"
    latent_head_size: int = 4096  # hidden, of an MLP between C and C
    latent_refiner_size: int = 256
    latent_head_codes: int = 8192
    condition_vocab_size: int = 0
    condition_length: int = 64  # tokens
    num_inference_steps: int = 16  # per block
    sampling_temperature: float | int = 1.0
    sampling_top_p: float | int = 1.0
    sampling_guidance_scale: float | int = 1.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        parts = (self.codec_config, self.transformer_config)
        # copied, because fields are taken out of dictionaries that are the caller's
        subs = [deepcopy(part or {}) for part in parts if isinstance(part, dict | None)]
        streams = []
        for part in subs:
            # a stream that is None removes one of a preset
            streams += [stream for stream in (part.get("streams") or {}).values() if stream]
        drop_removed(kwargs, *subs, *streams)
        check_spelling(self, kwargs)
        if not isinstance(self.codec_config, PreTrainedConfig):
            # `subs` holds those of `parts` that are no configurations yet, in this order
            fields = subs.pop(0)
            codec_type = fields.pop("model_type", TokComChunkCodecConfig.model_type)
            if codec_type not in CODEC_CONFIGS:
                raise ValueError(
                    f"unknown codec type {codec_type!r}; known are {sorted(CODEC_CONFIGS)}."
                )
            check_known_keys(CODEC_CONFIGS[codec_type], fields, "codec_config.")
            self.codec_config = CODEC_CONFIGS[codec_type](**fields)
        if not isinstance(self.transformer_config, PreTrainedConfig):
            fields = {k: v for k, v in subs.pop(0).items() if k != "model_type"}
            check_known_keys(TokComTransformerConfig, fields, "transformer_config.")
            self.transformer_config = TokComTransformerConfig(**fields)
        # some codecs decide fields of the transformer, which presets then need not repeat
        self.codec_config.fit_transformer(self.transformer_config)
        # tokens are read and predicted through K embeddings side by side
        width = 0
        if self.prediction_type == "tokens":
            width = self.codec_config.num_symbols * self.token_embedding_size
            self.transformer_config.num_places = self.codec_config.num_symbols
        self.transformer_config.feature_size = width
        if not width:  # the start of a text only matters to models that predict tokens
            self.transformer_config.start_latents = False
            self.transformer_config.local_head = False
        super().__post_init__(**kwargs)

    def validate_all_numbers(self):  # validators run in the order of their names
        check_numbers(self)

    def validate_architecture(self):
        if self.codec_config.latent_channels != self.transformer_config.latent_channels:
            raise ValueError(
                f"`codec_config.latent_channels` ({self.codec_config.latent_channels}) and "
                f"`transformer_config.latent_channels` ({self.transformer_config.latent_channels}) "
                "must be equal."
            )
        self._validate_head()
        self.codec_config.check_model(self)
        check_choice(self, timestep_sampling=TIMESTEP_SAMPLINGS)
        check_choice(self, prediction_type=("latents", "tokens"))
        if self.timestep_sampling in ("linear", "cosine") and (
            self.prediction_type != "latents" or self.noise_std != 1
        ):
            raise ValueError(
                f"`timestep_sampling` ({self.timestep_sampling!r}) needs "
                f"`prediction_type='latents'` (got {self.prediction_type!r}) and `noise_std` 1 "
                f"(got {self.noise_std}), as DDIM does."
            )
        if self.prediction_type == "tokens" and not self.codec_config.has_symbols:
            raise ValueError(
                "`prediction_type='tokens'` needs `codec_config.encoder_type='token'`, or a codec "
                "of digits: only then is the mean latent of token probabilities known."
            )
        if self.transformer_config.local_head and self.token_stagger != 1:
            raise ValueError(
                f"`local_head` needs `token_stagger` 1, got {self.token_stagger}: it reads the "
                "tokens before a place as known."
            )
        has_context = self.transformer_config.num_context_layers > 0
        # only the codec of pixels leaves a choice of axes
        if has_context and getattr(self.codec_config, "position_axes", 1) != 1:
            raise ValueError(
                f"`codec_config.position_axes` ({self.codec_config.position_axes}) must be 1 with "
                f"`num_context_layers` ({self.transformer_config.num_context_layers}): rows and "
                "columns do not say what stands before a patch."
            )

    @property
    def text_vocab_size(self) -> int:
        """Ids of the text that a model reads: the tokenizer's and the mask token; 0 if it reads
        none."""
        return self.codec_config.text_vocab_size or self.condition_vocab_size

    # what tools ask of a language model

    @property
    def vocab_size(self) -> int:
        """Ids of the text that a model reads and writes; the last one is the mask token, which also
        pads."""
        return self.text_vocab_size

    @property
    def hidden_size(self) -> int:
        return self.transformer_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.transformer_config.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        return self.transformer_config.num_attention_heads

    @property
    def max_position_embeddings(self) -> int:
        """The longest text in tokens that the model sees at once."""
        return self.transformer_config.max_position_embeddings * self.codec_config.chunk_size

    @property
    def is_causal_lm(self) -> bool:
        """Whether the model gives exact probabilities of the next token: one chunk a block, its
        tokens in turn."""
        return self.transformer_config.start_latents and self.token_stagger == 1

    @property
    def has_latent_head(self) -> bool:
        return self.latent_head != "none" or self.latent_refiner != "none"

    def _validate_head(self):
        check_choice(self, latent_head=("none", "mlp", "vq"), latent_refiner=("none", "mlp"))
        if self.has_latent_head and self.prediction_type != "latents":
            raise ValueError(
                f"`latent_head` ({self.latent_head!r}) and `latent_refiner` "
                f"({self.latent_refiner!r}) need `prediction_type='latents'`: tokens that are "
                "drawn have exact latents."
            )
        check_positive(self, "latent_head_size", "latent_refiner_size", "latent_head_codes")
        check_positive(self, "token_embedding_size", "condition_length")
        channels = self.codec_config.latent_channels
        # the largest matrix of each part is enough for a bound
        head = channels * (
            self.latent_head_size + self.latent_refiner_size + self.latent_head_codes
        )
        table = self.codec_config.symbol_vocab_size * self.token_embedding_size
        captions = self.condition_vocab_size * self.transformer_config.hidden_size
        if max(head, table, captions) > MAX_PARAMETERS:
            raise ValueError(
                f"`latent_head_size` ({self.latent_head_size}), `latent_refiner_size` "
                f"({self.latent_refiner_size}), `latent_head_codes` ({self.latent_head_codes}), "
                f"`token_embedding_size` ({self.token_embedding_size}) or `condition_vocab_size` "
                f"({self.condition_vocab_size}) ask for more than {MAX_PARAMETERS:.0e} parameters."
            )

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: in the sub-configurations, too, only what differs from the
        library's defaults."""
        fields = super().to_diff_dict()
        for name in self.sub_configs:
            own = getattr(self, name).to_diff_dict()
            fields[name] = {
                # once, at the top level, is enough
                key: value
                for key, value in own.items()
                if key != "transformers_version"
            }
        return fields


__all__ = ["TRAINING", "TokComConfig", "TokComTransformerConfig"]
