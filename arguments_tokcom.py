"""Calls with an unknown argument: the error names it, and the argument that was probably meant.

`explain_unknown_arguments` wraps every public method of a pipeline (`TokComBasePipeline.__init_subclass__`), so the
methods themselves keep plain signatures without `**kwargs`.
"""

import functools
import inspect
from collections.abc import Callable
from difflib import get_close_matches

LENGTHS = ("gen_length", "gap_length", "num_chunks", "num_frames")
# what other tools call an argument -> what it may be here; the first that a method has is meant
ELSEWHERE = {
    "cfg_scale": ("guidance_scale",),
    "do_sample": ("temperature",),
    "input_ids": ("prompt", "prompts"),
    "inputs": ("prompt", "text", "texts"),
    "max_length": LENGTHS,
    "max_new_tokens": LENGTHS,
    "max_tokens": LENGTHS,
    "num_return_sequences": ("batch_size", "prompt"),
    "num_steps": ("num_inference_steps",),
    "prompt": ("text", "texts", "prompts"),
    "seed": ("generator",),
    "steps": ("num_inference_steps",),
    "text": ("texts", "prompt"),
    "text_inputs": ("prompt",),
    "top_k": ("top_p",),
}
# how to write it where the name alone does not say it
EXAMPLES = {
    ("do_sample", "temperature"): "temperature=0.01, which is as good as greedy",
    ("num_return_sequences", "prompt"): "a list with the prompt that many times",
    ("seed", "generator"): "generator=torch.Generator().manual_seed(seed)",
}


def near_miss(name: str, known: list[str]) -> str | None:
    """What was probably meant by the unknown argument `name` of a method that takes those `known`."""
    for meant in ELSEWHERE.get(name, ()):
        if meant in known:
            return EXAMPLES.get((name, meant), f"`{meant}`")
    close = get_close_matches(name, known, n=1)
    return f"`{close[0]}`" if close else None


def explain_unknown_arguments(method: Callable) -> Callable:
    """`method`, which for an unknown argument raises a `TypeError` that names the near miss.

    The signature stays as it is written. A method that takes any keywords is returned as it came.
    """
    parameters = inspect.signature(method).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return method
    known = [name for name in parameters if name != "self"]

    @functools.wraps(method)
    def checked(*args, **kwargs):
        for name in kwargs:
            if name in known:
                continue
            meant = near_miss(name, known)
            advice = f"; write {meant}" if meant else ""
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise TypeError(f"{method.__qualname__} has no argument `{name}`{advice} ({takes}).")
        return method(*args, **kwargs)

    return checked


__all__ = ["explain_unknown_arguments", "near_miss"]
