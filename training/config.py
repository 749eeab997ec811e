"""Training configuration: everything a run needs to know, with its type, its default and one line
of help.

`load_train_config` fills these classes from a preset and from `dotted.key=value` overrides.
OmegaConf merges and checks types, `__post_init__` checks the rest, and every error names the key
and the remedy before anything heavy is imported.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from tokcom.training.files import MEDIA_READ, kind_of
from tokcom.training.presets import forget_data, read_preset

# their order seeds the noise of each stage: append, never insert
STAGES = (
    "codec",
    "flow",
    "head",
    "distill",
)


def option(default: Any, help: str, choices: tuple[str | None, ...] = ()) -> Any:
    """A field of a configuration: its default, or a class or function that makes it, its line in
    `--help`, and the values it may have, if they are few."""
    metadata = {"help": help, "choices": choices}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# least and greatest value of numbers whose names do not say it; whole numbers are at least 1
# besides
RANGES = {
    "learning_rate": (1e-12, 10.0),
    "fake_learning_rate": (1e-12, 10.0),
    "muon_learning_rate": (0.0, 10.0),
    "weight_decay": (0.0, 10.0),
    "max_grad_norm": (1e-12, 1e12),
    "ema_half_life": (0.0, 100.0),
    "cooldown_share": (0.0, 1.0),
    "spike_factor": (0.0, 1e12),
    "guidance_scale": (0.0, 1e3),
    "regression_weight": (0.0, 1e6),
    "perceptual_weight": (0.0, 1e6),
    "validation_fraction": (1e-6, 1.0 - 1e-6),
    "flip": (0.0, 1.0),
    "warmup_steps": (0, 2**40),
    "shift": (0, 2**40),
    "max_skipped": (0, 2**40),
    "seed": (0, 2**32 - 1),  # of NumPy
    "num_workers": (0, 1024),
    "num_samples": (0, 2**20),
}
MOST = 2**40  # of whole numbers


def check_numbers(config: object, prefix: str = "") -> None:
    """Raise `ValueError` for the first number of `config` that is beyond what it can mean; NaN is
    beyond everything."""
    for key, value in vars(config).items():
        # a bool is an int to Python
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        # what has no range of its own counts something, at least 1
        low, high = RANGES.get(key, (1, MOST))
        if not low <= value <= high:
            # whole numbers as they are, not as 1.09951e+12
            least, most = (str(end) if isinstance(end, int) else f"{end:g}" for end in (low, high))
            raise ValueError(f"`{prefix}{key}` ({value}) must be between {least} and {most}.")


def check_choices(config: Any, prefix: str = "") -> None:
    """Raise `ValueError` for the first field of `config` that has none of its choices."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        choices = field.metadata["choices"]
        if choices and value not in choices:
            *others, last = ("null" if choice is None else choice for choice in choices)
            raise ValueError(
                f"`{prefix}{field.name}` ({value!r}) must be {', '.join(others)} or {last}."
            )


def check_finite(value: Any, name: str) -> None:
    """Raise `ValueError` if a number in nested settings is NaN or infinite; what else they may be,
    whoever reads them checks."""
    if isinstance(value, dict):
        for key, part in value.items():
            check_finite(part, f"{name}.{key}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"`{name}` ({value}) must be finite.")


@dataclass
class DataConfig:
    """Where the training data come from.

    `train` is a Hub dataset name, a local .txt / .json / .jsonl / .parquet file, a folder of such
    files, a list of those or of `{path, field, fields, modality, weight, max_samples, fraction,
    name}`, or a .yaml file with such a list. `validation` is the same, or None to hold out the last
    `validation_fraction` of the documents.
    """

    train: Any = option(
        "", "file, folder or Hub dataset, a list of those, or a .yaml file with a list"
    )
    validation: Any = option(
        None, "the same for validation; null holds out the end of the training data"
    )
    name: str | None = option(None, "configuration of a Hub dataset, e.g. wikitext-2-raw-v1")
    text_column: str = option("text", "field that holds the text")
    image_column: str = option("image", "field that holds pictures or clips")
    caption_column: str | None = option(
        None,
        "field that holds their captions; null: caption or text, if there is one; none: no "
        "captions",
    )
    fields: dict[str, str] | None = option(
        None, "several streams: which field holds which, e.g. {text: caption}"
    )
    frame_folders: bool = option(False, "every folder of pictures is one clip")
    streaming: bool = option(False, "read and tokenize text on the fly")
    validation_fraction: float = option(
        0.02, "share of the documents to hold out if there is no validation set"
    )
    shuffle_buffer: int = option(1000, "documents to shuffle at a time when streaming")
    kind: str | None = option(
        None,
        "of a folder of several kinds: text, pictures, sounds or records; null: the preset's",
        (*MEDIA_READ, None),
    )
    encoding: str | None = option(None, "of text files without a byte-order mark; null: UTF-8")
    max_skipped: int = option(0, "unreadable records that are left out before it is an error")
    num_proc: int = option(1, "processes that tokenize")
    allow_changed: bool = option(
        False, "go on with a run although its data are others than those it began with"
    )

    @property
    def captions(self) -> str:
        """The column of the records that are read that holds captions, if there are any."""
        return self.caption_column or "caption"

    @property
    def wants_text(self) -> bool:
        """Whether texts are read, whatever else the data hold."""
        return self.kind == "text"

    def __post_init__(self):
        check_choices(self, "data.")
        check_numbers(self, "data.")


@dataclass
class LoopConfig:
    """What every stage has: its length, its batches, its average and its checkpoints. Intervals are
    optimizer steps."""

    max_steps: int = option(1000, "optimizer steps")
    batch_size: int = option(16, "rows per micro-batch and process")
    gradient_accumulation_steps: int = option(1, "micro-batches per optimizer step")
    sequence_length: int = option(256, "tokens per row of text")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    ema_half_life: float = option(
        0.0, "half-life of the averaged weights, as a share of max_steps; 0: no average"
    )
    flip: float = option(0.0, "pictures and clips: share of the rows that are mirrored")
    shift: int = option(0, "pictures and clips: most pixels that a row is moved by, either way")
    checkpoint_steps: int = option(500, "steps between checkpoints")
    checkpoints_total_limit: int = option(2, "checkpoints to keep")


@dataclass
class StageConfig(LoopConfig):
    """Optimisation of the stage `codec`, `flow` or `head`."""

    muon_learning_rate: float = option(
        0.0, "learning rate of Muon for inner matrices; 0 leaves them to AdamW"
    )
    weight_decay: float = option(0.01, "weight decay of matrices")
    warmup_steps: int = option(100, "steps of linear warm-up")
    cooldown_share: float = option(
        0.0, "share of max_steps in which a constant rate falls to 0; 0: a cosine instead"
    )
    max_skipped_steps: int = option(10, "bad updates left out in a row before the run stops")
    spike_factor: float = option(
        20.0, "a gradient norm this many times its average is a bad update; 0: never"
    )
    eval_steps: int = option(500, "steps between validations")
    eval_batches: int = option(8, "batches per validation")
    objective: dict[str, Any] = option(
        dict, "settings of the loss, such as flow.objective.infill_rate; see objective_tokcom.py"
    )


@dataclass
class DistillConfig(LoopConfig):
    """Optimisation of the stage `distill`: a student of a few sampling steps learns from the
    teacher `init_from`."""

    batch_size: int = option(32, "rows per micro-batch and process")
    learning_rate: float = option(1e-4, "learning rate of the student")
    ema_half_life: float = option(
        0.05, "half-life of the student's averaged weights, as a share of max_steps"
    )
    checkpoint_steps: int = option(100, "steps between checkpoints")
    method: str = option(
        "both",
        "dmd (distribution matching), regression (on the teacher's trajectories) or both",
        ("dmd", "regression", "both"),
    )
    num_inference_steps: int = option(4, "sampling steps of the student")
    guidance_scale: float | None = option(
        None,
        "guidance of the teacher, which the student learns to do without; null: the teacher's own",
    )
    fake_updates: int = option(
        5, "updates of the model of the student's samples per update of the student"
    )
    fake_learning_rate: float = option(2e-4, "learning rate of the model of the student's samples")
    regression_weight: float = option(0.25, "weight of the regression in method both")
    num_pairs: int = option(512, "trajectories of the teacher for the regression")
    pair_steps: int = option(32, "Euler steps of each trajectory")


@dataclass
class TrainConfig:
    """Everything that `train_accelerate.py` needs to know."""

    preset: str = option("debug", "preset, or YAML file, of the model's shape")
    model: dict[str, Any] = option(
        dict, "overrides of the model's configuration, with the keys of config.json"
    )
    init_from: str | None = option(
        None, "model directory or Hub id to start from (stage distill: the teacher)"
    )
    codec_from: str | None = option(
        None, "model directory or Hub id whose codec a new transformer is trained for"
    )
    tokenizer: str | None = option(
        None, "any AutoTokenizer; null trains a BPE tokenizer on the data"
    )
    tokenizer_vocab_size: int = option(512, "vocabulary of a tokenizer that is trained")
    stage: str = option(
        "all", "codec, flow, head, distill, or all (codec, then flow)", (*STAGES, "all")
    )
    output_dir: str = option("tokcom-out", "where checkpoints and the finished model go")
    seed: int = option(0, "seed of weights, data order and noise")
    mixed_precision: str | None = option(
        None,
        "auto (bf16 where it is fast), no, bf16, fp16; null: as launched",
        ("auto", "no", "bf16", "fp16", None),
    )
    gradient_checkpointing: bool = option(
        False, "compute activations again in the backward pass, to save memory"
    )
    attention: str = option(
        "sdpa", "sdpa, sdpa_float32, eager, ...; auto times them on a CPU and keeps the fastest"
    )
    torch_compile: bool = option(
        False, "compile the network; the first step takes about a minute longer"
    )
    autoencoder: str | None = option(
        None, "clips: directory or Hub id of an AutoencoderKL* whose latents are learnt"
    )
    perceptual_model: str | None = option(
        None, "images, stage codec: AutoModel whose features are compared, too"
    )
    perceptual_weight: float = option(0.1, "weight of that comparison")
    cache_latents: bool = option(
        False, "stages flow and head: encode the training text once, to a file"
    )
    num_workers: int = option(0, "processes that load data, per training process")
    report_to: str = option(
        "tensorboard",
        "tensorboard, wandb, trackio or none",
        ("tensorboard", "wandb", "trackio", "none"),
    )
    resume: bool = option(True, "go on from the newest checkpoint in output_dir")
    num_samples: int = option(2, "rows of the tables of samples; 0: none")
    push_to_hub: bool = option(False, "push the finished model to the Hub")
    hub_model_id: str | None = option(
        None, "user/name of the repository; null: the name of output_dir"
    )
    hub_private: bool | None = option(
        None, "whether the repository is private; null: the account's default"
    )
    hub_license: str | None = option(None, "licence of the model, for its card, e.g. mit")
    data: DataConfig = option(DataConfig, "where the training data come from")
    codec: StageConfig = option(StageConfig, "stage codec: tokens <-> latents")
    flow: StageConfig = option(StageConfig, "stage flow: noise -> latents")
    head: StageConfig = option(StageConfig, "stage head: a head between estimate and decoder")
    distill: DistillConfig = option(DistillConfig, "stage distill: a student of a few steps")

    def __post_init__(self):
        if self.mixed_precision == "False":  # YAML reads a bare `no` as false
            self.mixed_precision = "no"
        # choices first: a stage that does not exist would be taken for one without requirements
        check_choices(self)
        check_choices(self.distill, "distill.")
        if self.stage in ("head", "distill") and not self.init_from:
            raise ValueError(
                f"stage {self.stage!r} starts from a finished model; give its directory as "
                "`init_from`."
            )
        if not self.data.train:
            raise ValueError(
                "no training data; give `data.train` a file, a folder or the name of a Hub dataset."
            )
        if self.init_from and self.codec_from:
            raise ValueError(
                f"`init_from` ({self.init_from}) brings its own codec; remove `codec_from`."
            )
        if self.codec_from and (self.stage != "flow" or "codec_config" in self.model):
            raise ValueError(
                "`codec_from` reuses a finished codec: set stage=flow and no model.codec_config.*."
            )
        check_numbers(self)
        for name in STAGES:
            check_numbers(getattr(self, name), f"{name}.")
            check_finite(getattr(getattr(self, name), "objective", {}), f"{name}.objective")
        if self.stage == "distill":
            self._check_distillation()
        if self.push_to_hub or self.hub_model_id:
            self._check_hub_name()

    def _check_hub_name(self) -> None:
        # imported here, because most runs are not pushed
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        name = self.hub_model_id or Path(self.output_dir).resolve().name
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            key = "hub_model_id" if self.hub_model_id else "output_dir"
            # without the advice for callers of the library
            reason = str(error).partition(". Use")[0].rstrip(".")
            raise ValueError(
                f"`{key}` ({name!r}) is not a valid repository id: give hub_model_id=user/name "
                f"({reason})."
            ) from error

    def _check_distillation(self) -> None:
        if self.mixed_precision == "fp16":
            raise ValueError(
                "`mixed_precision` (fp16) needs a scaled loss, which stage distill lacks; use auto "
                "or bf16."
            )
        if self.data.streaming:
            raise ValueError(
                "stage distill draws rows at random, which a stream cannot; set "
                "data.streaming=false."
            )
        if self.cache_latents:
            raise ValueError(
                "stage distill encodes the rows that it draws; set cache_latents=false."
            )
        if self.torch_compile:
            raise ValueError("stage distill compiles nothing; set torch_compile=false.")
        if self.model:
            raise ValueError(
                f"a student has its teacher's configuration; remove model.{sorted(self.model)[0]}."
            )

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages to train, in order."""
        return ("codec", "flow") if self.stage == "all" else (self.stage,)


def known_keys(
    cls: type = TrainConfig, prefix: str = ""
) -> Iterator[tuple[str, dataclasses.Field]]:
    """Every dotted key of a configuration class with its field, the nested ones after their
    parents."""
    nested = []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            nested.append(field)
        else:
            yield f"{prefix}{field.name}", field
    # after the plain keys, so that --help begins with those that people set
    for field in nested:
        assert isinstance(field.type, type)
        yield from known_keys(field.type, f"{prefix}{field.name}.")


def load_train_config(preset: str, overrides: list[str]) -> TrainConfig:
    """Read `presets/<preset>.yaml` (or a path to a YAML file) and apply `dotted.key=value`
    overrides.

    Values are YAML, so `flow.max_steps=100`, `data.validation=null` and lists work. Raises
    `ValueError` for unknown presets and keys, and for values of the wrong type.
    """
    values = read_preset(preset)
    # `preset_config` reads the preset's; `model.*` holds what is overridden
    values.pop("model", None)
    values["preset"] = preset
    alone = OmegaConf.structured(TrainConfig)
    before = alone.data.train
    with _explained_errors():
        for override in overrides:
            _apply(alone, override)
    if alone.data.train != before:  # they give training data of their own
        forget_data(values)
    return build_config(values, overrides)


def as_override(key: str, value: Any) -> str:
    """`key=value` that is read as exactly this value: YAML would take the folder 007 for a number,
    and what follows a # for a comment."""
    return f"{key}={json.dumps(str(value), ensure_ascii=False)}"


def build_config(values: dict[str, Any], overrides: list[str]) -> TrainConfig:
    """A configuration from nested `values` and overrides of them; raises `ValueError`."""
    config = OmegaConf.structured(TrainConfig)
    with _explained_errors():
        config = OmegaConf.merge(config, values)
        for override in overrides:
            _apply(config, override)
        return OmegaConf.to_object(config)


def _apply(config: DictConfig, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        # what names a file was meant as another source of data
        is_source = kind_of(override) is not None or os.path.exists(override)
        remedy = "several sources are data.train=[a.txt,b.jsonl]" if is_source else None
        raise ValueError(
            f"override {override!r} must have the form key=value; "
            f"{remedy or 'for example flow.max_steps=100'}."
        )
    # parsed as YAML under a name of its own, since the key may have dots in it
    try:
        value = OmegaConf.from_dotlist([f"value={text}"])["value"]
    except yaml.YAMLError as error:
        raise ValueError(
            f"override {override!r} is no YAML; put its value in quotes, {key}='\"...\"'."
        ) from error
    # a section is completed; any other value, also a dictionary such as data.fields, is replaced
    is_section = dataclasses.is_dataclass(
        {f.name: f.type for f in dataclasses.fields(TrainConfig)}.get(key)
    )
    OmegaConf.update(config, key, value, merge=is_section)


@contextlib.contextmanager
def _explained_errors() -> Iterator[None]:
    """Turn OmegaConf's errors into a `ValueError` that names the key, its type and near misses."""
    try:
        yield
    except OmegaConfBaseException as error:
        key = error.full_key or str(error)
        fields = dict(known_keys())
        if isinstance(error, ConfigKeyError | ConfigAttributeError):
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "--help lists all keys."
            raise ValueError(f"unknown training key {key!r}; {hint}") from error
        # the lines after it are OmegaConf's internals
        reason = str(error).splitlines()[0].rstrip(".")
        if key not in fields:
            raise ValueError(f"`{key}` cannot be set: {reason}.") from error
        kind = getattr(fields[key].type, "__name__", str(fields[key].type))
        raise ValueError(f"`{key}` must be of type {kind}: {reason}.") from error
