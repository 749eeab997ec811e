"""What can be known before any stage begins: that windows fit the model, and that the data give at
least one batch. What can be known before the data are read is in `plan.py`."""

import dataclasses

from accelerate import PartialState
from torch.utils.data import Dataset

from tokcom.modeling_tokcom import TokComModel
from tokcom.processing_tokcom import vocabulary_size
from tokcom.training.build import has_trainable_codec, outline, run_config
from tokcom.training.config import LoopConfig, TrainConfig
from tokcom.training.corpora import Corpus, PictureCorpus, Reading
from tokcom.training.sources import read_sources


def check_run(config: TrainConfig, corpus: Corpus) -> None:
    """Raise `ValueError` if a run would refuse the data of `corpus`, of which nothing is held
    out."""
    if config.stage == "distill":  # its teacher is no outline
        return
    # a stream may be read by one model only, and weights and streams ask for validation data
    weighted = any(source.weight is not None for source in read_sources(config.data.train))
    if not (corpus.streamed or weighted):
        _check_outline(config, corpus)
        try:
            _check_outline(_with_batches(config, 2), corpus)
            return
        except ValueError:
            pass  # so little that what is held out may decide
    _check_outline(config, Reading(config).corpus())


def _check_outline(config: TrainConfig, corpus: Corpus) -> None:
    size = None if corpus.tokenizer is None else vocabulary_size(corpus.tokenizer)
    expected = run_config(config, size)
    corpus.check_codec(expected.codec_config, config.data, config.init_from or config.codec_from)
    check_sizes(config, outline(expected), corpus, list(config.stages), PartialState())


def _with_batches(config: TrainConfig, factor: int) -> TrainConfig:
    """The settings with `factor` times as many rows in a batch of every stage."""
    stages = {name: getattr(config, name) for name in config.stages}
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(options, batch_size=factor * options.batch_size)
            for name, options in stages.items()
        },
    )


def check_sizes(
    config: TrainConfig, model: TokComModel, corpus: Corpus, stages: list[str], state: PartialState
) -> None:
    """Raise `ValueError` if the data do not fit the settings of one of `stages`."""
    # caching waits for the trained codec
    uncached = dataclasses.replace(config, cache_latents=False)
    # every stage sets an objective of its own; the first one needs the one it had
    before = model.objective
    for stage in stages:
        if stage == "codec" and not has_trainable_codec(model):
            continue
        options = getattr(config, stage)
        model.set_stage(stage, **options.objective)  # names bad settings of the loss, too
        train, held_out = corpus.datasets(model, uncached, options, state)
        check_rows(corpus, train, stage, options, state.num_processes)
        check_moves(corpus, stage, options)
        if not len(held_out):
            raise ValueError(
                "the validation data give no row; give more, or data.validation=null to hold some "
                "out."
            )
    model.objective = before


def check_moves(corpus: Corpus, stage: str, options: LoopConfig) -> None:
    """Raise `ValueError` if pictures are to be moved and there are none."""
    if (options.flip or options.shift) and not isinstance(corpus, PictureCorpus):
        raise ValueError(
            f"`{stage}.flip` ({options.flip}) and `{stage}.shift` ({options.shift}) move "
            "pictures and clips, and the data are neither; set both to 0."
        )


def check_rows(
    corpus: Corpus, dataset: Dataset, stage: str, options: LoopConfig, processes: int
) -> None:
    """Raise `ValueError` if the training data of a stage give less than one batch; how long a
    stream is, nobody knows."""
    if corpus.streamed or len(dataset) >= options.batch_size * processes:
        return
    raise ValueError(
        f"the training data give {len(dataset)} {corpus.rows.format(options.sequence_length)}, "
        f"fewer than one batch of {options.batch_size} on {processes} process(es); lower "
        f"{stage}.batch_size or {stage}.sequence_length, or give more data."
    )
