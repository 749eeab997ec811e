"""The work of `tokcom evaluate`: a text model and its autoregressive peers on held-out text.

Sections are rewritten into `results.json` one by one, so that a run that is stopped keeps what it
has measured.
"""

import argparse
import dataclasses
import hashlib
import json
import platform
from datetime import date
from pathlib import Path

import numpy as np
import torch

from tokcom.cli.loading import check_modality, check_model_path, open_pipeline, usable_device
from tokcom.evaluation import autoregressive, protocol, report
from tokcom.evaluation.judges import TextJudge, TokenJudge, has_tokens_of, load_peer
from tokcom.evaluation.metrics import unigram_entropy
from tokcom.evaluation.parts import fingerprint
from tokcom.evaluation.reconstruction import (
    cross_entropy_at,
    prefers_true_prompt,
    rarest_ids,
    reconstruction_accuracy,
    share_of_informative_draws,
)
from tokcom.evaluation.reference import compare
from tokcom.evaluation.samplers import AutoregressiveSampler, TokComSampler
from tokcom.integrity_tokcom import file_digest, read_json
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.processing_tokcom import decode_ids
from tokcom.training.config import DataConfig
from tokcom.training.data import PackedDataset, WindowShape, load_documents, tokenize_documents
from tokcom.training.files import kind_of

JUDGE_STEPS = 200  # of the judge that is trained when none is given


def reconstruction(
    pipe: TokComPipeline, held_out: np.ndarray, train: np.ndarray, max_tokens: int, seed: int
) -> dict:
    """Accuracy against latent noise, CE(t), and whether true continuations are preferred."""
    model = pipe.model.eval()
    model.set_stage("flow")
    length = min(512, pipe.max_length)
    shape = WindowShape.of(pipe.model.config, length)
    dataset = PackedDataset(held_out, shape, pipe.tokenizer.eos_token_id, seed=0, training=False)
    count = max(1, min(len(dataset), max_tokens // length))
    # windows of every book, not of the first
    spread = np.linspace(0, len(dataset) - 1, count).round().astype(int)
    rows = torch.stack([dataset[i]["input_ids"] for i in spread.tolist()])
    # equal batches: means need no weights
    rows = rows[: len(rows) // 8 * 8 or len(rows)].to(model.device)
    batches = list(rows.split(8))
    results = {"tokens": rows.numel()}
    # rare in training, which is where the codec had little to learn from
    results |= reconstruction_accuracy(model.codec, batches, seed, rarest_ids(train))
    # of the whole text: few tokens would estimate it too low
    results["unigram_entropy"] = unigram_entropy(held_out)
    results |= cross_entropy_at(model, batches, seed)
    results["informative_share_of_t"] = share_of_informative_draws(
        model, results, results["unigram_entropy"]
    )
    # pieces of 128 tokens: a prompt and a continuation each
    pairs = rows[:, : length // 128 * 128].reshape(-1, min(length, 128))
    # both parts in whole chunks, so that none belongs to both
    split = protocol.PROMPT // pipe.chunk_size * pipe.chunk_size
    if len(pairs) > 1 and split < pairs.shape[1]:
        known = pairs[:256, :split]  # (B, P)
        real = pairs[:256, split : split + protocol.CONTINUATION]  # (B, L)
        results["prefers_true_prompt"] = prefers_true_prompt(model, known, real, seed)
    return results


def load_judges(
    args: argparse.Namespace, tokenizer, train: np.ndarray
) -> tuple[TokenJudge, dict[str, TextJudge]]:
    """A judge of token ids, trained if none shares our tokenizer, and the judges of text."""
    token_judge = None
    text_judges = {}
    for path in args.judge:
        # ids mean the same to both, so samples are scored as they are
        if has_tokens_of(path, tokenizer) and token_judge is None:
            token_judge = TokenJudge(path, tokenizer, args.device)
        else:
            # two judges may lie in folders of one name
            name = path if Path(path).name in text_judges else Path(path).name
            text_judges[name] = TextJudge(path, args.device)
    if token_judge is None:
        # kept there, so that the next evaluation need not train it again
        path = Path(args.output_dir) / "judge"
        text = path / "text.sha256"
        digest = hashlib.sha256(np.ascontiguousarray(train).tobytes()).hexdigest()
        if not (path / "config.json").is_file():
            print(f"training a judge for {JUDGE_STEPS} steps in {path}")
            # a seed of its own, so the judge resembles no peer of seed 0
            steps = {"max_steps": JUDGE_STEPS, "learning_rate": 2e-3, "seed": 1234}
            autoregressive.train(train, tokenizer, path, 256, 4, **steps)
            text.write_text(digest + "\n", encoding="utf-8")
        elif not has_tokens_of(str(path), tokenizer) or (
            text.is_file() and text.read_text(encoding="utf-8").strip() != digest
        ):
            raise ValueError(
                f"the judge in {path} has another tokenizer or training text, so it is that of "
                "another evaluation; give another --output_dir, or remove the folder."
            )
        token_judge = TokenJudge(str(path), tokenizer, args.device)
    return token_judge, text_judges


PROBABILITY_SWEEPS = {
    "temperature": ("temperature", (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)),
    "top-p": ("top_p", (1.0, 0.98, 0.95, 0.9, 0.8)),
}


def sweep_settings(sampler, sweeps: dict[str, tuple[str, tuple]]) -> dict:
    """Copies of `sampler` by setting, "name value", for `{name: (field, values)}`."""
    return {
        f"{name} {value}": dataclasses.replace(sampler, **{field: value})
        for name, (field, values) in sweeps.items()
        for value in values
    }


def tokcom_settings(pipe: TokComPipeline, steps: int) -> dict[str, TokComSampler]:
    """The settings whose NLL and entropy the frontier shows."""
    # each sweep varies one setting, and keeps the others as they are
    sweeps = {"guidance": ("guidance_scale", (1.0, 1.5, 2.0))}
    if pipe.model.token_head is not None:
        sweeps |= PROBABILITY_SWEEPS
    else:
        sweeps |= {
            "noise": ("noise_scale", (1.0, 0.9, 0.8, 0.7)),
            "churn": ("eta", (0.0, 0.5, 1.0)),
        }
    sweeps["steps"] = ("num_inference_steps", (2, 4, 8, 16, 32, 64))
    return sweep_settings(TokComSampler(pipe, steps), sweeps)


def peer_settings(sampler: AutoregressiveSampler) -> dict[str, AutoregressiveSampler]:
    return sweep_settings(
        AutoregressiveSampler(sampler.model, sampler.start_token), PROBABILITY_SWEEPS
    )


def read_peers(given: list[str]) -> dict[str, str]:
    """Directories of peers by name; raises `ValueError` for what is no NAME=DIRECTORY, and for a
    name that is taken."""
    peers: dict[str, str] = {}
    for peer in given:
        name, separator, path = peer.partition("=")
        if not (name and separator and path):
            raise ValueError(f"--peer {peer!r} must have the form NAME=DIRECTORY.")
        if name in ("TokCom", *peers):
            raise ValueError(f"--peer {peer!r}: the name {name!r} is taken; choose another.")
        peers[name] = path
    return peers


def load_systems(args: argparse.Namespace, pipe: TokComPipeline) -> dict:
    """The samplers to measure by name: the model's, and those of the peers."""
    ours = TokComSampler(
        pipe,
        args.steps,
        args.guidance_scale,
        args.noise_scale,
        temperature=args.temperature,
        top_p=args.top_p,
    )
    systems = {"TokCom": ours}
    for name, path in read_peers(args.peer).items():
        model = load_peer(path, pipe.tokenizer, args.device)
        systems[name] = AutoregressiveSampler(
            model, pipe.tokenizer.eos_token_id, args.peer_temperature
        )
    return systems


SAME = ("weights", "data", "seed")  # what two runs must share to be one evaluation


def earlier_results(file: Path, about: dict) -> dict:
    """The sections that earlier runs have measured of the same model and data, and in `earlier`
    what each run said about itself.

    Results of anything else are kept under another name.
    """
    if not file.is_file():
        return {}
    old = read_json(file)
    before = old.pop("about", {})
    if any(before.get(name) != about[name] for name in SAME):
        kept = file.with_name(f"results-{file_digest(file)[:8]}.json")
        file.rename(kept)
        print(f"the results in {file} are of another model, data or seed; they are now in {kept}")
        return {}
    sections = [name for name in old if name != "earlier"]
    return old | {"earlier": dict.fromkeys(sections, before) | old.get("earlier", {})}


def check_data(args: argparse.Namespace) -> None:
    """Raise `FileNotFoundError` for a file of texts that is missing; a Hub name passes."""
    for name in ("data", "train_data"):
        file = getattr(args, name)
        # only files have such an ending; the defaults lie in a checkout, not in every folder
        if kind_of(Path(file)) and not Path(file).expanduser().exists():
            raise FileNotFoundError(
                f"--{name} {file} does not exist; give a file, a folder or a Hub name."
            )


def evaluate(args: argparse.Namespace) -> dict:
    """Run the sections that `args` asks for; `results.json` is rewritten after each."""
    # before anything is loaded or trained
    read_peers(args.peer)
    check_model_path(args.checkpoint)
    check_data(args)
    pipe = open_pipeline(args.checkpoint, args.device)
    check_modality(pipe, args.checkpoint)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)

    def read(source: str, name: str) -> np.ndarray:
        documents = load_documents(source, DataConfig(text_column=args.text_column), "train")
        return tokenize_documents(documents, pipe.tokenizer, args.text_column, name)

    held_out = read(args.data, "held-out text")
    train = read(args.train_data, "training text")
    about = {
        "checkpoint": str(args.checkpoint),
        "weights": fingerprint(pipe.model),
        "data": str(args.data),
        "command": args.command_line,
        "seed": args.seed,
        "date": str(date.today()),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {args.device}",
    }
    results = {"about": about} | earlier_results(output / "results.json", about)

    def keep(name: str, facts: dict) -> None:
        # a run may take hours and be stopped: what is measured is written at once
        results[name] = facts
        results.get("earlier", {}).pop(name, None)
        (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    if "reconstruction" in args.sections:
        keep("reconstruction", reconstruction(pipe, held_out, train, args.max_tokens, args.seed))
    if set(args.sections) - {"reconstruction"}:
        token_judge, text_judges = load_judges(args, pipe.tokenizer, train)
        study = protocol.Study(
            train,
            held_out,
            lambda row: decode_ids(pipe.tokenizer, row.tolist()),
            token_judge,
            text_judges,
            pipe.chunk_size,
            args.length,
            args.samples,
            args.seeds,
        )
        systems = load_systems(args, pipe)
        _measure_systems(args, study, pipe, systems, keep)
    (output / "results.md").write_text(report.markdown(results), encoding="utf-8")
    report.plots(results, output)
    return results


def _measure_systems(
    args: argparse.Namespace, study: protocol.Study, pipe, systems: dict, keep
) -> None:
    if "unconditional" in args.sections:
        keep("unconditional", protocol.unconditional(study, systems))
    if "continuation" in args.sections:
        keep("continuation", protocol.continuation(study, systems))
    if "frontier" in args.sections:
        settings = {name: peer_settings(peer) for name, peer in systems.items() if name != "TokCom"}
        settings = {"TokCom": tokcom_settings(pipe, args.steps)} | settings
        # a dozen settings, so fewer samples of each
        keep("frontier", protocol.frontier(study, settings, min(args.samples, 500)))
    if "brier" in args.sections:
        # four tokens each cost little, and the estimate is noisy
        keep("brier", protocol.brier(study, systems, 8 * args.samples))
    if "likelihood" in args.sections:
        keep("likelihood", protocol.likelihood(study, systems))
    if "memorisation" in args.sections:
        keep("memorisation", protocol.memorisation(study, systems))
    if "latency" in args.sections:
        keep(
            "latency",
            protocol.latency(
                study.windows(protocol.PROMPT, max(protocol.LATENCY_BATCHES)), systems
            ),
        )


def run(args: argparse.Namespace) -> dict:
    """Score the files of predictions, or else measure the model; returns the results."""
    if args.predictions:
        print(compare(args.predictions))
        return {}
    args.device = usable_device(args.device)  # judges and peers go to the same one
    results = evaluate(args)
    print((Path(args.output_dir) / "results.md").read_text(encoding="utf-8"))
    return results
