"""Log-probabilities as OpenAI's formats show them: what each token of an answer spells, its bytes
and where it begins."""

import re
from functools import lru_cache
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tokcom.cli.fair_turns import Scores
from tokcom.processing_tokcom import text_ids


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in tokens of a byte-level BPE (Radford et al. 2019),
    as a table from characters to bytes."""
    # printable ones stand for themselves
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


BYTE_ALPHABET = byte_alphabet()


class TokenTexts:
    """What single tokens spell behind another word, space included."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        # at the beginning of a text tokenizers may drop or add a space
        self._anchor = text_ids(tokenizer, "a")[:1]
        # of the instance, or the cache would keep every tokenizer alive
        self.of = lru_cache(maxsize=65_536)(self._of)

    def _of(self, token: int) -> str:
        decode = self._tokenizer.decode
        before = decode(self._anchor, skip_special_tokens=False)
        return decode([*self._anchor, token], skip_special_tokens=False)[len(before) :]

    def bytes_of(self, token: int) -> list[int] | None:
        """The bytes of a token, which may be a part of a character; None if nothing says them."""
        text = self.of(token)
        if "\ufffd" not in text:
            return list(text.encode())
        written = self._tokenizer.convert_ids_to_tokens(token)
        if match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", written):  # byte fallback
            return [int(match[1], 16)]
        if set(written) <= set(BYTE_ALPHABET):
            return [BYTE_ALPHABET[character] for character in written]
        return None

    def length(self, ids: list[int]) -> int:
        """Characters that these ids spell; one whose bytes are not complete yet does not count."""
        return len(self._tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd"))


class ScoredText(NamedTuple):
    """The tokens of an answer: `places` in `scores`, what each spells, and at which character of
    the answer it begins."""

    scores: Scores
    places: range
    texts: list[str]
    offsets: list[int]

    @classmethod
    def of(
        cls, scores: Scores, start: int, text: str, tokens: TokenTexts, dropped: int = 0
    ) -> "ScoredText":
        """The tokens from `start` on that begin within the `text` of an answer, which a stop
        sequence may have cut, and whose first `dropped` characters are not part of it."""
        # decoded from the beginning each time: a token's text may depend on those before it
        begins = [tokens.length(scores.ids[:i]) for i in range(start, len(scores.ids) + 1)]
        offsets = [max(0, begin - begins[0] - dropped) for begin in begins[:-1]]
        cut = begins[-1] - begins[0] - dropped > len(text)
        count = sum(offset < len(text) for offset in offsets) if cut else len(offsets)
        places = range(start, start + count)
        return cls(scores, places, [tokens.of(scores.ids[i]) for i in places], offsets[:count])


def completion_logprobs(scored: ScoredText, tokens: TokenTexts, count: int) -> dict:
    """`logprobs` of a completion; the first token of a text has none, as at OpenAI."""
    own = []
    likeliest = []
    for i in scored.places:
        best: dict[str, float] = {}
        for token, value in scored.scores.best[i][:count]:
            # several ids may spell the same; the likeliest comes first
            best.setdefault(tokens.of(token), value)
        own.append(scored.scores.own[i])
        likeliest.append(best if i else None)
    return {
        "tokens": scored.texts,
        "token_logprobs": own,
        "top_logprobs": likeliest,
        "text_offset": scored.offsets,
    }


def chat_logprobs(scored: ScoredText, tokens: TokenTexts, count: int) -> dict:
    """`logprobs` of a reply."""

    def entry(token: int, value: float) -> dict:
        # bytes as OpenAI gives them: a token may be half a character
        return {"token": tokens.of(token), "logprob": value, "bytes": tokens.bytes_of(token)}

    content = []
    for i in scored.places:
        best = [entry(token, value) for token, value in scored.scores.best[i][:count]]
        own = entry(scored.scores.ids[i], scored.scores.own[i])
        content.append({**own, "top_logprobs": best})
    return {"content": content, "refusal": None}


__all__ = ["ScoredText", "TokenTexts", "byte_alphabet", "chat_logprobs", "completion_logprobs"]
