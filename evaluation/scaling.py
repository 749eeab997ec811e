"""Compute the cost of training at any size and number of processes: parameters, operations, memory
and traffic.

    python -m tokcom.evaluation.scaling --preset base
    python -m tokcom.evaluation.scaling --preset 1b --ranks 8 64 512 --tokens 100e9

Operations and saved activations are linear in layers, so they are counted on one and two layers of
the real model and extrapolated. Weights, gradients and optimizer state follow from the number of
parameters. `--peak` and `--utilization` turn operations into time.
"""

import argparse
from typing import Any

import torch

from tokcom.cli.errors import report_errors
from tokcom.configuration_tokcom import TokComConfig
from tokcom.evaluation.flops import training_flops_per_token
from tokcom.evaluation.report import table
from tokcom.modeling_tokcom import TokComModel
from tokcom.training.presets import preset_config, preset_names, preset_objective

# `base` grown to a billion parameters in the transformer
ONE_B = {
    "codec_config": {
        "latent_channels": 256,
        "embedding_size": 512,
        "hidden_size": 1024,
        "intermediate_size": 3072,
    },
    "transformer_config": {
        "latent_channels": 256,
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 19,
        "num_context_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 512,
        "conditioning_size": 512,
    },
    "token_embedding_size": 512,
}
# bytes per trained parameter, float32
WEIGHTS = 4
GRADIENTS = 4
MOMENTS = 8  # AdamW keeps two
AVERAGE = 4
GIB = 2**30
COUNTED_WINDOWS = 4


def scaled_config(preset: str, vocab_size: int | None) -> TokComConfig:
    """The configuration of a preset, or of `1b`, in the flow stage."""
    name, overrides = ("base", ONE_B) if preset == "1b" else (preset, {})
    return preset_config(name, vocab_size, **overrides)


def saved_bytes(model: TokComModel, ids: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights excluded."""
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # by storage, since several views of one tensor are kept once
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(1)  # the same draws for all depths, whose differences count
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids).loss
    # while the loss is alive, before its graph gives the memory back
    total = sum(kept.values())
    del loss
    return total


def count(config: TokComConfig, length: int, objective: dict[str, Any]) -> dict[str, float]:
    """Training operations, saved bytes, and saved bytes with activation checkpointing, per token of
    a window."""
    layers = config.transformer_config.num_hidden_layers
    context = config.transformer_config.num_context_layers
    fields = config.to_dict()
    shapes = [(1 + bool(context), int(bool(context)))]  # (all layers, context layers)
    # one denoising layer more, whose difference is the cost of a denoising layer
    shapes.append((shapes[0][0] + 1, shapes[0][1]))
    if context:
        # one context layer more
        shapes.append((shapes[0][0] + 1, shapes[0][1] + 1))
    torch.manual_seed(0)
    # all but the last id, which is padding; several rows, since what a row passes is drawn
    ids = torch.randint(0, config.codec_config.vocab_size - 1, (COUNTED_WINDOWS, length))
    found = []
    for number, of_context in shapes:
        small = {"num_hidden_layers": number, "num_context_layers": of_context}
        one = TokComConfig.from_dict(
            {**fields, "transformer_config": {**fields["transformer_config"], **small}}
        )
        model = TokComModel(one).train()
        model.set_stage("flow", **objective)
        row = {
            "flops": training_flops_per_token(model, ids),
            "saved": saved_bytes(model, ids) / ids.numel(),
        }
        model.gradient_checkpointing_enable()
        row["checkpointed"] = saved_bytes(model, ids) / ids.numel()
        found.append(row)
    # layers that the smallest model lacks: denoising layers and context layers
    more_denoising = layers - context - (shapes[0][0] - shapes[0][1])
    more_context = context - shapes[0][1]
    total = {}
    for key in found[0]:
        # without context layers their slope is the 0 that is added
        slopes = [row[key] - found[0][key] for row in found[1:]] + [0.0]
        total[key] = found[0][key] + more_denoising * slopes[0] + more_context * slopes[1]
    return total


def parameters(config: TokComConfig) -> tuple[int, int]:
    """Trained and frozen parameters of the flow stage."""
    with torch.device("meta"):
        model = TokComModel(config)
    model.set_stage("flow")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters()) - trained


def memory(
    trained: int, frozen: int, saved: float, ranks: int, sharded: bool, average: bool
) -> float:
    """Bytes of one process: weights, gradients, Adam's moments, moving average, and `saved`
    activations."""
    share = ranks if sharded else 1
    per_parameter = WEIGHTS + GRADIENTS + MOMENTS + AVERAGE * average
    fixed = trained * per_parameter / share + WEIGHTS * frozen / share
    return fixed + saved


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="base", choices=[*preset_names(), "1b"])
    parser.add_argument("--vocab_size", type=int, help="of the tokenizer; by default the preset's")
    parser.add_argument(
        "--length", type=int, help="tokens of a window; by default as many as the model sees"
    )
    parser.add_argument(
        "--counted_length", type=int, default=256, help="tokens of the windows that are counted"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="windows per process and step")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64, 512, 1000])
    parser.add_argument("--tokens", type=float, default=1e10, help="tokens of the whole training")
    parser.add_argument(
        "--peak",
        type=float,
        default=989e12,
        help="operations per second of one device (H100, bfloat16)",
    )
    parser.add_argument(
        "--utilization", type=float, default=0.4, help="share of the peak that is reached"
    )
    parser.add_argument(
        "--no_average", action="store_true", help="without the moving average of the weights"
    )
    return parser


@report_errors()
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    config = scaled_config(args.preset, args.vocab_size)
    window = config.transformer_config.max_position_embeddings * config.codec_config.chunk_size
    length = args.length or window
    # each noise draw passes the head once more
    objective = preset_objective("base" if args.preset == "1b" else args.preset)
    counted = count(config, min(args.counted_length, args.length or window), objective)
    trained, frozen = parameters(config)
    print(
        f"{trained:,} trained and {frozen:,} frozen parameters; "
        f"{counted['flops'] / 1e6:.1f} MFLOP per token and step;"
    )
    kib = (counted["saved"] / 1024, counted["checkpointed"] / 1024)
    print(
        f"{kib[0]:.1f} KiB of activations per token in float32, "
        f"{kib[1]:.1f} with activation checkpointing\n"
    )
    rows = []
    for ranks in args.ranks:
        tokens = args.batch_size * length
        # of one process, which all work at the same time
        seconds = tokens * counted["flops"] / (args.peak * args.utilization)
        saved = [tokens * counted[key] for key in ("saved", "checkpointed")]
        sizes = [
            memory(trained, frozen, saved[0], ranks, False, not args.no_average),
            memory(trained, frozen, saved[0], ranks, True, not args.no_average),
            memory(trained, frozen, saved[1], ranks, True, not args.no_average),
        ]
        # a ring all-reduce sends every gradient about twice
        traffic = 0 if ranks == 1 else 2 * GRADIENTS * trained * (ranks - 1) / ranks
        rows.append(
            [
                ranks,
                ranks * tokens,
                *(f"{size / GIB:.1f}" for size in sizes),
                f"{traffic / GIB:.2f}",
                f"{seconds:.3f}",
            ]
            + [
                # the bandwidth at which sending takes as long as computing
                f"{traffic / seconds / 1e9:.1f}",
                f"{args.tokens / (ranks * tokens) * seconds / 3600:.1f}",
            ]
        )
    head = [
        "processes",
        "tokens per step",
        "GiB, DDP",
        "GiB, FSDP2",
        "GiB, FSDP2 + checkpointing",
        "GiB sent per step",
    ]
    print(
        table([*head, "s per step", "GB/s to hide it", f"hours for {args.tokens:.0e} tokens"], rows)
    )


if __name__ == "__main__":
    main()
