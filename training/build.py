"""The model that a stage starts from: a new one, one that starts from another's weights, or what an
earlier stage left."""

import contextlib
import os

import torch
from transformers import PreTrainedTokenizerBase

from tokcom.configuration_tokcom import TokComConfig
from tokcom.modeling_tokcom import TokComModel
from tokcom.processing_tokcom import vocabulary_size
from tokcom.training.config import TrainConfig
from tokcom.training.corpora import Corpus
from tokcom.training.directory import RunDirectory
from tokcom.training.presets import merge_overrides, preset_config
from tokcom.training.sharding import Part, ShardedBuild, empty_model, load_sharded, read_shards


def model_of_stage(
    config: TrainConfig,
    stage: str,
    corpus: Corpus,
    directory: RunDirectory,
    part: Part | None = None,
) -> TokComModel:
    """The model that `stage` starts from, in float32; with `part` the shards of a process alone.

    The flow stage goes on with the codec that this run has trained. Raises `ValueError` if there is
    none and nothing else brings a trained codec.
    """
    if takes_own_codec(config, stage, directory):
        model = _load(directory.final("codec"), part)
        corpus.measure_rest(model)
        return model
    # without a donor the data are compared with the preset, which `check_sizes` does
    if donor := config.init_from or config.codec_from:
        codec_config = run_config(config, None).codec_config
        corpus.check_codec(codec_config, config.data, donor)
    model = build_model(config, corpus.tokenizer, part)
    # a whole model has learnt with the statistics that it has
    if stage != "flow" or config.init_from:
        return model
    if config.codec_from:
        corpus.measure_rest(model)
        return model
    check_trained_codec(model, directory)
    corpus.measure(model)  # the only thing that a codec without parameters has to learn
    return model


def takes_own_codec(config: TrainConfig, stage: str, directory: RunDirectory) -> bool:
    """Whether a stage goes on with the codec that this run has trained."""
    # a lone stage flow with a donor means the donor's codec, not one that lies there from before
    wanted = config.stage == "all" or not (config.init_from or config.codec_from)
    return stage == "flow" and wanted and (directory.final("codec") / "config.json").is_file()


def check_trained_codec(model: TokComModel, directory: RunDirectory) -> None:
    """Raise `ValueError` if stage flow would begin with a codec that nothing has trained."""
    if has_trainable_codec(model):
        raise ValueError(
            f"stage 'flow' needs a trained codec and {directory.root} has none; train it first "
            "(stage=codec or stage=all), or give `codec_from` or `init_from`."
        )


def _load(path: str | os.PathLike, part: Part | None) -> TokComModel:
    if part is None:
        return TokComModel.from_pretrained(path, dtype=torch.float32)
    return load_sharded(path, part)


def _new(config: TokComConfig, part: Part | None) -> TokComModel:
    with contextlib.nullcontext() if part is None else ShardedBuild(part):
        return TokComModel(config)


def has_trainable_codec(model: TokComModel) -> bool:
    """Whether there is anything to train in stage `codec`."""
    return any(True for _ in model.codec.parameters())


def build_model(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase | None, part: Part | None = None
) -> TokComModel:
    """A new model of the preset, or one that starts from `init_from` (all weights) or `codec_from`
    (the codec's).

    `config.model` overrides the preset's configuration, or that of `init_from`. Raises `ValueError`
    when weights do not fit the configuration or the tokenizer has another vocabulary.
    """
    donor = config.init_from or config.codec_from
    size = None if tokenizer is None else vocabulary_size(tokenizer)
    if donor is None:
        model = _new(preset_config(config.preset, size, **config.model), part)
    else:
        source = _load(donor, None) if part is None else empty_model(donor, part)
        model = _new(derived_config(config, source.config, size), part)
        codec_only = config.init_from is None
        _load_weights(model, source, donor, codec_only)
        if part is not None:  # so far it is known that they fit
            read_shards(model, donor, part, codec_only)
    # one more than the tokenizer's ids: the pad token, which is also the mask
    if model.config.text_vocab_size != (0 if size is None else size + 1):
        raise ValueError(
            f"the model has {model.config.text_vocab_size} tokens (with its mask token) but the "
            f"tokenizer has {size}; use the tokenizer saved beside the model."
        )
    return model


def run_config(config: TrainConfig, vocab_size: int | None) -> TokComConfig:
    """The configuration of the model that a run trains, of a tokenizer of `vocab_size` tokens."""
    donor = config.init_from or config.codec_from
    if donor is None:
        return preset_config(config.preset, vocab_size, **config.model)
    return derived_config(config, TokComConfig.from_pretrained(donor), vocab_size)


def outline(config: TokComConfig) -> TokComModel:
    """A model without weights: nothing is allocated, and the random numbers that weights would
    draw are left for the model of the run."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return TokComModel(config)


def _load_weights(model: TokComModel, source: TokComModel, donor: str, codec_only: bool) -> None:
    """Copy the weights of `source`, which was loaded from `donor`; a latent head that it lacks
    keeps its initialisation."""
    target = model.codec if codec_only else model
    weights = source.codec.state_dict() if codec_only else source.state_dict()
    if not codec_only and model.latent_head is not None and source.latent_head is None:
        weights |= {
            f"latent_head.{name}": value for name, value in model.latent_head.state_dict().items()
        }
    try:
        target.load_state_dict(weights)
    except RuntimeError as error:
        # the first line only says that loading failed, the second names a tensor
        problem = str(error).splitlines()[1].strip()
        raise ValueError(
            f"the weights of {donor} do not fit the overrides in `model`: {problem}"
        ) from error


def derived_config(
    config: TrainConfig, source: TokComConfig, vocab_size: int | None = None
) -> TokComConfig:
    """The configuration of a model that starts from one with configuration `source`, or from its
    codec only.

    `vocab_size` is the number of ids of text, which a codec of pictures does not know.
    """
    codec = source.codec_config.to_dict()
    if config.init_from:
        fields = source.to_dict()
    else:
        fields = preset_config(config.preset, vocab_size).to_dict()
        # the new transformer must read the latents of the codec that it is given
        fields["transformer_config"]["latent_channels"] = source.codec_config.latent_channels
    fields["codec_config"] = codec
    merge_overrides(fields, config.model)
    return TokComConfig(**fields)
