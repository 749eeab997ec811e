"""Which pipeline belongs to which model: `tokcom.load_pipeline` and `tokcom.build_pipeline`.

On the Hub `model_index.json` names the class, so this file does not run there. It lies beside the
code that builds and exports models; `cli/` and `evaluation/` load theirs through it too.
"""

import os
from pathlib import Path
from typing import Any

from diffusers import ModelMixin, SchedulerMixin
from transformers import PreTrainedTokenizerBase

from tokcom.configuration_tokcom import TokComConfig
from tokcom.integrity_tokcom import check_files, verified
from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_base_tokcom import TokComBasePipeline
from tokcom.pipeline_media_tokcom import (
    TokComImagePipeline,
    TokComOmniPipeline,
    TokComVideoPipeline,
)
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler

# of `from_pretrained`, those that the configuration is loaded with, too
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
PIPELINES: dict[str, type[TokComBasePipeline]] = {
    pipeline.modality: pipeline
    for pipeline in (TokComPipeline, TokComImagePipeline, TokComVideoPipeline, TokComOmniPipeline)
}


def pipeline_class(config: TokComConfig) -> type[TokComBasePipeline]:
    """The pipeline that runs models of this configuration."""
    return PIPELINES[config.codec_config.modality]


def build_pipeline(
    model: TokComModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scheduler: SchedulerMixin | None = None,
    vae: ModelMixin | None = None,
) -> TokComBasePipeline:
    """A pipeline of the right class, by default with the scheduler that training implies."""
    scheduler = scheduler or TokComFlowMatchScheduler.from_model_config(model.config)
    components = {} if vae is None else {"vae": vae}
    return pipeline_class(model.config)(model, scheduler, tokenizer, **components)


def load_pipeline(
    path: str | os.PathLike | None = None, verify: bool = False, **kwargs: Any
) -> TokComBasePipeline:
    """Load a directory or a Hub repository with the pipeline of its modality.

    Without a `path` it is the model that ships with tokcom. With `verify` the files are first
    compared with the repository's `checksums.json`. `kwargs` are those of
    `DiffusionPipeline.from_pretrained`, such as `dtype` and `revision`. Raises `ValueError` or
    `FileNotFoundError` that names what is missing or damaged.
    """
    # the repository itself is a model directory
    path = Path(__file__).parents[1] if path is None else path
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    if verify:
        path = verified(path, **{name: hub[name] for name in hub if name != "proxies"})
    # a local directory may be incomplete; what comes from the Hub was checked by its client
    if os.path.isdir(path):
        check_files(path)
    config = TokComConfig.from_pretrained(path, **hub)
    return pipeline_class(config).from_pretrained(path, **kwargs)


__all__ = ["PIPELINES", "build_pipeline", "load_pipeline", "pipeline_class"]
