"""Style codec: an image <-> N ordered tokens, from coarse to fine (Styled_vae_vq).

Notable choices:
- Every token has an expert network of its own; all of them are one grouped product.
- Two tokens style each decoder layer and stay in its sequence.
- Training drops the tail of the tokens at random, so the first tokens hold most of the image
  (nested dropout, Rippel et al. 2014).
- With `linear_path`, linear maps beside the network learn what PCA would; the network adds the
  rest.
- A codebook for all tokens is made after training, by k-means.

Shape legend: B batch, N tokens, C channels of a token, P patches, D width, H x W pixels.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from .codec_chunk_tokcom import TokComCodec, TokComCodecLoss, TokComCodecOutput
from .configuration_media_tokcom import TokComStyleCodecConfig
from .layers_tokcom import TokComRMSNorm, attention_backend, eager_attention_forward
from .quantization_tokcom import VectorQuantizer, count_statistics, kmeans, nearest_codes

COLORS = 3
KMEANS_ROWS = 65536  # tokens of a step of k-means
GRADIENT_SCALES = 3  # sizes at which the gradient loss compares images, each half the one before


@dataclass
class TokComImageOutput(ModelOutput):
    """What an image codec's `decode` returns: `pixel_values (B, 3, H, W)`, -1 black and 1 white."""

    pixel_values: torch.FloatTensor | None = None


class TokComStyleAttention(nn.Module):
    """Multi-head self-attention without mask and positions, as in ViT."""

    num_key_value_groups = 1  # each head has keys and values of its own
    is_causal = False

    def __init__(self, config: TokComStyleCodecConfig, width: int, heads: int):
        super().__init__()
        self.config = config
        self.heads = heads
        self.scaling = (width // heads) ** -0.5
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, S, D)` in and out."""
        heads = self.qkv_proj(hidden_states).unflatten(-1, (3, self.heads, -1))
        heads = heads.permute(2, 0, 3, 1, 4)  # (3, B, heads, S, head_dim)
        implementation = attention_backend(self.config._attn_implementation, heads.device)
        if implementation == "sdpa" and heads.device.type == "cpu":
            implementation = "sdpa_float32"  # in bfloat16 the backward pass is six times as slow
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, _ = attend(self, *heads, None, dropout=0.0, scaling=self.scaling, is_causal=False)
        return self.o_proj(output.flatten(2))


class TokComStyleMLP(nn.Sequential):
    """GELU feed-forward layer, as in ViT."""

    def __init__(self, width: int, inner: int):
        super().__init__(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


class TokComSlotMLP(nn.Module):
    """A GELU feed-forward network for each of N places, computed as one grouped product."""

    def __init__(self, places: int, width: int, inner: int):
        super().__init__()
        self.up = nn.Parameter(torch.empty(places, width, inner))
        self.up_bias = nn.Parameter(torch.zeros(places, 1, inner))
        self.down = nn.Parameter(torch.empty(places, inner, width))
        self.down_bias = nn.Parameter(torch.zeros(places, 1, width))

    def initialize_parameters(self) -> None:
        for weight, bias in ((self.up, self.up_bias), (self.down, self.down_bias)):
            init.normal_(weight, std=0.5 * weight.shape[1] ** -0.5)
            init.zeros_(bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, N, D)` in and out."""
        inputs = hidden_states.transpose(0, 1)  # (N, B, D)
        inner = F.gelu(torch.baddbmm(self.up_bias, inputs, self.up))  # (N, B, inner)
        return torch.baddbmm(self.down_bias, inner, self.down).transpose(0, 1)


class TokComStyleBlock(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward layer.

    With `experts`, the last N places have feed-forward networks of their own.
    """

    def __init__(
        self,
        config: TokComStyleCodecConfig,
        width: int,
        heads: int,
        inner: int,
        experts: TokComSlotMLP | None = None,
    ):
        super().__init__()
        self.attention_norm = TokComRMSNorm(width, config.rms_norm_eps)
        self.mlp_norm = TokComRMSNorm(width, config.rms_norm_eps)
        self.self_attn = TokComStyleAttention(config, width, heads)
        self.mlp = TokComStyleMLP(width, inner)
        self.experts = experts

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, S, D)` in and out."""
        hidden_states = hidden_states + self.self_attn(self.attention_norm(hidden_states))
        inputs = self.mlp_norm(hidden_states)
        if self.experts is None:
            return hidden_states + self.mlp(inputs)
        shared = inputs.shape[1] - len(self.experts.up)  # positions without an expert
        # patches share a network; each token has one, since tokens mean different things
        update = torch.cat((self.mlp(inputs[:, :shared]), self.experts(inputs[:, shared:])), dim=1)
        return hidden_states + update


class TokComStyledBlock(GradientCheckpointingLayer):
    """A decoder layer that two tokens style and join.

    The first token scales and shifts the input of attention, the second that of the feed-forward
    half.
    """

    def __init__(self, config: TokComStyleCodecConfig, width: int, heads: int, inner: int):
        super().__init__()
        channels = config.latent_channels
        self.attention_norm = TokComRMSNorm(width, config.rms_norm_eps)
        self.mlp_norm = TokComRMSNorm(width, config.rms_norm_eps)
        self.self_attn = TokComStyleAttention(config, width, heads)
        self.mlp = TokComStyleMLP(width, inner)
        self.attention_style = nn.Linear(channels, 2 * width)  # scale and shift
        self.mlp_style = nn.Linear(channels, 2 * width)
        self.registers = nn.ModuleList(nn.Linear(channels, width) for _ in range(2))

    def forward(self, hidden_states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """`hidden_states (B, S, D)` and two `tokens (B, 2, C)` -> `(B, S + 2, D)`, tokens first."""
        first, second = tokens.unbind(1)
        # adaptive normalisation, as in StyleGAN, with a token in place of a style
        scale, shift = self.attention_style(first)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        normed = self.attention_norm(hidden_states) * (1 + scale) + shift
        joining = torch.stack((self.registers[0](first), self.registers[1](second)), dim=1)
        update = self.self_attn(torch.cat((self.attention_norm(joining), normed), dim=1))
        # the two tokens enter the residual stream at 0 and become what attention makes of them
        hidden_states = F.pad(hidden_states, (0, 0, 2, 0)) + update
        scale, shift = self.mlp_style(second)[:, None].chunk(2, dim=-1)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states) * (1 + scale) + shift)


class TokComStyleEncoder(nn.Module):
    """ViT whose last N positions are learned queries: patches `(B, P, D)` -> `(B, N, D)`."""

    def __init__(self, config: TokComStyleCodecConfig):
        super().__init__()
        width = config.hidden_size
        heads = config.num_attention_heads
        self.num_tokens = config.num_tokens
        # a linear map of each patch
        self.patch_embedding = nn.Conv2d(COLORS, width, config.patch_size, config.patch_size)
        length = 1 + config.num_patches + config.num_tokens  # class position, patches, queries
        self.positions = nn.Parameter(torch.empty(1, length, width))
        self.layers = nn.ModuleList()
        for i in range(config.num_hidden_layers + config.num_expert_layers):
            experts = None
            if i >= config.num_hidden_layers:
                experts = TokComSlotMLP(config.num_tokens, width, config.expert_intermediate_size)
            self.layers.append(
                TokComStyleBlock(config, width, heads, config.intermediate_size, experts)
            )
        self.norm = TokComRMSNorm(width, config.rms_norm_eps)

    def initialize_parameters(self) -> None:
        # as large as a patch: with small positions all queries would see the same
        init.normal_(self.positions, std=1.0)

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` -> patches `(B, P, D)`."""
        return self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        # patches and queries share one sequence; queries begin as their position alone
        hidden_states = self.positions + F.pad(patches, (0, 0, 1, self.num_tokens))
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.norm(hidden_states[:, -self.num_tokens :])  # the queries


class TokComLinearPath(nn.Linear):
    """A linear map beside the network, from all patches to all tokens or back.

    Attention shares one value map over all places and must learn where to look. A linear codec such
    as PCA has its own weight for every pair of place and token.
    """

    def __init__(self, inputs: tuple[int, int], outputs: tuple[int, int]):
        super().__init__(inputs[0] * inputs[1], outputs[0] * outputs[1])
        self.outputs = outputs

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, *inputs)` -> `(B, *outputs)`."""
        return super().forward(hidden_states.flatten(1)).unflatten(1, self.outputs)


class TokComStyleDecoder(nn.Module):
    """Learned positions that the tokens style layer by layer.

    Tokens `(B, N, C)` -> `pixel_values (B, 3, H, W)`.
    """

    def __init__(self, config: TokComStyleCodecConfig):
        super().__init__()
        width = config.decoder_hidden_size
        heads = config.decoder_num_attention_heads
        inner = config.decoder_intermediate_size
        self.num_patches = config.num_patches
        self.shape = COLORS, config.patch_size, config.image_size // config.patch_size
        self.positions = nn.Parameter(torch.empty(1, config.num_patches, width))
        self.styled_layers = nn.ModuleList(
            TokComStyledBlock(config, width, heads, inner) for _ in range(config.num_styled_layers)
        )
        self.layers = nn.ModuleList(
            TokComStyleBlock(config, width, heads, inner) for _ in range(config.num_decoder_layers)
        )
        self.norm = TokComRMSNorm(width, config.rms_norm_eps)
        self.linear_path = None
        if config.linear_path:
            tokens = config.num_tokens, config.latent_channels
            self.linear_path = TokComLinearPath(tokens, (config.num_patches, width))
        self.proj_out = nn.Linear(width, COLORS * config.patch_size**2)

    def initialize_parameters(self) -> None:
        init.normal_(self.positions, std=1.0)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden_states = self.positions.expand(len(tokens), -1, -1)  # (B, P, D)
        for i, layer in enumerate(self.styled_layers):
            # coarse to fine: early layers see the first tokens, which survive tail dropout
            hidden_states = layer(hidden_states, tokens[:, 2 * i : 2 * i + 2])
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        # tokens join in front, layer by layer, so the patches are last
        patches = self.norm(hidden_states[:, -self.num_patches :])
        if self.linear_path is not None:
            patches = patches + self.linear_path(tokens)
        patches = self.proj_out(patches)  # (B, P, 3 * size^2)
        channels, size, side = self.shape
        grid = patches.unflatten(2, (channels, size, size))  # (B, P, 3, y, x)
        grid = grid.unflatten(1, (side, side))  # (B, row, column, 3, y, x)
        return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class TokComSoftCodebook(nn.Module):
    """Soft cosine codebook: maps `(..., C)` to a mixture of C learned directions, weighted by its
    cosines to them.

    The published weights, `cosine + 1`, are almost equal for every input, so all outputs start out
    the same (mean pairwise cosine 0.988). Here their mean is subtracted.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.directions = nn.Parameter(torch.empty(channels, channels))
        self.norm = nn.LayerNorm(channels)

    def initialize_parameters(self) -> None:
        init.normal_(self.directions)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        # in float32: small differences remain when the mean is subtracted
        with torch.autocast(inputs.device.type, enabled=False):
            directions = self.directions.float()
            # cosines of the inputs to all directions
            weights = F.normalize(inputs.float(), dim=-1) @ F.normalize(directions, dim=-1).T
            mixed = (weights - weights.mean(-1, keepdim=True)) @ directions  # (..., C)
            return F.layer_norm(
                mixed, mixed.shape[-1:], self.norm.weight.float(), self.norm.bias.float()
            )


@dataclass
class TokComStyleCodecLoss(TokComCodecLoss):
    """Settings of `TokComStyleCodec.training_loss`.

    Args:
        kl_weight: weight of the KL term of a Gaussian bottleneck.
        bottleneck_noise: length of the noise on a spherical bottleneck, relative to the tokens.
        tail_dropout: share of the images of which only the first k tokens are kept, k uniform in
            1..N.
        gradient_weight: of the error of image gradients on several scales, beside the squared
            error.
    """

    kl_weight: float = 1e-4
    bottleneck_noise: float = 0.1
    tail_dropout: float = 0.5
    gradient_weight: float = 0.2


class TokComStyleCodec(TokComCodec):
    """Autoencoder of images whose N tokens are ordered from coarse to fine.

    Latents are the outputs of the bottleneck, standardised per token and channel with the buffers
    `latent_mean` and `latent_std`. After `fit_codebook`, `encode` also returns `codes`.
    """

    config: TokComStyleCodecConfig
    loss_class = TokComStyleCodecLoss
    main_input_name = "pixel_values"

    def __init__(self, config: TokComStyleCodecConfig):
        super().__init__(config)
        count = config.num_tokens
        channels = config.latent_channels
        self.encoder = TokComStyleEncoder(config)
        self.decoder = TokComStyleDecoder(config)
        outputs = channels
        if config.bottleneck == "gaussian":
            outputs = 2 * channels  # mean and log-variance
        self.to_tokens = nn.Linear(config.hidden_size, outputs)
        self.linear_path = None
        if config.linear_path:
            patches = config.num_patches, config.hidden_size
            self.linear_path = TokComLinearPath(patches, (count, channels))
        self.soft_codebook = TokComSoftCodebook(channels) if config.bottleneck == "cosine" else None
        self.missing = nn.Parameter(torch.empty(count, channels))  # replaces dropped tokens
        self.quantizer = VectorQuantizer(config.num_codes, channels) if config.num_codes else None
        self.latent_mean = nn.Buffer(torch.zeros(count, channels))
        self.latent_std = nn.Buffer(torch.ones(count, channels))
        self.set_loss()
        # set by training: a distance of two images besides the squared error
        self.feature_loss = None
        self.gradient_checkpointing = False
        self.post_init()

    def initialize_parameters(self) -> None:
        init.zeros_(self.missing)
        init.zeros_(self.latent_mean)
        init.ones_(self.latent_std)

    def get_input_embeddings(self):
        return None

    def set_latent_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Store mean and standard deviation `(N, C)` of raw latents, measured on training data."""
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std.clamp_min(1e-4))  # a dead channel must not be divided by 0

    def positions(self, index: torch.Tensor) -> torch.Tensor:
        """Index of tokens `(...)` -> position `(..., 1)`."""
        return index[..., None]

    def _check(self, pixel_values: torch.Tensor) -> None:
        size = self.config.image_size
        if pixel_values.shape[1:] != (COLORS, size, size):
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)} but (B, {COLORS}, {size}, "
                f"{size}) is needed; use the image processor saved beside the model."
            )

    def _raw_tokens(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images -> raw latents and their log-variance `(B, N, C)`; no log-variance without a
        posterior."""
        patches = self.encoder.embed(pixel_values.to(self.dtype))
        outputs = self.to_tokens(self.encoder(patches)).float()
        tokens, *rest = outputs.split(self.config.latent_channels, dim=-1)
        if self.linear_path is not None:
            tokens = tokens + self.linear_path(patches).float()
        if self.config.bottleneck == "gaussian":
            return tokens, rest[0].clamp(-12.0, 4.0)  # keeps exp finite
        if self.config.bottleneck == "sphere":
            # of length sqrt(C), so that channels have about unit variance
            return F.normalize(tokens, dim=-1) * tokens.shape[-1] ** 0.5, None
        return self.soft_codebook(tokens), None

    def encode(
        self, pixel_values: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> TokComCodecOutput:
        """Images `(B, 3, H, W)`, -1 for black and 1 for white -> standardised latents `(B, N, C)`.

        With a codebook the output also has `codes (B, N, 1)`. Raises `ValueError` for another image
        size.
        """
        self._check(pixel_values)
        latents = (self._raw_tokens(pixel_values)[0] - self.latent_mean) / self.latent_std
        fitted = self.quantizer is not None and self.quantizer.is_fitted
        return self.known(latents, codes=self.to_codes(latents) if fitted else None)

    def _unstandardize(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.to(self.latent_std) * self.latent_std + self.latent_mean

    def to_codes(self, latents: torch.Tensor) -> torch.Tensor:
        """Standardised latents `(B, N, C)` -> the nearest codes `(B, N, 1)`.

        Raises `ValueError` without a codebook.
        """
        codes = nearest_codes(self._unstandardize(latents).flatten(0, 1), self._fitted().codebook)
        return codes.view(*latents.shape[:2], 1)

    def from_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(B, N, 1)` -> standardised latents `(B, N, C)`.

        Raises `ValueError` without a codebook.
        """
        return (self._fitted().decode(codes) - self.latent_mean) / self.latent_std

    def _fitted(self) -> VectorQuantizer:
        if self.quantizer is None or not self.quantizer.is_fitted:
            raise ValueError("this codec has no codebook yet; make one with `tokcom kmeans`.")
        return self.quantizer

    def _decode(self, tokens: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        if kept is not None:  # dropped tokens become a learned value, not 0
            tokens = torch.where(kept[..., None], tokens, self.missing.to(tokens))
        return self.decoder(tokens.to(self.dtype))

    def decode(self, latents: torch.Tensor, num_tokens: int | None = None) -> TokComImageOutput:
        """Standardised latents `(B, N, C)` -> `.pixel_values (B, 3, H, W)`.

        With `num_tokens`, only the first tokens are used. Raises `ValueError` if it is out of
        range.
        """
        kept = None
        count = self.config.num_tokens
        if num_tokens is not None:
            if not 0 <= num_tokens <= count:
                raise ValueError(f"`num_tokens` ({num_tokens}) must be between 0 and {count}.")
            kept = torch.arange(count, device=latents.device) < num_tokens
            kept = kept.expand(len(latents), -1)  # (B, N)
        tokens = self._unstandardize(latents)
        return TokComImageOutput(pixel_values=self._decode(tokens, kept).clamp(-1, 1))

    @torch.no_grad()
    def fit_codebook(
        self,
        latents: torch.Tensor | Iterable[torch.Tensor],
        num_codes: int,
        metric: str = "euclidean",
        iterations: int = 20,
        seed: int = 0,
    ) -> dict[str, float]:
        """Fit a codebook to the tokens of pictures with `latents (M, N, C)`, by k-means.

        For more pictures than fit into memory, `latents` is a list or another re-iterable of parts
        of them, which is read `iterations` + 3 times.

        Returns: `code_statistics` of these pictures, and `distortion`, the squared error of the
            codes over the variance of the tokens.
        """
        if isinstance(latents, torch.Tensor):
            latents = latents.split(KMEANS_ROWS // latents.shape[1])
        tokens = _Tokens(self, latents)
        codebook = kmeans(tokens, num_codes, iterations, metric, seed=seed)
        if metric == "cosine":  # centres have length 1: give each the mean length of its tokens
            codebook = codebook * _mean_lengths(tokens, codebook)[:, None]
        counts = codebook.new_zeros(num_codes, dtype=torch.double)
        sums = codebook.new_zeros(2, codebook.shape[1], dtype=torch.double)  # of x, and of x^2
        error = 0.0
        for part in tokens:
            codes = nearest_codes(part, codebook)
            counts += codes.bincount(minlength=num_codes)
            error += (part - codebook[codes]).double().square().sum().item()
            sums += torch.stack((part.double().sum(0), part.double().square().sum(0)))
        # in double: the variance is a difference of large sums
        mean, square = sums / counts.sum()
        variance = (square - mean**2).sum().item()
        # counts and sums are those of one pass over the data, as if the codebook had been trained
        self.config.num_codes = num_codes
        self.quantizer = VectorQuantizer(num_codes, codebook.shape[1]).to(codebook.device)
        self.quantizer.codebook.copy_(codebook)
        self.quantizer.counts.copy_(counts)
        self.quantizer.sums.copy_(codebook * counts.float()[:, None])
        distortion = error / counts.sum().item() / variance
        return count_statistics(counts, num_codes) | {"distortion": distortion}

    def training_loss(self, pixel_values: torch.Tensor, attention_mask: torch.Tensor | None = None):
        """Loss of the codec stage on images `(B, 3, H, W)`, and its parts: squared error and KL per
        token."""
        config = self.config
        settings = self.loss_settings
        self._check(pixel_values)
        tokens, log_variance = self._raw_tokens(pixel_values)
        kl = tokens.new_zeros(())
        if log_variance is not None:
            # of N(mean, variance) against N(0, 1), summed over the channels of a token
            kl = 0.5 * (tokens.square() + log_variance.exp() - 1 - log_variance).sum(-1).mean()
        kept = None
        if self.training:
            if log_variance is not None:
                tokens = tokens + torch.randn_like(tokens) * (0.5 * log_variance).exp()
            elif config.bottleneck == "sphere":
                # noise keeps neighbours on the sphere alike, as the posterior does elsewhere
                tokens = tokens + torch.randn_like(tokens) * settings.bottleneck_noise
            draws = torch.rand(2, len(tokens), 1, device=tokens.device)  # whether and where to cut
            cut = 1 + (draws[1] * config.num_tokens).long()  # 1..N
            is_cut = draws[0] < settings.tail_dropout
            count = torch.where(is_cut, cut, config.num_tokens)  # (B, 1)
            # what the first k tokens hold must be a picture of its own: that is their order
            kept = torch.arange(config.num_tokens, device=tokens.device) < count  # (B, N)
        output = self._decode(tokens, kept).float()
        error = F.mse_loss(output, pixel_values.float())
        loss = error + settings.kl_weight * kl
        if settings.gradient_weight:
            loss = loss + settings.gradient_weight * gradient_loss(output, pixel_values.float())
        if self.feature_loss is not None:
            loss = loss + self.feature_loss(output, pixel_values.float())
        return loss, {"mse_loss": error.detach(), "kl_loss": kl.detach()}


class _Tokens:
    """Parts of standardised latents `(M, N, C)` as raw tokens `(M N, C)`; can be read again and
    again."""

    def __init__(self, codec: TokComStyleCodec, latents: Iterable[torch.Tensor]):
        self.codec = codec
        self.latents = latents

    def __iter__(self) -> Iterator[torch.Tensor]:
        for part in self.latents:
            yield self.codec._unstandardize(part).flatten(0, 1)


def _mean_lengths(tokens: Iterable[torch.Tensor], centres: torch.Tensor) -> torch.Tensor:
    """The mean length `(S,)` of the tokens whose direction is nearest to each of `centres (S,
    C)`."""
    lengths = centres.new_zeros(len(centres))
    used = centres.new_zeros(len(centres))
    for part in tokens:
        codes = nearest_codes(F.normalize(part, dim=-1), centres)
        lengths.index_add_(0, codes, part.norm(dim=-1))
        used += codes.bincount(minlength=len(centres))
    return lengths / used.clamp_min(1)


def gradient_loss(
    output: torch.Tensor, target: torch.Tensor, scales: int = GRADIENT_SCALES
) -> torch.Tensor:
    """Mean absolute error of horizontal and vertical differences of images `(B, 3, H, W)`.

    Averages over `scales` sizes, each half the one before. It penalises blurred edges, which the
    squared error hardly does, but is not a perceptual distance such as LPIPS.
    """
    # differences are linear, so those of the error are compared at once
    difference = output - target
    total = 0.0
    for scale in range(scales):
        if scale:
            difference = F.avg_pool2d(difference, 2)
        if min(difference.shape[-2:]) < 2:  # nothing is left to compare
            break
        horizontal = difference.diff(dim=-1).abs().mean()
        vertical = difference.diff(dim=-2).abs().mean()
        # every size counts alike
        total = total + (horizontal + vertical) / scales
    return total


__all__ = ["TokComStyleCodec", "TokComImageOutput", "gradient_loss"]
