"""TokCom: latent generative models of tokens.

The directory of this file is the package `tokcom` and a repository for the Hub at once. Nothing is
imported until it is asked for, so that `import tokcom` costs nothing.
"""

from importlib import import_module

# public name -> the module that defines it
_MODULES = {
    "TokComConfig": "configuration_tokcom",
    "TokComModel": "modeling_tokcom",
    "TokComForCausalLM": "modeling_causal_tokcom",
    "TokComOutput": "objective_tokcom",
    "TokComFlowMatchScheduler": "scheduling_tokcom",
    "TokComPipeline": "pipeline_tokcom",
    "TokComPipelineOutput": "pipeline_tokcom",
    "TokComImagePipeline": "pipeline_media_tokcom",
    "TokComVideoPipeline": "pipeline_media_tokcom",
    "TokComOmniPipeline": "pipeline_media_tokcom",
    "build_pipeline": "training.pipelines",
    "load_pipeline": "training.pipelines",
}
__all__ = list(_MODULES)
__version__ = "0.2.0"


def __getattr__(name: str):  # called for names that the module does not have yet (PEP 562)
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module 'tokcom' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
