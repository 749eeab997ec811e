"""Measure training, sampling and attention on one device, for `scripts/gpu_check.sh`.

    python scripts/gpu_measure.py training --preset tiny --batch_size 64 --output_file training.json
    python scripts/gpu_measure.py sampling --batch_sizes 1 32 256 --compile --output_file s.json
    python scripts/gpu_measure.py attention --output_file attention.json

Weights and ids are random: speed does not depend on them. `training` gives tokens per second, the
share of the matrix product's speed that was measured just before, and the peak of memory.
`sampling` stands beside a Llama of as many parameters with its key/value cache. `attention`
compares every implementation with PyTorch's in float32. What a machine cannot do is noted, not left
out.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from transformers.utils import is_flash_attn_2_available

from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option
from tokcom.evaluation import benchmark
from tokcom.evaluation.flops import count_flops
from tokcom.evaluation.generators import llama_generator, tokcom_generator
from tokcom.modeling_tokcom import TokComModel
from tokcom.training.optimizer import build_optimizer
from tokcom.training.precision import half_precision, has_fast_bfloat16
from tokcom.training.presets import preset_config, preset_objective

MIB = 2**20


def build(preset: str, vocab_size: int, device: str, **transformer) -> TokComModel:
    """A seeded model of a text preset that is set to train its flow."""
    torch.manual_seed(0)
    config = preset_config(preset, vocab_size, transformer_config=transformer)
    model = TokComModel(config).to(device).train()
    model.set_stage("flow", **preset_objective(preset))
    return model


def measure_training(args: argparse.Namespace) -> dict:
    """Steps of the flow stage in bfloat16 where it is fast: forward, backward and optimizer."""
    model = build(args.preset, args.vocab_size, args.device)
    # the rates of preset `tiny`; they do not change the time of a step
    optimizer = build_optimizer(model, 3e-3, 1.2e-2, 0.01, torch.device(args.device))
    if args.compile:
        for part in model.compilable_parts():
            part.compile()
    ids = torch.randint(0, args.vocab_size, (args.batch_size, args.tokens), device=args.device)

    def step() -> None:
        with half_precision(args.device):
            loss = model(input_ids=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    # measured in the same minute, since clocks depend on heat
    peak = benchmark.matmul_peak(
        torch.bfloat16 if has_fast_bfloat16(args.device) else torch.float32
    )
    operations = count_flops(step)  # also the first warm-up
    step()
    if benchmark.is_cuda(args.device):
        # counting operations and the first steps need more than a step does
        torch.cuda.reset_peak_memory_stats(args.device)
    seconds = statistics.median(benchmark.seconds_of(step) for _ in range(args.rounds))
    return {
        "preset": args.preset,
        "compiled": args.compile,
        "rows x tokens": f"{args.batch_size} x {args.tokens}",
        "seconds per step": seconds,
        "tokens per second": args.batch_size * args.tokens / seconds,
        "operations per second": operations / seconds,
        "matrix product, operations per second": peak,
        # model FLOPs utilisation against what the device can do, not against its data sheet
        "share of it": operations / seconds / peak,
        "peak MiB": benchmark.peak_mib(),
    }


def measure_sampling(args: argparse.Namespace) -> dict:
    """Milliseconds per token of TokCom and of Llama, by batch size, without and with compiling."""
    size = args.vocab_size
    rows = []
    for compiled in (False, True) if args.compile else (False,):
        ours = tokcom_generator(args.preset, args.device, compiled, vocab_size=size)
        peer = llama_generator(args.preset, ours.parameters, size, args.device, compiled)
        for batch in args.batch_sizes:
            row = {"batch": batch, "compiled": compiled}
            for name, generate in {"TokCom": ours, "Llama": peer}.items():
                try:
                    generate(batch, args.tokens, None)  # warm-up
                    times = [
                        benchmark.seconds_of(generate, batch, args.tokens, None)
                        for _ in range(args.rounds)
                    ]
                    row[f"{name}, ms per token"] = (
                        1000 * statistics.median(times) / (batch * args.tokens)
                    )
                except Exception as error:  # one that fails must not hide the other
                    row[f"{name}, ms per token"] = f"{type(error).__name__}: {error}"[:200]
            rows.append(row)
    return {"preset": args.preset, "tokens": args.tokens, "rows": rows}


def measure_attention(args: argparse.Namespace) -> dict:
    """Loss, gradient and seconds of every attention, beside float32 with `sdpa`."""
    ids = torch.randint(0, args.vocab_size, (args.batch_size, args.tokens), device=args.device)
    names = ["sdpa", "eager", "flex_attention", "flash_attention_2"]
    rows = []
    expected = None
    for name in ["reference", *names]:
        row: dict = {"attention": name}
        rows.append(row)
        if name == "flash_attention_2" and not is_flash_attn_2_available():
            row["not run"] = "flash_attn is not installed, or the device has no kernel of it"
            continue
        try:
            model = build(args.preset, args.vocab_size, args.device).eval()
            model.requires_grad_(True)
            model.set_attn_implementation("sdpa" if name == "reference" else name)
            half = name != "reference"

            def step(model=model, half=half) -> torch.Tensor:
                # the same noise in every implementation, so that losses can be compared
                torch.manual_seed(0)
                with torch.autocast(args.device, torch.bfloat16, enabled=half):
                    # a fixed time, so that the noise alone is drawn
                    loss = model(input_ids=ids, timestep=0.0).loss
                loss.backward()
                return loss

            loss = float(step().detach())
            norm = float(
                torch.nn.utils.get_total_norm(
                    p.grad for p in model.parameters() if p.grad is not None
                )
            )
            if expected is None:
                # the reference comes first
                expected = loss, norm
            row["seconds"] = statistics.median(
                benchmark.seconds_of(step) for _ in range(args.rounds)
            )
            row["loss, relative error"] = abs(loss - expected[0]) / abs(expected[0])
            row["gradient norm, relative error"] = abs(norm - expected[1]) / expected[1]
        except Exception as error:  # which attentions work is what is measured
            row["not run"] = f"{type(error).__name__}: {error}"[:300]
    return {"preset": args.preset, "rows": rows}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["training", "sampling", "attention"])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    add_device_option(parser)
    parser.add_argument("--output_file", type=Path, required=True)
    return parser


@report_errors()
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    # its functions read the module's variable
    benchmark.DEVICE = args.device
    measure = {
        "training": measure_training,
        "sampling": measure_sampling,
        "attention": measure_attention,
    }[args.what]
    began = time.perf_counter()
    facts = measure(args)
    machine = platform.machine()
    if benchmark.is_cuda(args.device):
        machine = torch.cuda.get_device_name(args.device)
    facts["machine"] = f"{machine}, torch {torch.__version__}"
    facts["date"] = time.strftime("%Y-%m-%d")
    facts["took"] = round(time.perf_counter() - began, 1)
    args.output_file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
