"""A text in the terminal while it is denoised, for `tokcom generate --watch`.

What is finished stands as it is; what the current denoising step makes of the rest is yellow. Lines
are broken before they reach the edge, so that only the last one has to be drawn again.
"""

import copy
import itertools
import shutil
import sys
import time
import unicodedata
from typing import TextIO

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from tokcom.interface_tokcom import TextStream

YELLOW = "\033[33m"
PLAIN = "\033[0m"
CLEAR = "\r\033[K"  # back to the start of the line, and nothing behind it


def columns(text: str) -> int:
    """Columns of a terminal that a text takes: two for a character of East Asia, none for a mark
    on the one before it."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    marks = sum(unicodedata.combining(character) > 0 for character in text)
    return len(text) + wide - marks


def fitting(text: str, room: int) -> str:
    """The longest beginning of a text that takes at most `room` columns."""
    taken = itertools.accumulate(map(columns, text))
    return text[: sum(width <= room for width in taken)]


class TerminalStreamer(BaseStreamer):
    """Receives a prompt, drafts and finished ids of one text, and draws them.

    Args:
        tokenizer: of the ids.
        pause: seconds for which each draft is shown.
        file: where to write, by default standard output.
        width: columns of the terminal, by default as it is.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pause: float = 0.05,
        file: TextIO | None = None,
        width: int | None = None,
    ):
        self.pause = pause
        self.file = file or sys.stdout
        self.width = width or shutil.get_terminal_size().columns
        self.text = TextStream(tokenizer, "", [])
        self.line = ""  # what is finished of the last line

    def _draw(self, draft: str = "") -> None:
        # one column stays free: terminals break a line when its last one is written
        room = max(0, self.width - 1 - columns(self.line))
        # a draft of several lines could not be drawn over
        draft = fitting(draft.replace("\n", " "), room)
        colored = f"{YELLOW}{draft}{PLAIN}" if draft else ""
        self.file.write(f"{CLEAR}{self.line}{colored}")
        # a terminal shows what is written only when a line ends, or when it is flushed
        self.file.flush()

    def put(self, value: torch.Tensor) -> None:
        for character in self.text.add(value.flatten().tolist()):
            self.line += character
            if character == "\n":
                self._break(len(self.line) - 1, len(self.line))
            elif columns(self.line) >= self.width:
                # from 1 on, since a space at the start of a line breaks nothing
                space = self.line.rfind(" ", 1)
                # a word that is longer than the line is cut
                at = space if space > 0 else len(self.line) - 1
                self._break(at, at + (space > 0))
        self._draw()

    def _break(self, end: int, start: int) -> None:
        """End the line at `end`; what is from `start` on begins the next."""
        rest = self.line[start:]
        self.line = self.line[:end]
        self._draw()
        self.file.write("\n")
        self.line = rest

    def put_draft(self, value: torch.Tensor, **kwargs) -> None:
        # on a copy, since the next draft takes the place of this one
        self._draw(copy.copy(self.text).add(value.flatten().tolist(), last=True))
        time.sleep(self.pause)

    def end(self) -> None:
        self.line += self.text.add([], last=True)
        self._draw()
        self.file.write("\n")
        self.file.flush()


__all__ = ["TerminalStreamer"]
