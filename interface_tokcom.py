"""Where a text pipeline meets its caller: unknown arguments, long prompts, streamed text.

Streamed text is decoded a few ids at a time (`TextStream`), so the cost of showing a text grows
with its length, not with the square of it. `explain_unknown_arguments` wraps every public method of
a pipeline (`TokComBasePipeline.__init_subclass__`), so the methods themselves keep plain signatures
without `**kwargs`.
"""

import functools
import inspect
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .processing_tokcom import decode_ids

Blocks = Iterator[tuple[torch.Tensor, torch.Tensor | None]]  # latents and ids of each block
GAP = "____"  # three or more underscores are one
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
    # such a method checks its arguments itself
    kinds = {parameter.kind for parameter in parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
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
        room -= -(-gen_length // unit) * unit  # what is generated comes in whole chunks
        if room < 1:
            raise ValueError(
                f"`gen_length` ({gen_length}) leaves no room for a prompt in the model's {longest} "
                "tokens; reduce it."
            )
    return room, truncation, unit


# ---- text that grows ----

# how tokenizers spell a token of one byte
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
INCOMPLETE = "\ufffd"  # what bytes decode to while the rest of their character is missing
MOST_BYTES = 4  # of a character in UTF-8


class TextStream:
    """Decodes the ids of one text as they come: pieces that join to what follows its prompt.

    However the ids are cut, the pieces join to the same text. Each id is decoded two or three times
    in all: once it is new, and then as context of the next ones, because many tokenizers drop a
    space at the start of what they decode. A character whose bytes are not complete is held back
    until they are, and so is a run of byte tokens (byte fallback), which is decoded as a whole.

    Args:
        prompt: what the text continues. A space at its end is the one that the first new word
            brings along.
        prompt_ids: the ids of the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_ids: Sequence[int]):
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        # they have no text, so they are no context for what follows
        self._special = {i for i, token in added if token.special}
        self._ids: list[int] = []  # decoded again together with the next ones
        for i in reversed(prompt_ids):
            # a character that the prompt leaves unfinished lies in its last bytes
            if len(self._ids) >= MOST_BYTES and not self._is_byte(self._ids[0]):
                break
            if i not in self._special:
                self._ids.insert(0, i)
        self._shown = decode_ids(tokenizer, self._ids)  # of their text
        self._drops_space = prompt.endswith(" ")

    def _is_byte(self, i: int) -> bool:
        return bool(BYTE_TOKEN.fullmatch(self._tokenizer.convert_ids_to_tokens(i) or ""))

    def add(self, ids: Sequence[int], last: bool = False) -> str:
        """What can be shown now that `ids` have come; with `last` everything is."""
        known = len(self._ids)
        self._ids = self._ids + [i for i in ids if i not in self._special]
        end = len(self._ids)  # of those whose text no later id changes
        # a run of bytes is decoded once it has ended
        while not last and end > known and self._is_byte(self._ids[end - 1]):
            end -= 1
        if end == known and not last:  # nothing but more bytes of the same run
            return ""
        text = decode_ids(self._tokenizer, self._ids[:end])
        held = not last and text.endswith(INCOMPLETE)  # one character of `text`, so 1 below
        # what was shown is nearly always the beginning of `text`; a tokenizer may merge differently
        new = text[len(os.path.commonprefix((text, self._shown))) : len(text) - held]
        # of the next ids' context one id is enough, unless a character is not complete
        needed = MOST_BYTES if held else 1
        first = max(0, end - needed)
        context = decode_ids(self._tokenizer, self._ids[first:end])
        self._ids = self._ids[first:]
        self._shown = context[: len(context) - held]
        if self._drops_space and new:
            new = new.removeprefix(" ")
            self._drops_space = False
        return new


def continue_text(
    tokenizer: PreTrainedTokenizerBase, text: str, known: list[int], new: list[int]
) -> str:
    """What to append to `text`, whose ids are `known`, for the ids `new`."""
    return TextStream(tokenizer, text, known).add(new, last=True)


def split_gaps(text: str) -> list[str]:
    """What stands before, between and after the gaps of `text`.

    Raises `ValueError` without a gap, or for nothing but gaps.
    """
    pieces = re.split("_{3,}", text)
    if len(pieces) < 2 or not any(piece.strip() for piece in pieces):
        raise ValueError(
            f"`text` ({text!r}) must hold known text and at least one gap, written {GAP!r}."
        )
    # a gap's first word brings its own space
    return [piece.rstrip(" ") for piece in pieces[:-1]] + pieces[-1:]


def join_gaps(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    rows: list[list[int]],
    gaps: list[list[int]],
) -> str:
    """`text` with the ids `gaps` in its gaps, between which stand the ids `rows`."""
    pieces = re.split("_{3,}", text)
    filled = pieces[0]
    for row, gap, piece in zip(rows, gaps, pieces[1:]):
        filled += continue_text(tokenizer, filled, row, gap) + piece
    return filled


class TokComPiece(NamedTuple):
    """What one text has gained in a block.

    `text` and `ids` are new; `tokens` is how many the text has by now, EOS included;
    `finish_reason` is "stop" (EOS) or "length" once the text has ended, and None before.
    """

    text: str
    tokens: int
    finish_reason: str | None
    ids: tuple[int, ...] = ()


class StreamedText:
    """One text of `stream_batch` while it grows: ends at EOS or after `max_length` tokens.

    The next `skip` tokens of its blocks repeat the prompt's.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str | list[int],
        prompt_ids: list[int],
        max_length: int,
        skip: int,
        eos_token_id: int | None,
    ):
        self.max_length = max_length
        self.skip = skip
        self.eos_token_id = eos_token_id
        self.piece = TokComPiece("", 0, None)
        text = prompt if isinstance(prompt, str) else ""  # only a space at its end matters
        self._stream = TextStream(tokenizer, text, prompt_ids)

    def add(self, block: list[int]) -> TokComPiece:
        """Append the ids of a block and return what they add to the text."""
        skipped = min(self.skip, len(block))
        self.skip -= skipped
        if self.piece.finish_reason is not None:
            # it has ended, but other texts of the batch go on
            self.piece = self.piece._replace(text="", ids=())
            return self.piece
        new = block[skipped:][: self.max_length - self.piece.tokens]
        reason = None
        if self.eos_token_id in new:
            new = new[: new.index(self.eos_token_id) + 1]  # EOS counts as a token
            reason = "stop"
        count = self.piece.tokens + len(new)
        if reason is None and count == self.max_length:
            reason = "length"
        text = self._stream.add(new, last=reason is not None)
        self.piece = TokComPiece(text, count, reason, tuple(new))
        return self.piece


# ---- candidates ----


def most_alike(rows: Sequence[Sequence]) -> int:
    """Index of the row whose F1 of tokens with all rows is highest: the text of minimum Bayes risk.

    Candidates are chosen so in DiffuSeq (https://arxiv.org/abs/2210.08933).
    """
    counts = [Counter(row) for row in rows]

    def agreement(a: Counter) -> float:
        # half of F1 = 2 |a & b| / (|a| + |b|): only the order matters. Two empty rows agree
        shares = []
        for b in counts:
            shares.append((a & b).total() / (a.total() + b.total()) if a or b else 0.5)
        return sum(shares)

    return max(range(len(rows)), key=lambda i: agreement(counts[i]))


# ---- streamers of transformers ----


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
        if self._eos_token_id is None:
            return new
        ends = (new == self._eos_token_id).nonzero()
        return new[: int(ends[0]) + 1] if len(ends) else new

    def after_step(self, callback: Callable | None) -> Callable | None:
        """What the sampler calls after a step: `callback(pipe, step, timestep, x) -> x`, and then
        the draft is shown."""
        if not hasattr(self._streamer, "put_draft"):
            return callback

        def show(pipe, step: int, timestep: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            if callback is not None:
                x = callback(pipe, step, timestep, x)
            # the block at hand as it would be decoded now
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
            # ids of the prompt, which the first blocks repeat, are not counted
            self._left -= max(0, min(self._left, ids.shape[1] - self._skip))
            self._skip = max(0, self._skip - ids.shape[1])
            if len(new):
                self._streamer.put(new)
            yield latents, ids
        self._streamer.end()


__all__ = [
    "GAP",
    "StreamedText",
    "StreamerFeed",
    "TextStream",
    "TokComPiece",
    "continue_text",
    "explain_unknown_arguments",
    "join_gaps",
    "most_alike",
    "near_miss",
    "prompt_room",
    "split_gaps",
]
