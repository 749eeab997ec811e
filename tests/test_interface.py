"""Streamed text: pieces that join to the whole, however it is cut, at a cost that grows with its length."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tokcom.interface_tokcom import StreamedText, TextStream, continue_text

TEXT = "Squinty 🐷👩‍👩‍👧 said: 你好，世界 — naïve 𝄞!"


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece makes them: words carry their space, and what the vocabulary lacks is spelt in bytes."""
    pieces = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁said", "好", "▁!", "a"]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.fixture(params=["byte level", "byte fallback"])
def any_tokenizer(request, tokenizer):
    return tokenizer if request.param == "byte level" else byte_fallback_tokenizer()


def joined(stream: TextStream, ids: list[int], size: int) -> str:
    """The pieces of a text that comes in blocks of `size` ids."""
    starts = range(0, len(ids), size)
    return "".join(
        stream.add(ids[start : start + size], last=start + size >= len(ids)) for start in starts
    )


def test_pieces_join_to_the_whole_text_for_every_prompt_and_size_of_a_piece(any_tokenizer):
    ids = any_tokenizer(TEXT)["input_ids"]
    for cut in range(len(ids)):
        prompt = any_tokenizer.decode(ids[:cut])
        for size in (1, 2, 3, 4, 7, len(ids)):
            text = joined(TextStream(any_tokenizer, prompt, ids[:cut]), ids[cut:], size)
            assert prompt.rstrip("\ufffd") + text == TEXT or "\ufffd" in prompt
            assert text == continue_text(any_tokenizer, prompt, ids[:cut], ids[cut:])


def test_pieces_of_bytes_that_spell_nothing_join_to_the_whole_text(any_tokenizer):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = torch.randint(len(any_tokenizer), (60,), generator=generator).tolist()
        whole = any_tokenizer.decode(ids, skip_special_tokens=True)
        for size in (1, 3, 4, 60):
            assert joined(TextStream(any_tokenizer, "", []), ids, size) == whole


def test_an_emoji_appears_when_its_last_byte_has_come(tokenizer):
    ids = tokenizer("🐷 a")["input_ids"]
    stream = TextStream(tokenizer, "", [])
    pieces = [stream.add([i]) for i in ids]
    assert "\ufffd" not in "".join(pieces) and "🐷" in pieces and pieces[0] == ""


@pytest.mark.parametrize("length", [64, 256])
def test_streaming_decodes_each_id_at_most_three_times(any_tokenizer, monkeypatch, length):
    ids = (any_tokenizer(TEXT)["input_ids"] * 20)[:length]
    text = StreamedText(any_tokenizer, "", ids * 9, length, 0, None)
    decoded = []
    decode = any_tokenizer.decode
    monkeypatch.setattr(
        any_tokenizer, "decode", lambda ids, **k: decoded.append(len(ids)) or decode(ids, **k)
    )
    for start in range(0, length, 4):
        text.add(ids[start : start + 4])
    assert text.piece.finish_reason == "length" and sum(decoded) <= 3 * length


def test_a_streamed_text_ends_at_eos_unless_that_lies_behind_its_length(tokenizer):
    a, eos = 5, tokenizer.eos_token_id
    text = StreamedText(tokenizer, "", [], 6, 0, eos)
    assert [text.add(block).finish_reason for block in ([a, a], [a, eos])] == [None, "stop"]
    assert text.piece.ids == (a, eos) and text.add([a, a])._replace(ids=None).text == ""
    text = StreamedText(tokenizer, "", [], 3, 2, eos)
    assert [text.add(block).tokens for block in ([a, a], [a, a], [a, eos])] == [0, 2, 3]
    assert text.piece.finish_reason == "length"
