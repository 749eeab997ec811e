"""What can be known before any stage begins: that windows fit the model, and that the data give at
least one batch."""

import dataclasses

from accelerate import PartialState
from torch.utils.data import Dataset

from tokcom.modeling_tokcom import TokComModel
from tokcom.training.build import has_trainable_codec
from tokcom.training.config import LoopConfig, TrainConfig
from tokcom.training.corpora import Corpus, PictureCorpus


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
