"""Spoil a saved model in 360 ways, and see what loading and sampling say about it.

    python tests/harness/mutations.py                                # this checkout
    python tests/harness/mutations.py --package_parent /elsewhere    # /elsewhere/tokcom
    python tests/harness/mutations.py --command_lines 27             # also through `tokcom generate`
    python tests/harness/mutations.py --only weights/inf --show      # some of them, one by one

Six tiny models (two of texts, pictures, clips, several streams, colours of tokens) are saved once.
Each mutation changes one thing in a copy: a number in a configuration, a tensor, a file. Then the
copy is loaded and samples. What happens is one of

    clear   refused in one sentence that names what is wrong
    raw     an exception of a library, a hang, or a sentence that does not say where to look
    silent  a result, as if nothing were wrong
    hash    a result, but the model is a valid one that merely is not what was released: no check of
            numbers can see that. `verify=True` and `tokcom verify` compare SHA-256

The last kind is told beforehand (`valid` in `spoiling.py`), not found out, so it cannot hide a
missing check.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from spoiling import (
    FIELDS,
    Mutation,
    file_mutations,
    name_mutations,
    number_mutations,
    tensor_mutations,
)
from trees import import_module

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve()


SECONDS = 20  # a mutation that takes longer counts as raw
LONGEST = 500  # characters of one sentence
COUNT = 360


def chosen(saved: Path, count: int) -> list[Mutation]:
    """`count` of all mutations: those of names and files, and evenly spread ones of numbers and
    tensors."""
    few = [*name_mutations(), *file_mutations()]
    numbers = list(number_mutations())
    tensors = list(tensor_mutations(saved))
    rest = max(0, count - len(few))
    wanted = min(len(numbers), rest * 3 // 5)

    def spread(items: list, many: int) -> list:
        return [items[i * len(items) // many] for i in range(many)] if many else []

    return few + spread(numbers, wanted) + spread(tensors, rest - wanted)


def save_models(target: Path) -> None:
    """The six models, whose blocks do something."""
    import torch
    from helpers import SPLIT, TURNS, build_model, tiny_config, tiny_pipeline

    from tokcom.modeling_tokcom import TokComModel

    build_pipeline = import_module("pipelines").build_pipeline
    from tokcom.processing_tokcom import vocabulary_size
    from tokcom.training.data import train_tokenizer

    lines = (HERE.parents[2] / "sample_data" / "stories_validation.jsonl").read_text().splitlines()
    tokenizer = train_tokenizer([json.loads(line)["text"] for line in lines], 320)
    size = vocabulary_size(tokenizer)
    head = {"latent_head": "vq", "latent_head_size": 32, "latent_head_codes": 16}
    color = {"model_type": "tokcom_color_codec", "patch_size": 2, "image_size": 8}
    color |= {"vocab_size": size + 1, "mask_token_id": size, "pad_token_id": size}
    torch.manual_seed(0)
    fields = tiny_config(size).to_dict()
    fields["codec_config"] = color
    fields["transformer_config"]["num_position_axes"] = 2
    from tokcom.configuration_tokcom import TokComConfig

    models = {
        "turns": build_model(size),
        "latents": TokComModel(tiny_config(size, **head)),
        "color": TokComModel(TokComConfig.from_dict(fields)),
    }
    assert SPLIT and TURNS
    for name, model in models.items():
        build_pipeline(model.eval(), tokenizer).save_pretrained(target / name)
    for modality in ("image", "video", "several"):
        known = tokenizer if modality == "several" else None
        tiny_pipeline(modality, known).save_pretrained(target / modality)


def use(directory: Path, verify: bool = False) -> str:
    """Load a directory and sample from it."""
    import torch

    from tokcom.cli.loading import open_pipeline

    if verify:
        load_pipeline = import_module("pipelines").load_pipeline

        pipe = load_pipeline(directory, verify=True)
    else:
        pipe = open_pipeline(str(directory), "cpu")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    modality = pipe.model.config.codec_config.modality
    if modality == "text":
        return repr(pipe.generate(4, generator=generator).texts)
    return repr(pipe(generator=generator))[:200]


class Hang(Exception):
    """A mutation took longer than `SECONDS`."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(message: str, mutation: Mutation, directory: Path) -> str:
    """`clear` or `raw` for what the command would print after `error: `."""
    names_it = any(word in message for word in (*mutation.words, str(directory)))
    is_sentence = "\n" not in message.strip() and len(message) <= LONGEST
    return "clear" if is_sentence and names_it and not message.startswith("unexpected ") else "raw"


def outcome(mutation: Mutation, saved: Path, work: Path) -> tuple[str, str]:
    """What happens, and what is said."""
    from tokcom.cli.errors import explain

    directory = work / "model"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(saved / mutation.model, directory)
    mutation.change(directory)
    quiet = io.StringIO()
    try:
        with time_limit(SECONDS), warnings.catch_warnings(), contextlib.redirect_stderr(quiet):
            warnings.simplefilter("ignore")
            said = use(directory)
    except Hang as error:
        return "raw", str(error)
    except Exception as error:
        message = explain(error)
        return judge(message, mutation, directory), message
    if not mutation.valid:
        return "silent", said
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(quiet):
            warnings.simplefilter("ignore")
            use(directory, verify=True)
    except ValueError as error:
        if "checksums" in str(error) or "released" in str(error):
            return "hash", str(error)
    except (TypeError, ImportError):  # a tree whose load_pipeline cannot verify
        pass
    return "silent (only a hash can see it)", said


def command_line(mutation: Mutation, saved: Path, work: Path) -> tuple[str, str]:
    """The same through `tokcom generate`, in a fork of this process, which has imported
    everything."""
    directory = work / "model"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(saved / mutation.model, directory)
    mutation.change(directory)
    log = work / "stderr"
    child = os.fork()
    if child == 0:
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(descriptor, 2)
        signal.alarm(SECONDS)
        code = 0
        try:
            from tokcom.cli.main import main as tokcom

            tokcom(["generate", "--checkpoint", str(directory), "--num_chunks", "2", "--seed", "0"])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
            if isinstance(ended.code, str):
                print(ended.code, file=sys.stderr, flush=True)
        except BaseException:
            traceback.print_exc()
            code = 1
        os._exit(code)
    _, status = os.waitpid(child, 0)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if status == 0:
        return "silent", "status 0"
    if any(line.startswith("Traceback") for line in lines):
        return "raw", f"traceback of {len(lines)} lines"
    told = [line for line in lines if line.startswith("error: ")]
    if not told:
        return "raw", f"status {os.waitstatus_to_exitcode(status)} and {len(lines)} lines"
    message = told[-1].removeprefix("error: ")
    return judge(message, mutation, directory), message


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--package_parent", help="folder that holds the checkout `tokcom`")
    parser.add_argument("--only", default="", help="only mutations whose name contains this")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--show", action="store_true", help="one line for each mutation")
    parser.add_argument("--models", help="keep the saved models here, or use those that are here")
    parser.add_argument("--command_lines", type=int, default=0, help="so many through the command")
    args = parser.parse_args()
    parent = Path(args.package_parent or HERE.parents[3]).resolve()
    sys.path[:0] = [str(parent), str(HERE.parents[1])]
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(args.models or Path(folder) / "models")
        if not saved.is_dir():
            save_models(saved)
        for model in FIELDS:  # the intact models work
            use(saved / model)
        mutations = [m for m in chosen(saved, args.count) if args.only in m.name]
        runs: list[tuple[Mutation, Callable]] = [(m, outcome) for m in mutations]
        if args.command_lines:
            texts = [m for m in mutations if m.model in ("turns", "latents") and not m.valid]
            many = min(args.command_lines, len(texts))
            picked = [texts[i * len(texts) // many] for i in range(many)]
            runs = [(m, command_line) for m in picked]
        for mutation, run in runs:
            result, said = run(mutation, saved, Path(folder))
            counts[mutation.name.split("/")[0]][result] += 1
            if args.show:
                line = " ".join(said.split())[:160]
                print(f"{result:8} {mutation.model:8} {mutation.name}: {line}", flush=True)
    total = sum(counts.values(), collections.Counter())
    for kind, found in [*counts.items(), ("all", total)]:
        told = ", ".join(f"{many} {result}" for result, many in sorted(found.items()))
        print(f"{kind:8} {found.total():4}: {told}")


if __name__ == "__main__":
    main()
