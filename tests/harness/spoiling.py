"""The ways in which `mutations.py` spoils a saved model: numbers, names, tensors and files."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
# what each model is spoiled in; fields whose default is what the model has are not in its
# config.json
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
