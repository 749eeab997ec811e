"""Predict operations and memory of a training step of a clip model without running it at full size.

    python -m tokcom.evaluation.memory --presets video-tiny video-small video-medium video-large

Activations are what autograd keeps for the backward pass. They are measured on clips and depths
that fit this machine, and extrapolated. With attention kernels that keep no attention matrix they
are linear in latents and in layers; `tests/test_video.py` checks this at another size. Weights,
gradients and AdamW's two averages take 16 bytes per parameter in float32.
"""

import argparse
import dataclasses
import resource
import time
from copy import deepcopy
from dataclasses import dataclass

import torch

from tokcom.cli.errors import report_errors
from tokcom.configuration_tokcom import TokComConfig
from tokcom.evaluation.report import table
from tokcom.modeling_tokcom import TokComModel
from tokcom.training.presets import preset_config, preset_names

GIB = 2**30
BYTES_PER_PARAMETER = 16  # weight, gradient and two moments in float32


@dataclass
class Cost:
    """Cost of one training step on one clip, in bytes and operations (a multiply-add is two)."""

    parameters: int
    latents: int
    operations: float
    attention_matrix: float  # of one layer in float32, if a kernel kept it
    activations: float
    checkpointed: float  # the same with gradient checkpointing
    weights: float


def resized(config: TokComConfig, layers: int, frames: int, side: int) -> TokComConfig:
    """The configuration with fewer layers, for clips of `frames` moments of `side` x `side`
    patches."""
    fields = deepcopy(config.to_dict())
    codec = fields["codec_config"]
    # moments and patches in frames and pixels
    codec["num_frames"] = frames * codec["frames_per_patch"]
    codec["height"] = codec["width"] = side * codec["patch_size"]
    fields["transformer_config"]["num_hidden_layers"] = layers
    fields["transformer_config"]["max_position_embeddings"] = frames * side**2
    if fields["transformer_config"]["block_size"] is not None:
        # a block is one moment
        fields["transformer_config"]["block_size"] = side**2
    return TokComConfig(**fields)


def saved_bytes(
    config: TokComConfig, checkpointing: bool = False, dtype: torch.dtype | None = None
) -> int:
    """Bytes that autograd keeps for the backward pass of one clip, parameters excluded.

    `dtype` turns on autocast.
    """
    model = TokComModel(config).train()
    model.set_stage("flow")
    if checkpointing:
        model.gradient_checkpointing_enable()
    codec = config.codec_config
    clip = torch.randn(1, codec.num_channels, codec.num_frames, codec.height, codec.width)
    # weights are there anyway and are counted as such
    own = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
    }
    # keep the tensors, not only their addresses: the address of a freed storage is used again
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # by storage: views of one tensor are kept once
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            model(pixel_values=clip)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def activations(
    config: TokComConfig, checkpointing: bool = False, dtype: torch.dtype | None = None
) -> float:
    """`saved_bytes` of a full step, extrapolated from two depths and two lengths."""
    shallow = 2  # layers
    deep = 4
    few = (2, 4)  # moments, and patches along each side
    many = (4, 4)
    found = {
        (layers, size): saved_bytes(resized(config, layers, *size), checkpointing, dtype)
        for layers in (shallow, deep)
        for size in (few, many)
    }
    n1 = few[0] * few[1] ** 2  # latents of the two clips
    n2 = many[0] * many[1] ** 2
    slopes = {}  # bytes per latent at each depth
    for layers in (shallow, deep):
        slopes[layers] = (found[layers, many] - found[layers, few]) / (n2 - n1)
    # bytes per latent and layer
    per_layer = (slopes[deep] - slopes[shallow]) / (deep - shallow)
    total = config.codec_config.num_tokens
    layers = config.transformer_config.num_hidden_layers
    # bytes that do not grow with the latents
    fixed = found[shallow, few] - slopes[shallow] * n1
    fixed_per_layer = (found[deep, few] - slopes[deep] * n1 - fixed) / (deep - shallow)
    at_depth = slopes[shallow] + per_layer * (layers - shallow)
    return fixed + fixed_per_layer * (layers - shallow) + at_depth * total


def operations(config: TokComConfig, parameters: int) -> float:
    """Operations of a training step: three times those of a forward pass.

    A forward pass takes two operations per parameter and latent, and four per channel of each pair
    of latents that attend.
    """
    transformer = config.transformer_config
    codec = config.codec_config
    total = codec.num_tokens
    place = codec.group_size
    moments = total // place
    pairs = [total * total] * transformer.num_hidden_layers
    if transformer.attention_type == "factorized":
        pairs = [
            total * (moments if i % 2 else place) for i in range(transformer.num_hidden_layers)
        ]
    # block-causal training runs over [clean | noisy]
    copies = 1 if transformer.block_size is None else 2
    # scores and weighted sum, a multiply-add for each channel of each pair
    attention = 4 * transformer.hidden_size * sum(pairs) * copies**2
    # a backward pass computes two products for each one of the forward pass
    return 3 * (2 * parameters * total * copies + attention)


def cost(config: TokComConfig, dtype: torch.dtype | None = torch.bfloat16) -> Cost:
    """Cost of a step on a clip of the configured size, with activations under autocast to
    `dtype`."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in TokComModel(config).transformer.parameters())
    total = config.codec_config.num_tokens
    return Cost(
        parameters=parameters,
        latents=total,
        operations=operations(config, parameters),
        # four bytes for each pair of latents and head
        attention_matrix=4.0 * config.transformer_config.num_attention_heads * total**2,
        activations=activations(config, dtype=dtype),
        checkpointed=activations(config, True, dtype),
        weights=float(BYTES_PER_PARAMETER * parameters),
    )


def run_step(config: TokComConfig, dtype: torch.dtype | None = torch.bfloat16) -> dict[str, float]:
    """Take one AdamW step on a clip of noise; returns seconds, and by how many GiB the process
    grew."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    codec = config.codec_config
    model = TokComModel(config).train()
    model.set_stage("flow")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    clip = torch.randn(1, codec.num_channels, codec.num_frames, codec.height, codec.width)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(pixel_values=clip).loss
    loss.backward()
    optimizer.step()
    # ru_maxrss is in KiB on Linux
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / GIB
    return {"loss": loss.item(), "seconds": time.perf_counter() - started, "grown_gib": grown}


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = sorted(name for name in preset_names() if name.startswith("video-"))
    parser.add_argument("--presets", nargs="+", choices=known, default=known)
    parser.add_argument("--run", action="store_true", help="also run one step of the first preset")
    args = parser.parse_args(argv)
    if args.run:
        print(f"one step of {args.presets[0]}:", run_step(preset_config(args.presets[0])))
    rows = []
    for name in args.presets:
        for attention in ("full", "factorized"):
            config = preset_config(name, transformer_config={"attention_type": attention})
            found = dataclasses.asdict(cost(config))
            gib = [
                f"{found[key] / GIB:.2f}"
                for key in ("attention_matrix", "activations", "checkpointed", "weights")
            ]
            millions = f"{found['parameters'] / 1e6:.1f}"
            latents = f"{found['latents']:,}"
            rows.append(
                [name, attention, millions, latents, f"{found['operations'] / 1e12:.3g}", *gib]
            )
    sizes = [
        "attention matrix, GiB",
        "activations, GiB",
        "with checkpointing, GiB",
        "weights and AdamW, GiB",
    ]
    print(table(["preset", "attention", "M parameters", "latents", "TFLOP a clip", *sizes], rows))


if __name__ == "__main__":
    main()
