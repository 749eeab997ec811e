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

The last kind is told beforehand (`valid` below), not found out, so it cannot hide a missing check.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trees import import_module

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve()


SECONDS = 20  # a mutation that takes longer counts as raw
LONGEST = 500  # characters of one sentence
COUNT = 360


@dataclass(frozen=True)
class Mutation:
    """One change of a saved model.

    Args:
        name: `kind/what`, with the model it is made in.
        change: takes the directory.
        words: a clear refusal names one of these.
        valid: the changed directory holds a valid model, only another one.
    """

    model: str
    name: str
    change: Callable[[Path], None]
    words: tuple[str, ...]
    valid: bool = False


# ---- numbers in configurations ----

BAD_NUMBERS = {
    "nan": float("nan"),
    "inf": float("inf"),
    "minus one": -1,
    "zero": 0,
    "huge": 1e30,
    "big": 10**12,
    "text": "many",
    "null": None,
    "true": True,
    "list": [1],
}
# numbers at which a field means something unusual but valid, or at which the library refuses to
# tell a whole float from an integer
ALLOWED = {
    ("transformer_config", "block_size"): ("null",),
    ("codec_config", "fsq_levels"): ("null",),
    ("config", "timestep_loc"): ("zero", "minus one"),
    ("config", "token_stagger"): ("zero",),
    ("config", "condition_vocab_size"): ("zero",),
    ("scheduler", "eta"): ("zero",),
    ("codec_config", "mask_token_id"): ("zero",),
    ("codec_config", "num_codes"): ("zero",),
}
# what each model is spoiled in; fields whose default is what the model has are not in its config.json
FIELDS = {
    "turns": {
        "config": (
            "token_stagger",
            "token_shift",
            "noise_std",
            "timestep_loc",
            "sampling_temperature",
            "sampling_top_p",
            "num_inference_steps",
            "token_embedding_size",
        ),
        "transformer_config": (
            "rope_theta",
            "rms_norm_eps",
            "timestep_scale",
            "hidden_size",
            "num_attention_heads",
            "max_position_embeddings",
            "conditioning_size",
            "block_size",
        ),
        "codec_config": ("chunk_size", "latent_channels", "rms_norm_eps", "mask_token_id"),
        "scheduler": ("shift", "eta", "num_train_timesteps", "noise_std"),
    },
    "latents": {
        "config": ("latent_head_size", "latent_head_codes", "noise_std", "num_inference_steps"),
        "transformer_config": ("num_key_value_heads", "intermediate_size"),
        "codec_config": ("vocab_size",),
    },
    "image": {"codec_config": ("image_size", "num_tokens", "rms_norm_eps")},
    "video": {"codec_config": ("num_frames", "patch_size", "num_codes")},
    "several": {"config": ("timestep_loc",), "transformer_config": ("rope_theta",)},
    "color": {"codec_config": ("patch_size", "image_size")},
}
# a value of the right kind that is merely another one
OTHER_NUMBERS = {
    ("turns", "config", "sampling_temperature"): 0.7,
    ("turns", "config", "sampling_top_p"): 0.5,
    ("turns", "config", "num_inference_steps"): 8,
    ("turns", "transformer_config", "rope_theta"): 500.0,
    ("turns", "transformer_config", "rms_norm_eps"): 1e-4,
    ("turns", "scheduler", "shift"): 3.0,
    ("latents", "transformer_config", "timestep_scale"): 10.0,
    ("turns", "codec_config", "mask_token_id"): 0,
}


def _edit(file: Path, change: Callable[[dict], None]) -> None:
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields, indent=2))


def set_number(directory: Path, section: str, field: str, value: Any) -> None:
    if section == "scheduler":
        target = directory / "scheduler" / "scheduler_config.json"
        _edit(target, lambda fields: fields.update({field: value}))
        return

    def change(fields: dict) -> None:
        part = fields if section == "config" else fields.setdefault(section, {})
        part[field] = value

    _edit(directory / "config.json", change)


def number_mutations() -> Iterator[Mutation]:
    for model, sections in FIELDS.items():
        for section, fields in sections.items():
            for field in fields:
                for how, value in BAD_NUMBERS.items():
                    if how in ALLOWED.get((section, field), ()):
                        continue

                    def change(directory, s=section, f=field, v=value):
                        set_number(directory, s, f, v)

                    words = (field, "config.json", section)
                    yield Mutation(model, f"numbers/{section}.{field}={how}", change, words)
    for (model, section, field), value in OTHER_NUMBERS.items():

        def change(directory, s=section, f=field, v=value):
            set_number(directory, s, f, v)

        yield Mutation(model, f"numbers/{section}.{field}=other", change, (field,), valid=True)


def name_mutations() -> Iterator[Mutation]:
    """Keys and choices that do not exist."""
    choices = {
        ("config", "prediction_type"): "pixels",
        ("config", "timestep_sampling"): "often",
        ("config", "latent_head"): "gru",
        ("codec_config", "model_type"): "tokcom_unknown_codec",
        ("codec_config", "encoder_type"): 3,
        ("transformer_config", "attention_type"): "half",
        ("config", "sampling_temprature"): 0.7,
        ("transformer_config", "rope_tetha"): 1e4,
        ("codec_config", "chunksize"): 4,
    }
    for (section, field), value in choices.items():

        def change(directory, s=section, f=field, v=value):
            set_number(directory, s, f, v)

        yield Mutation("turns", f"names/{section}.{field}", change, (field, str(value)))


# ---- tensors ----


def _spoiled(how: str, tensor):
    """A spoiled copy of a tensor."""
    import torch

    tensor = tensor.clone()
    flat = tensor.view(-1)
    if how == "nan":
        flat[len(flat) // 2] = float("nan")
    elif how == "inf":
        flat[0] = float("inf")
    elif how == "minus inf":
        flat[-1] = -float("inf")
    elif how == "all nan":
        flat.fill_(float("nan"))
    elif how == "truncated":
        tensor = tensor[:-1].contiguous() if len(tensor) > 1 else tensor.new_zeros(0)
    elif how == "longer":
        tensor = torch.cat((tensor, tensor[:1]))
    elif how == "integers":
        tensor = tensor.round().to(torch.int64)
    elif how == "booleans":
        tensor = tensor > 0
    elif how == "complex":
        tensor = torch.complex(tensor, tensor)
    elif how == "extra axis":
        tensor = tensor[None]
    elif how == "transposed":
        tensor = tensor.T.contiguous()
    elif how == "scaled":
        tensor = tensor * 1.01 + 1e-3  # zeros change, too
    elif how == "one bit":
        flat[0] = torch.nextafter(flat[0], flat[0] + 1)
    elif how == "zeros":
        flat.zero_()
    elif how == "negative":
        flat.neg_()
    return tensor


BAD_TENSORS = (
    *("nan", "inf", "minus inf", "all nan", "truncated", "longer"),
    *("integers", "booleans", "complex", "extra axis", "missing", "renamed"),
)
OTHER_TENSORS = ("scaled", "one bit")


def change_tensor(directory: Path, name: str, how: str) -> None:
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    tensors = load_file(file)
    if how == "missing":
        del tensors[name]
    elif how == "renamed":
        tensors[name + "_old"] = tensors.pop(name)
    else:
        tensors[name] = _spoiled(how, tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


def _kind(name: str) -> str:
    """Tensors that differ only in the number of their layer are of one kind."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def tensor_mutations(saved: Path) -> Iterator[Mutation]:
    from safetensors.torch import load_file

    for model in FIELDS:
        tensors = load_file(saved / model / "model.safetensors")
        kinds = {_kind(name): name for name in tensors if tensors[name].is_floating_point()}
        for name in kinds.values():
            last = name.split(".")[-1]
            words = (name, last, "model.safetensors")
            hows = list(BAD_TENSORS)
            shape = tensors[name].shape
            if len(shape) == 2 and shape[0] != shape[1]:
                hows.append("transposed")
            if last == "latent_std":  # latents are divided by it
                hows += ["zeros", "negative"]
            for how in (*hows, *OTHER_TENSORS):

                def change(directory, n=name, h=how):
                    change_tensor(directory, n, h)

                valid = how in OTHER_TENSORS
                yield Mutation(model, f"weights/{how}/{name}", change, words, valid)


# ---- files ----


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(content)


def _cut(name: str, share: float) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[: int(len(data) * share)])

    return change


def _remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def _set_byte(name: str, place: int, byte: int) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        data = bytearray((directory / name).read_bytes())
        data[place] = byte
        (directory / name).write_bytes(bytes(data))

    return change


def _replace(name: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    """Change the first place of `old`; of the same length, so that the offsets still fit."""

    def change(directory: Path) -> None:
        data = (directory / name).read_bytes()
        assert old in data and len(old) == len(new)
        (directory / name).write_bytes(data.replace(old, new, 1))

    return change


def _other_tokenizer(directory: Path) -> None:
    """Two tokens change places, so the text is read and written wrongly."""

    def change(fields: dict) -> None:
        vocabulary = fields["model"]["vocab"]
        one, two = sorted(vocabulary, key=vocabulary.get)[100:102]
        vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]

    _edit(directory / "tokenizer.json", change)


def _shorter_tokenizer(directory: Path) -> None:
    def change(fields: dict) -> None:
        vocabulary = fields["model"]["vocab"]
        del vocabulary[max(vocabulary, key=vocabulary.get)]
        fields["model"]["merges"] = fields["model"]["merges"][:-1]

    _edit(directory / "tokenizer.json", change)


def file_mutations() -> Iterator[Mutation]:
    names = (
        "config.json",
        "model_index.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "scheduler/scheduler_config.json",
    )
    for name in names:
        last = name.split("/")[-1]
        words = (last, "is not a TokCom model", last.split(".")[0])
        yield Mutation("turns", f"files/empty/{name}", _write(name, b""), words)
        yield Mutation("turns", f"files/half/{name}", _cut(name, 0.5), words)
        yield Mutation("turns", f"files/noise/{name}", _write(name, bytes(range(256))), words)
        if name == "tokenizer_config.json":  # the tokenizer still knows its tokens
            continue
        yield Mutation("turns", f"files/removed/{name}", _remove(name), words)
        if name.endswith(".json"):
            yield Mutation("turns", f"files/list/{name}", _write(name, b"[1, 2]"), words)
    weights = "model.safetensors"
    words = (weights, "codec.embed", "cmdec")
    for place, byte in ((0, 255), (7, 127), (8, 0), (9, 91)):
        change = _set_byte(weights, place, byte)
        yield Mutation("turns", f"files/header byte {place}/{weights}", change, words)
    for old, new in (
        (b'"F32"', b'"F33"'),
        (b'"F32"', b'"I32"'),
        (b'"shape":[', b'"shape":{'),
        (b'"data_offsets"', b'"data_0ffsets"'),
        (b'"codec.', b'"cmdec.'),
    ):
        name = f"files/header {new.decode()}/{weights}"
        yield Mutation("turns", name, _replace(weights, old, new), words)
    for model in FIELDS:
        yield Mutation(model, f"files/90 percent/{weights}", _cut(weights, 0.9), (weights,))
    for how, change in (("swapped", _other_tokenizer), ("shorter", _shorter_tokenizer)):
        valid = how == "swapped"
        yield Mutation("turns", f"files/{how}/tokenizer.json", change, ("tokenizer",), valid)


# ---- choosing, running, judging ----


def chosen(saved: Path, count: int) -> list[Mutation]:
    """`count` of all mutations: those of names and files, and evenly spread ones of numbers and tensors."""
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
    """The same through `tokcom generate`, in a fork of this process, which has imported everything."""
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
