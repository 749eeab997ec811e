"""Where a text pipeline meets its caller: unknown arguments, prompts that are too long, streamers.

`explain_unknown_arguments` wraps every public method of a pipeline
(`TokComBasePipeline.__init_subclass__`), so the methods themselves keep plain signatures without
`**kwargs`.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from difflib import get_close_matches

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

Blocks = Iterator[tuple[torch.Tensor, torch.Tensor | None]]  # latents and ids of each block
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
    """What was probably meant by the unknown argument `name` of a method with those `known`."""
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


def prompt_room(
    model: PreTrainedModel, gen_length: int, truncation: str | None = None
) -> tuple[int, str | None, int]:
    """What `prompt_ids` asks of prompts that `gen_length` tokens are to follow: at most how many
    tokens, whether the beginning of longer ones is left out, and in which unit.

    A bidirectional model sees prompt and text at once, so a prompt that may be cut leaves room.
    """
    config = model.config
    unit = config.codec_config.length_multiple
    longest = config.transformer_config.max_position_embeddings * config.codec_config.chunk_size
    room = longest
    if config.transformer_config.block_size is None and truncation is not None:
        room -= -(-gen_length // unit) * unit
        if room < 1:
            raise ValueError(
                f"`gen_length` ({gen_length}) leaves no room for a prompt in the model's {longest} "
                "tokens; reduce it."
            )
    return room, truncation, unit


class StreamerFeed:
    """Gives a streamer of transformers one text: finished ids by `put`, drafts by `put_draft`.

    A streamer that has `put_draft`, such as `TextDiffusionStreamer`, receives after every denoising
    step what the block at hand decodes to. The text ends at EOS or after `gen_length` ids. Without
    a streamer nothing happens.
    """

    def __init__(self, streamer: BaseStreamer | None, gen_length: int, eos_token_id: int | None):
        self._streamer = streamer
        self._left = gen_length
        self._skip = 0
        self._eos_token_id = eos_token_id

    def _new(self, ids: torch.Tensor) -> torch.Tensor:
        """Those of a block's ids `(1, T)` that belong to the new text, `(n,)` on the CPU."""
        new = ids[0, self._skip : self._skip + self._left].cpu()
        ends = (new == self._eos_token_id).nonzero()
        return new if self._eos_token_id is None or not len(ends) else new[: int(ends[0]) + 1]

    def after_step(self, callback: Callable | None) -> Callable | None:
        """What the sampler calls after a step: `callback(pipe, step, timestep, x) -> x`, and then
        the draft is shown."""
        if not hasattr(self._streamer, "put_draft"):
            return callback

        def show(pipe, step: int, timestep: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            if callback is not None:
                x = callback(pipe, step, timestep, x)
            draft = self._new(pipe.model.to_ids(x))
            if len(draft):
                self._streamer.put_draft(draft)
            return x

        return show

    def blocks(self, blocks: Blocks, rows: list[list[int]], skip: list[int]) -> Blocks:
        """The same blocks. The ids of the prompt `rows` are put first, then those of each block;
        the first `skip` of a text repeat its prompt."""
        if self._streamer is None:
            yield from blocks
            return
        self._streamer.put(torch.tensor(rows))
        self._skip = skip[0]
        for latents, ids in blocks:
            new = self._new(ids)
            self._left -= max(0, min(self._left, ids.shape[1] - self._skip))
            self._skip = max(0, self._skip - ids.shape[1])
            if len(new):
                self._streamer.put(new)
            yield latents, ids
        self._streamer.end()


__all__ = ["StreamerFeed", "explain_unknown_arguments", "near_miss", "prompt_room"]
