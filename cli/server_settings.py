"""Limits of the server. Nothing heavy is imported, so that `tokcom serve --help` answers at
once."""

from dataclasses import dataclass, fields
from math import isfinite

LIMITS = {
    "max_batch": "texts that are denoised together",
    "max_queue": "texts that may wait; more get status 429",
    "max_tokens": "tokens of one text",
    "max_choices": "texts of one request",
    "max_steps": "denoising steps of one block",
    "max_work": "tokens x steps x texts of one request",
    "max_characters": "characters of one request, checked before they are tokenised",
    "timeout": "seconds after which an unfinished request gets status 504",
    "grace": "seconds that running requests have to finish when the server is told to end",
}


def _given(name: str, value: object) -> str:
    """A setting with its value, as it is typed if it is an option of `tokcom serve`."""
    return f"--{name} {value}" if name in LIMITS else f"`{name}` ({value})"


@dataclass
class ServerSettings:
    """Limits of the server: lengths in tokens, times in seconds, sizes in bytes. Raises
    `ValueError` if one makes no sense.

    `max_work` limits tokens x denoising steps x texts of one request, `max_characters` those of its
    texts together, `grace` is how long running requests may take when the server is told to end.
    """

    model_name: str = "tokcom"
    api_key: str | None = None
    max_batch: int = 32
    max_queue: int = 256
    max_tokens: int = 2048
    max_choices: int = 16
    max_steps: int = 128
    # 2048 tokens at 64 steps, or 16 texts of 256 tokens at 32 steps
    max_work: int = 131_072
    max_characters: int = 65_536
    max_body: int = 1 << 20
    batch_wait: float = 0.01
    timeout: float = 120.0
    body_timeout: float = 20.0
    grace: float = 10.0

    def __post_init__(self):
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.type is int and value < 1:
                raise ValueError(f"{_given(setting.name, value)} must be at least 1.")
            # NaN compares as false with everything, and a wait without end is no setting
            if setting.type is float and not (isfinite(value) and value >= 0):
                raise ValueError(
                    f"{_given(setting.name, value)} must be a number of seconds, 0 or more."
                )
        for name in ("timeout", "body_timeout"):
            if getattr(self, name) == 0:
                raise ValueError(f"{_given(name, 0)} leaves no time to answer; give more seconds.")
        if not self.model_name:
            raise ValueError("--model_name is empty; give the name that clients ask for.")
