"""Training configuration: one YAML preset plus `key=value` overrides, checked before anything is loaded."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
PRESET_DIR = ROOT / "presets"


@dataclass
class DataConfig:
    """Where text or pictures come from.

    `train` is a Hub dataset name, a local .txt / .json / .jsonl / .parquet file, a folder of such files, a list of
    those or of `{path, field, fields, modality, weight, max_samples, fraction, name}`, or a .yaml file with such a list. `validation` is the same, or None to hold out the last `validation_fraction` of the documents.
    """

    train: str | dict | list[str | dict] = ""
    validation: str | dict | list[str | dict] | None = None
    name: str | None = None  # configuration of a Hub dataset, e.g. wikitext-2-raw-v1
    text_column: str = "text"
    image_column: str = (
        "image"  # of records without text: pictures or clips, with captions in `caption_column`, if that exists
    )
    fields: dict[str, str] | None = None  # of several streams: name of the stream -> field of the records
    frame_folders: bool = False  # every folder of pictures is a clip
    caption_column: str = "caption"
    streaming: bool = False
    validation_fraction: float = 0.02
    shuffle_buffer: int = 1000  # documents, streaming only
    kind: str | None = (
        None  # of a folder that holds several kinds: text, pictures, sounds or records; None: the preset's
    )
    encoding: str | None = None  # of text files without a byte-order mark; None is UTF-8
    max_skipped: int = 0  # records that cannot be read and are left out, before it is an error
    num_proc: int = 1  # processes that tokenize

    def __post_init__(self):
        if self.kind not in (None, "text", "pictures", "sounds", "records"):
            raise ValueError(f"`data.kind` ({self.kind!r}) must be text, pictures, sounds or records, or null.")
        if self.max_skipped < 0 or self.num_proc < 1:
            raise ValueError(
                f"`data.max_skipped` ({self.max_skipped}) must be at least 0, `data.num_proc` ({self.num_proc}) at least 1."
            )


@dataclass
class StageConfig:
    """Optimisation of one stage; lengths in tokens, intervals in optimizer steps."""

    max_steps: int = 1000
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    sequence_length: int = 256
    learning_rate: float = 1e-3  # of AdamW
    muon_learning_rate: float = 0.0  # of Muon on the matrices inside the network; 0 leaves them to AdamW
    weight_decay: float = 0.01
    warmup_steps: int = 100
    cooldown_share: float = (
        0.0  # of max_steps: the rate is constant and falls at the end; 0 is a cosine from the start
    )
    max_grad_norm: float = 1.0
    max_skipped_steps: int = 10  # updates in a row left out for a loss or gradient that is not finite, or for a spike
    spike_factor: float = 20.0  # a gradient norm so many times its average is a spike; 0: no spikes
    ema_half_life: float = 0.0  # share of max_steps; 0 switches the average off
    eval_steps: int = 500
    eval_batches: int = 8
    checkpoint_steps: int = 500
    checkpoints_total_limit: int = 2


@dataclass
class TrainConfig:
    """Everything `train_accelerate.py` needs to know."""

    model_preset: str = "debug"
    model: dict[str, Any] = field(default_factory=dict)  # overrides of the preset, same keys as config.json
    init_from: str | None = None  # model directory or Hub id whose weights and configuration training starts from
    codec_from: str | None = None  # model directory or Hub id whose codec a new transformer is trained for
    tokenizer: str | None = None  # any AutoTokenizer; None trains a BPE tokenizer on the data
    tokenizer_vocab_size: int = 512
    stage: str = "all"  # codec, flow, head or all (codec and flow)
    output_dir: str = "tokcom-out"
    seed: int = 0
    mixed_precision: str | None = None  # auto (bf16 where it is fast), no, bf16, fp16; None: accelerate's setting
    gradient_checkpointing: bool = False
    attention: str = (
        "sdpa"  # of transformers: sdpa, eager, ...; auto times them once on a CPU, and takes sdpa elsewhere
    )
    torch_compile: bool = False  # the network that is trained; the first step takes a minute longer
    autoencoder: str | None = (
        None  # of clips: an AutoencoderKL* of diffusers, directory or Hub id, whose latents are learnt
    )
    perceptual_model: str | None = None  # of images, stage codec: AutoModel whose features are compared, too
    perceptual_weight: float = 0.1
    cache_latents: bool = False  # stage flow or head: encode the training text once, to a file in output_dir/run
    num_workers: int = 0
    report_to: str = "tensorboard"  # tensorboard, wandb, trackio or none
    resume: bool = True  # continue from the newest checkpoint in output_dir
    num_samples: int = 2  # rows of the sample tables
    push_to_hub: bool = False
    hub_model_id: str | None = None  # user/name
    hub_private: bool | None = None
    hub_license: str | None = None  # of the model, for its card, e.g. mit
    data: DataConfig = field(default_factory=DataConfig)
    codec: StageConfig = field(default_factory=StageConfig)
    flow: StageConfig = field(default_factory=StageConfig)
    head: StageConfig = field(default_factory=StageConfig)

    def __post_init__(self):
        if self.mixed_precision is False:  # YAML 1.1 reads a bare `no` as false
            self.mixed_precision = "no"
        if self.mixed_precision not in (None, "auto", "no", "bf16", "fp16"):
            raise ValueError(f"`mixed_precision` ({self.mixed_precision!r}) must be auto, no, bf16 or fp16.")
        if self.stage not in ("codec", "flow", "head", "all"):
            raise ValueError(f"`stage` ({self.stage!r}) must be 'codec', 'flow', 'head' or 'all'.")
        if self.stage == "head" and not self.init_from:
            raise ValueError(
                "stage 'head' trains a latent head on a finished model; give its directory as `init_from`."
            )
        if self.report_to not in ("tensorboard", "wandb", "trackio", "none"):
            raise ValueError(f"`report_to` ({self.report_to!r}) must be tensorboard, wandb, trackio or none.")
        if not self.data.train:
            raise ValueError("no training text; give `data.train` a file, a folder or the name of a Hub dataset.")
        if self.init_from and self.codec_from:
            raise ValueError(f"`init_from` ({self.init_from}) brings its own codec; remove `codec_from`.")
        if self.codec_from and (self.stage != "flow" or "codec_config" in self.model):
            raise ValueError("`codec_from` reuses a finished codec: set stage=flow and no model.codec_config.*.")
        for name in ("codec", "flow", "head"):
            for key, value in vars(getattr(self, name)).items():
                if isinstance(value, int) and key != "warmup_steps" and value < 1:
                    raise ValueError(f"`{name}.{key}` ({value}) must be at least 1.")


def refuse_other_settings(output_dir: str, started: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `ValueError` for the first of the settings `now` that is not what `output_dir` was started with."""
    for key, value in now.items():
        if started.get(key) != value:
            raise ValueError(
                f"{output_dir} was started with {key}={started.get(key)!r}, now it is {value!r}; choose another output_dir."
            )


def _build(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    kwargs = {}
    for key, value in values.items():
        if key not in fields:
            raise ValueError(f"unknown training key '{prefix}{key}'; known are {', '.join(sorted(fields))}.")
        nested = fields[key].type
        if isinstance(value, dict) and dataclasses.is_dataclass(nested):
            value = _build(nested, value, f"{prefix}{key}.")
        elif fields[key].type in (int, float, bool, str):
            value = _cast(value, fields[key].type, f"{prefix}{key}")
        kwargs[key] = value
    return cls(**kwargs)


def _cast(value: Any, kind: type, name: str) -> Any:
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-3 as a string
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"`{name}` ({value!r}) must be of type {kind.__name__}.")
    return value


def load_train_config(preset: str, overrides: list[str]) -> TrainConfig:
    """Read `presets/<preset>.yaml` (or a path to a YAML file) and apply `dotted.key=value` overrides.

    Values are YAML, so `flow.max_steps=100`, `validation=null` and lists work. Raises `ValueError` on unknown presets,
    keys and types.
    """
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else PRESET_DIR / f"{preset}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PRESET_DIR.glob("*.yaml")))
        raise ValueError(f"no training preset at {path}; known presets are {known}.")
    values = yaml.safe_load(path.read_text()) or {}
    for key, source in values.get("data", {}).items():
        if isinstance(source, str) and (ROOT / source).exists():  # text that ships with the repository
            values["data"][key] = str(ROOT / source)
    given = {override.partition("=")[0] for override in overrides}
    if "data.train" in given and "data.validation" not in given:  # the preset's validation text belongs to its own
        values.setdefault("data", {})["validation"] = None
    return load_overrides(TrainConfig, values, overrides)


def load_overrides(cls: type, values: dict[str, Any], overrides: list[str]) -> Any:
    """A configuration of class `cls` from nested `values` and `dotted.key=value` overrides of them; `ValueError` as above."""
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"override {override!r} must have the form key=value, e.g. flow.max_steps=100.")
        *parents, leaf = key.split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
        target[leaf] = yaml.safe_load(value)
    return _build(cls, values)
