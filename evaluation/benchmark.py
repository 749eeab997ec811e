"""Measure speed and memory against what a user would otherwise run, as ratios within one run.

    python -m tokcom.evaluation.benchmark training --stage flow codec  # a step, published code
    python -m tokcom.evaluation.benchmark sampling --preset tiny  # ms per token, Llama with cache
    python -m tokcom.evaluation.benchmark length --checkpoint .   # time and memory against length
    python -m tokcom.evaluation.benchmark serving --checkpoint .  # the server, with a Llama, too

`training` and `length` run every system in a process of its own, because peak memory cannot be
reset. Systems take turns, and numbers are medians. Weights are random except for `length`; speed
does not depend on them. With `--output_dir` each command writes `<command>.json`, `<command>.md`
and a plot there.
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option, usable_device
from tokcom.training.precision import has_fast_bfloat16
from tokcom.training.presets import preset_config, preset_objective

CLOCK: Callable[[], float] = time.perf_counter  # or the processor's, with --processor_time
DEVICE = usable_device()
# sides of matrices: which is fastest depends on caches and tiles
PEAK_SIZES = (1024, 2048, 4096)
CACHED = "TokCom, cached latents"
SYSTEMS = {  # of the training benchmark, besides the published code
    "flow": [
        "TokCom",
        CACHED,
        f"{CACHED}, ce_share 0.25",
        f"{CACHED}, ce_share 0.25, checkpointing",
    ],
    "codec": ["TokCom", "TokCom, checkpointing"],
}


def is_cuda(device: str) -> bool:
    """Whether a device is a GPU of CUDA, whatever its number."""
    return torch.device(device).type == "cuda"


def synchronize() -> None:
    if is_cuda(DEVICE):
        torch.cuda.synchronize(DEVICE)


def seconds_of(function: Callable, *arguments) -> float:
    synchronize()
    started = CLOCK()
    function(*arguments)
    # kernels are only queued: without waiting, the time is that of handing them over
    synchronize()
    return CLOCK() - started


def peak_mib() -> float:
    """Peak memory of this process: of the device, or the resident set on the CPU."""
    if is_cuda(DEVICE):
        return torch.cuda.max_memory_allocated(DEVICE) / 2**20
    status = Path("/proc/self/status")
    if status.is_file():  # unlike `ru_maxrss`, not inherited from the process that started this one
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text(encoding="utf-8")).group(1)) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def matmul_peak(dtype: torch.dtype = torch.bfloat16) -> float:
    """Peak operations per second of this machine: the fastest of a few square matrix products."""
    best = 0.0
    for size in PEAK_SIZES:
        left, right = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
        times = [seconds_of(torch.matmul, left, right) for _ in range(4)]
        best = max(best, 2 * size**3 / min(times))  # the fastest: other work only slows down
    return best


# ---- training ----


def build_training(
    system: str, stage: str, args: argparse.Namespace
) -> tuple[Callable[[torch.Tensor], torch.Tensor], list]:
    """A loss function of ids `(B, T)`, and the parameters that it trains.

    The model is preset `v5.2` with `args.layers` layers. `system` is `"TokCom"`, followed by
    options after commas (`"cached latents"`, `"ce_share 0.25"`, `"checkpointing"`), or
    `"published"`.
    """
    from tokcom.evaluation.published import PublishedTokCom
    from tokcom.modeling_tokcom import TokComModel

    name, *options = system.split(", ")
    if name == "TokCom":
        layers = {"num_hidden_layers": args.layers}
        share = [float(option.split()[1]) for option in options if option.startswith("ce_share")]
        config = preset_config(
            "v5.2", args.vocab_size, codec_config=layers, transformer_config=layers
        )
        with torch.device(DEVICE):
            model = TokComModel(config).train()
        objective = preset_objective("v5.2", stage)
        model.set_stage(stage, **objective, **({"ce_share": share[0]} if share else {}))
        if "checkpointing" in options:
            model.gradient_checkpointing_enable()
        known = {}
        if "cached latents" in options:
            shape = (
                args.batch_size,
                args.tokens // config.codec_config.chunk_size,
                config.codec_config.latent_channels,
            )
            # speed does not depend on their values
            known["latents"] = torch.randn(shape, device=DEVICE)
        forward = torch.compile(model) if args.compile else model
        parameters = [p for p in model.parameters() if p.requires_grad]
        return lambda ids: forward(input_ids=ids, **known).loss, parameters
    vocab_size = args.vocab_size + 1  # and the omni token
    with torch.device(DEVICE):
        model = PublishedTokCom.random(896, 4864, args.layers, 14, 2, vocab_size)
    trained = {"codec": model.vae, "flow": model.denoiser}[stage]
    # each tensor once, since embeddings are shared; rotary frequencies are not trained
    parameters = list({id(p): p for n, p in trained.items() if not n.endswith("inv_freq")}.values())
    for parameter in parameters:
        parameter.requires_grad_()
    return (model.codec_loss if stage == "codec" else model.flow_loss), parameters


def measure_training(system: str, stage: str, args: argparse.Namespace) -> dict:
    """Seconds, operations and peak memory of training steps of one system, in this process."""
    from tokcom.evaluation.flops import count_flops

    torch.manual_seed(0)
    loss, parameters = build_training(system, stage, args)
    # TokCom is trained with the fused optimizer, too; the published code is measured without
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=system.startswith("TokCom"))
    ids = torch.randint(0, args.vocab_size, (args.batch_size, args.tokens), device=DEVICE)
    half = has_fast_bfloat16(DEVICE) and not system.endswith("float32")

    def step() -> None:
        with torch.autocast(torch.device(DEVICE).type, torch.bfloat16, enabled=half):
            value = loss(ids)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # warm-up: allocates the optimizer's state
    times = [seconds_of(step) for _ in range(args.steps)]
    facts = {"seconds": statistics.median(times), "peak_mib": peak_mib()}
    # the counter sees operators, which compiled code has fused away
    if system.startswith("TokCom") and not args.compile:
        facts["flops"] = count_flops(step)
    return facts


def training(args: argparse.Namespace) -> dict:
    """Measure every system and stage in turn, `args.rounds` times: medians, and ratios to the
    published code."""
    results = {}
    peak = matmul_peak(torch.bfloat16 if has_fast_bfloat16(DEVICE) else torch.float32)
    for stage in args.stage:
        systems = [*SYSTEMS[stage], "published"]
        if has_fast_bfloat16(DEVICE):
            systems.append("published, float32")
        runs = {system: [] for system in systems}
        # in turn, so that a machine that slows down does not slow one system alone
        for _ in tqdm(range(args.rounds), desc=f"training: {stage}"):
            for system in systems:
                runs[system].append(_in_process(args, ["--measure", system, "--stage", stage]))
        rows = {
            n: {k: statistics.median(r[k] for r in found) for k in found[0]}
            for n, found in runs.items()
        }
        published = rows["published"]
        tokens = args.batch_size * args.tokens
        for row in rows.values():
            row["tokens_per_second"] = tokens / row["seconds"]
            row["times_published"] = published["seconds"] / row["seconds"]
            row["memory_ratio"] = row["peak_mib"] / published["peak_mib"]
            if "flops" in row:
                row["share_of_peak"] = row["flops"] / row["seconds"] / peak
        results[stage] = rows
    return results


def _in_process(args: argparse.Namespace, extra: list[str]) -> dict:
    """Run this command with `--measure` in its own process, and read the last line of its output.

    Raises `RuntimeError` with the end of its log if it fails.
    """
    command = [sys.executable, "-m", "tokcom.evaluation.benchmark", *args.arguments, *extra]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    # lines before it may be warnings of libraries
    return json.loads(done.stdout.splitlines()[-1])


# ---- sampling ----


def sampling(args: argparse.Namespace) -> dict:
    """Milliseconds per token over batch sizes, lengths and steps. Systems take turns."""
    # not at the top: what they import would count as memory of the measured processes
    from tokcom.evaluation.generators import (
        llama_generator,
        load_generators,
        published_generator,
        tokcom_generator,
    )

    # first, since they may be refused
    beside = load_generators(args.beside, max(args.lengths, default=0), DEVICE)
    vocab_size = args.vocab_size or preset_config(args.preset).codec_config.vocab_size - 1
    preset = args.preset
    options = {"dtype": getattr(torch, args.dtype)}
    ours = tokcom_generator(preset, DEVICE, vocab_size=vocab_size, **options)
    peer = partial(llama_generator, preset, ours.parameters, vocab_size, DEVICE, **options)
    systems = {"Llama with KV cache": peer()}
    if args.published:
        systems["published"] = published_generator(ours.parameters, vocab_size, DEVICE)
    if args.compile:
        systems["TokCom compiled"] = tokcom_generator(
            preset, DEVICE, compiled=True, vocab_size=vocab_size, **options
        )
        systems["Llama compiled"] = peer(compiled=True)
    systems |= beside
    cases = [(batch, length, None) for batch in args.batch_sizes for length in args.lengths]
    cases += [(args.batch_sizes[0], args.lengths[0], steps) for steps in args.steps]
    rows = []
    for batch, length, steps in tqdm(cases, desc="sampling"):
        runs = {"TokCom": ours}
        runs |= systems if steps is None else {}
        times = {name: [] for name in runs}
        for _ in range(args.rounds + 1):  # the first round is a warm-up
            for name, generate in runs.items():
                times[name].append(seconds_of(generate, batch, length, steps))
        row = {"batch": batch, "tokens": length, "steps": steps or "default"}
        row |= {
            f"{n} ms/token": 1000 * statistics.median(t[1:]) / (batch * length)
            for n, t in times.items()
        }
        for name in systems if steps is None else ():
            # above 1 is in TokCom's favour
            row[f"{name} / TokCom"] = row[f"{name} ms/token"] / row["TokCom ms/token"]
        rows.append(row)
    sizes = {"TokCom": ours.parameters} | {n: g.parameters for n, g in systems.items()}
    for size in args.chunk_sizes:
        chunks = {"chunk_size": size, "latent_channels": 16 * size}
        generate = tokcom_generator(
            preset,
            DEVICE,
            codec_config=chunks,
            transformer_config={"latent_channels": 16 * size},
            # a step for each token of the chunk, so that all of them draw from exact probabilities
            num_inference_steps=size,
            vocab_size=vocab_size,
            **options,
        )
        batch = args.batch_sizes[0]
        length = args.lengths[0]
        times = [seconds_of(generate, batch, length, None) for _ in range(args.rounds + 1)]
        rows.append({"batch": batch, "tokens": length, "steps": size, "chunk_size": size})
        rows[-1]["TokCom ms/token"] = 1000 * statistics.median(times[1:]) / (batch * length)
    return {"parameters": sizes, "rows": rows}


# ---- length ----


def measure_length(checkpoint: str, length: int, steps: int | None) -> dict:
    """Generate `length` tokens after a warm-up; returns seconds and peak memory of this process."""
    from tokcom.pipeline_tokcom import TokComPipeline

    pipe = TokComPipeline.from_pretrained(checkpoint).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=steps, output_type="latent")  # latents do not end at EOS
    pipe("Once upon a time", gen_length=16, **options)
    generator = torch.Generator().manual_seed(0)
    seconds = seconds_of(
        lambda: pipe("Once upon a time", gen_length=length, generator=generator, **options)
    )
    return {"tokens": length, "seconds": seconds, "peak_mib": peak_mib()}


def length(args: argparse.Namespace) -> dict:
    """Time and memory over lengths, and their ratios to the first length."""
    rows = [_in_process(args, ["--measure", str(n)]) for n in tqdm(args.lengths, desc="lengths")]
    for row in rows:
        row["ms_per_token"] = 1000 * row["seconds"] / row["tokens"]
        row["time_ratio"] = row["seconds"] / rows[0]["seconds"]
        row["memory_ratio"] = row["peak_mib"] / rows[0]["peak_mib"]
    return {"rows": rows}


# ---- serving ----


def serving_systems(checkpoint: str) -> dict:
    """The pipelines that the server is put in front of: a model, and a Llama of random weights with
    as many parameters and layers and the same width."""
    from transformers import LlamaForCausalLM

    from tokcom.evaluation.autoregressive import llama_config
    from tokcom.evaluation.samplers import AutoregressivePipeline
    from tokcom.pipeline_tokcom import TokComPipeline

    pipe = TokComPipeline.from_pretrained(checkpoint).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.model.config
    shape = config.transformer_config
    size = sum(p.numel() for p in pipe.model.parameters())
    eos = pipe.tokenizer.eos_token_id
    torch.manual_seed(0)
    peer = LlamaForCausalLM(
        llama_config(
            config.text_vocab_size - 1, shape.hidden_size, shape.num_hidden_layers, size, eos
        )
    )
    return {"TokCom": pipe, "Llama": AutoregressivePipeline(peer.eval().to(DEVICE), pipe)}


def start_server(pipe) -> tuple:
    """The OpenAI-compatible server in a thread: the server, its thread, and a client of it."""
    import threading

    import openai
    import uvicorn

    from tokcom.cli.serve import build_app
    from tokcom.cli.server_settings import ServerSettings

    # an hour: requests that wait for their turn are part of the measurement
    app = build_app(pipe, ServerSettings(timeout=3600.0))
    # port 0 lets the system choose a free one
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    # a retry would count a request twice
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=3600)
    return server, thread, client


def serving(args: argparse.Namespace) -> dict:
    """Throughput and latency of the OpenAI-compatible server with both systems behind it.

    The clients of a row send `args.requests` requests each, one after the other.
    """
    from concurrent.futures import ThreadPoolExecutor

    servers = {name: start_server(pipe) for name, pipe in serving_systems(args.checkpoint).items()}

    def ask(client, seed: int) -> list[tuple[int, float]]:
        """Tokens and seconds of the requests of one client."""
        found = []
        for _ in range(args.requests):
            started = time.perf_counter()
            options = {"prompt": "Once upon a time", "max_tokens": args.tokens, "seed": seed}
            usage = client.completions.create(model="tokcom", **options).usage
            found.append((usage.completion_tokens, time.perf_counter() - started))
        return found

    def measure(name: str, clients: int) -> dict:
        client = servers[name][2]
        with ThreadPoolExecutor(clients) as pool:
            started = time.perf_counter()
            # of all threads of this process, the clients included
            busy = time.process_time()
            futures = [pool.submit(ask, client, seed) for seed in range(clients)]
            answers = [answer for future in futures for answer in future.result()]
        tokens = sum(count for count, _ in answers)
        latencies = sorted(seconds for _, seconds in answers)
        return {
            "tokens per second": tokens / (time.perf_counter() - started),
            "p50, s": statistics.median(latencies),
            # the smallest latency that at least 95 % of the requests do not exceed
            "p95, s": latencies[max(0, -(-95 * len(latencies) // 100) - 1)],
            "processor ms per token": 1000 * (time.process_time() - busy) / tokens,
        }

    for name in servers:
        measure(name, 1)  # what is slow only once
    rows = []
    for clients in args.clients:
        runs = {name: [] for name in servers}
        for _ in tqdm(range(args.rounds), desc=f"serving {clients} at once"):
            for name, found in runs.items():  # systems take turns
                found.append(measure(name, clients))
        for name, found in runs.items():
            medians = {key: statistics.median(run[key] for run in found) for key in found[0]}
            rows.append({"system": name, "clients": clients, **medians})
    for server, thread, _ in servers.values():
        server.should_exit = True
        thread.join()
    return {"rows": rows}


# ---- command line ----


def report(command: str, results: dict, directory: Path | None) -> None:
    # not at the top: matplotlib would count as memory of the measured processes
    from tokcom.evaluation.report import benchmark_plot, table

    if command == "training":
        rows = [
            {"stage": stage, "system": name, **row}
            for stage, found in results.items()
            if stage != "about"
            for name, row in found.items()
        ]
    else:
        rows = results["rows"]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    about = results["about"]
    text = f"`{about['command']}`, {about['machine']}, {about['date']}\n\n"
    text += table(columns, [[row.get(column) for column in columns] for row in rows])
    print(text)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{command}.json").write_text(
            json.dumps(results, indent=2) + "\n", encoding="utf-8"
        )
        (directory / f"{command}.md").write_text(text, encoding="utf-8")
        benchmark_plot(command, rows, directory / f"{command}.png")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "training", help="tokens per second and peak memory of a training step"
    )
    train.add_argument("--stage", nargs="+", default=["flow", "codec"], choices=["flow", "codec"])
    for name, value in {
        "layers": 4,
        "tokens": 1024,
        "vocab_size": 32016,
        "batch_size": 4,
        "steps": 3,
        "rounds": 3,
    }.items():
        train.add_argument(f"--{name}", type=int, default=value)
    train.add_argument("--compile", action="store_true", help="torch.compile TokCom's model")
    sample = commands.add_parser("sampling", help="milliseconds per generated token")
    sample.add_argument("--preset", default="tiny")
    sample.add_argument("--vocab_size", type=int, help="of the tokenizer; by default the preset's")
    sample.add_argument("--rounds", type=int, default=3)
    sample.add_argument(
        "--compile", action="store_true", help="both systems with torch.compile, too"
    )
    sample.add_argument("--published", action="store_true", help="the published sampler, too")
    sample.add_argument(
        "--beside",
        nargs="*",
        default=[],
        help="directories or Hub ids of causal language models to time in the same run, such as "
        "the teacher",
    )
    sample.add_argument(
        "--processor_time",
        action="store_true",
        help="time of the processor, not of the clock: on a CPU that others use, too",
    )
    sample.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights of both systems (default: %(default)s)",
    )
    for name, values in {
        "batch_sizes": [1, 8, 32],
        "lengths": [256, 1024, 4096],
        "steps": [4, 8, 16, 32, 64],
        "chunk_sizes": [1, 2, 4, 8],
    }.items():
        sample.add_argument(f"--{name}", type=int, nargs="*", default=values)
    long = commands.add_parser("length", help="time and peak memory against the length of a text")
    long.add_argument("--checkpoint", default=".")
    long.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    long.add_argument(
        "--steps", type=int, help="denoising steps per block; by default the model's own"
    )
    serve = commands.add_parser(
        "serving",
        help="throughput and latency of the server, beside a Llama behind the same server",
    )
    serve.add_argument("--checkpoint", default=".")
    serve.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64], help="at once")
    for name, value in {"requests": 2, "tokens": 64, "rounds": 3}.items():
        serve.add_argument(f"--{name}", type=int, default=value)
    for command in (train, sample, long, serve):
        command.add_argument(
            "--output_dir", type=Path, help="where the numbers, the table and the plot are written"
        )
        add_device_option(command)
        command.add_argument("--measure", help=argparse.SUPPRESS)
    return parser


@report_errors()
def main(argv: list[str] | None = None) -> None:
    global CLOCK, DEVICE
    args = build_parser().parse_args(argv)
    DEVICE = args.device
    if getattr(args, "processor_time", False):
        CLOCK = time.process_time
    args.arguments = list(sys.argv[1:] if argv is None else argv)
    if args.measure:
        if args.command == "training":
            print(json.dumps(measure_training(args.measure, args.stage[0], args)))
        else:
            print(json.dumps(measure_length(args.checkpoint, int(args.measure), args.steps)))
        return
    commands = {"training": training, "sampling": sampling, "length": length, "serving": serving}
    results = commands[args.command](args)
    device = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    if is_cuda(DEVICE):
        device = torch.cuda.get_device_name(DEVICE)
    results["about"] = {
        "command": " ".join(["python -m tokcom.evaluation.benchmark", *args.arguments]),
        "machine": f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "date": time.strftime("%Y-%m-%d"),
    }
    report(args.command, results, args.output_dir)


if __name__ == "__main__":
    main()
