"""Texts, pictures, clips and sounds as models read them, and back.

Notable choices:
- A tokenizer's last token is its pad token, and what spells a special token is text like any other.
- Whatever people hold is taken: files, encoded bytes, PIL images, numpy arrays, tensors, one or a
  list. `as_pictures`, `as_clips` and `as_sounds` make lists of it; an error says in one sentence
  what does not fit.
- Files are read as in training, by `pictures_tokcom.py` and `sounds_tokcom.py`.
- Pictures follow transformers' convention, `AutoImageProcessor.from_pretrained(...)(images)`.
  Transparent ones are laid on white, and pictures are cropped before scaling, so that nothing is
  stretched; -1 is black and 1 is white.
"""

import os
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from .pictures_tokcom import Frames, is_film, is_stored, upright
from .sounds_tokcom import TokComAudioProcessor, is_samples, read_sound, read_wav, write_wav

CHARACTERS = "training_characters"  # of a tokenizer: every character of the training text
HIDDEN = "\ufdd0"  # no character: stands around what a chat template must not see
PAD_TOKENS = ("<pad>", "<|pad|>", "<|tokcom_pad|>")  # the first that the vocabulary lacks
PICTURE_FORMS = "a PIL image, a file, its bytes, an array (H, W, 3) or a tensor (3, H, W)"
CLIP_FORMS = (
    "a list of pictures, an animated file or film, an array (F, H, W, 3), a tensor (3, F, H, W), "
    "or several of these"
)


# ---- texts ----


def with_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with its pad token as the last token: added if there is none, or if it stands
    elsewhere.

    The model's last id is that of padding, so tokenizer and model have the same number of ids.
    """
    if (
        tokenizer.pad_token_id == len(tokenizer) - 1
        and tokenizer.pad_token_id != tokenizer.eos_token_id
    ):
        return tokenizer
    vocabulary = tokenizer.get_vocab()
    # a new token, since one that exists would not be the last
    new = next(token for token in PAD_TOKENS if token not in vocabulary)
    tokenizer.add_special_tokens({"pad_token": new})
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many ids text is made of: all of the tokenizer's but the pad token that `with_pad_token`
    gives it."""
    last = len(tokenizer) - 1
    # a last token that pads and also ends texts is one of the text's
    return last if tokenizer.pad_token_id == last != tokenizer.eos_token_id else len(tokenizer)


def text_ids(
    tokenizer: PreTrainedTokenizerBase, text: str | list[str], special_tokens: bool = False
) -> list:
    """Ids of one text, or of each of several, without start or end tokens.

    What spells a special token, such as `</s>`, is text like any other. With `special_tokens` it is
    the token instead, as in the text that a chat template makes.
    """
    options = {
        "add_special_tokens": False,  # start and end are no part of a text's chunks
        "verbose": False,
        "split_special_tokens": not special_tokens,
    }
    return tokenizer(text, **options)["input_ids"]


def warn_of_new_characters(tokenizer: Any, texts: list[str]) -> None:
    """Warn, once for a tokenizer, of characters that the texts of its model's training never had,
    if it tells which they had."""
    known = tokenizer.init_kwargs.get(CHARACTERS)
    if not known or getattr(tokenizer, "has_warned_of_characters", False):
        return
    unknown = set("".join(texts)) - set(known)
    new = sorted(character for character in unknown if not character.isspace())
    if new:
        # on the tokenizer, so that a new pipeline with it stays quiet
        tokenizer.has_warned_of_characters = True
        warnings.warn(
            f"`prompt` has characters that the training text never had ({' '.join(new[:20])}); "
            "expect nonsense after them.",
            stacklevel=2,
        )


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str],
    name: str,
) -> list[list[int]]:
    """Ids of each text; raises `ValueError` with the argument's `name` for an empty one, or without
    a tokenizer."""
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"`{name}` must be a text or a list of texts, not {_describe(text)}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"`{name}` ({text!r:.60}) is not valid Unicode ({error}).") from error
    if tokenizer is None:
        raise ValueError(
            f"`{name}` is text, but this pipeline has no tokenizer; pass one when building it."
        )
    rows = [  # ragged: no padding yet
        text.ids(tokenizer) if isinstance(text, ChatText) else text_ids(tokenizer, text)
        for text in texts
    ]
    for text, row in zip(texts, rows):
        if not row:
            raise ValueError(
                f"`{name}` is empty ({text!r}); give some text; a text pipeline starts from "
                "nothing with generate()."
            )
    warn_of_new_characters(tokenizer, list(texts))
    return rows


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of ids, without special tokens and without ids that the tokenizer does not have."""
    # a model may have more ids than its tokenizer: those that pad
    return tokenizer.decode([i for i in ids if i < len(tokenizer)], skip_special_tokens=True)


def decode_rows(
    tokenizer: PreTrainedTokenizerBase | None, sequences: torch.Tensor, mask: torch.Tensor
) -> list[str] | None:
    """Rows of ids `(B, T)`, those with mask 1, as texts; None without a tokenizer."""
    if tokenizer is None:
        return None
    texts = []
    for ids, kept in zip(sequences.tolist(), mask.tolist()):
        real = [i for i, is_real in zip(ids, kept) if is_real]
        texts.append(decode_ids(tokenizer, real))
    return texts


def end_at_eos(
    sequences: torch.Tensor, eos_token_id: int | None, pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `(B, T)` with the pad id behind the first EOS of each row, and the mask of what is
    kept."""
    ends = torch.zeros_like(sequences)
    if eos_token_id is not None:
        ends = (sequences == eos_token_id).long()
    # how many EOS stand before each id: the first EOS itself is kept
    mask = (ends.cumsum(-1) - ends == 0).long()  # (B, T)
    return torch.where(mask.bool(), sequences, pad_token_id), mask


def take_new(
    ids: torch.Tensor, length: int, skip: list[int], eos_token_id: int | None, pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `length` ids that follow the first `skip` of each row of `ids (B, T)`, up to EOS and
    padded: ids and mask `(B, length)`."""
    # room behind the last id, so that no row reads beyond the end
    padded = torch.nn.functional.pad(ids, (0, max(skip) + length), value=pad_token_id)
    first = torch.tensor(skip, device=ids.device)[:, None]  # (B, 1)
    new = padded.gather(1, first + torch.arange(length, device=ids.device))  # (B, length)
    sequences, mask = end_at_eos(new, eos_token_id, pad_token_id)
    # rows that were interrupted are shorter, which is not the same as padding with an id that may
    # be EOS
    exists = torch.arange(length, device=ids.device) < ids.shape[1] - first
    return torch.where(exists, sequences, pad_token_id), mask * exists


def text_rows(rows: list[list[int]], length: int, eos_token_id: int) -> torch.Tensor:
    """Ids of texts that end by EOS, filled up with it: `(B, length)`; what does not fit is cut."""
    return torch.tensor([[*row[:length], *[eos_token_id] * (length - len(row))] for row in rows])


class TokComScore(NamedTuple):
    """The likelihood of a text: its `nats` in all, and `token_nats` of each of its tokens."""

    nats: float
    tokens: int
    characters: int
    token_nats: list[float]

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def nats_per_character(self) -> float:
        return self.nats / self.characters


def likeliest(scores: list[TokComScore]) -> int:
    """The index of the likeliest of several texts."""
    # per character, since texts of different lengths compete
    return min(range(len(scores)), key=lambda i: scores[i].nats_per_character)


class ChatText(str):
    """A text that a chat template has made: what spells a special token in the template is that
    token, in what a turn says it is text.

    `pieces` join to it; those at odd places are text that spells a special token.
    """

    pieces: list[str]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> "ChatText":
        """The `turns` of a dialogue as the tokenizer's chat template writes them, up to where the
        answer begins."""
        spellings = [
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        ]
        spelled = re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True))))
        found: list[str] = []

        def hide(match: re.Match) -> str:
            found.append(match[0])
            return f"{HIDDEN}{len(found) - 1}{HIDDEN}"

        if spellings:
            turns = [turn | {"content": spelled.sub(hide, turn["content"])} for turn in turns]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        pieces = re.split(f"{HIDDEN}([0-9]+){HIDDEN}", text)
        pieces[1::2] = [found[int(index)] for index in pieces[1::2]]
        chat = cls("".join(pieces))
        chat.pieces = pieces
        return chat

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Without spaces at the end, which belong to the first word of the answer."""
        found = []
        for i, piece in enumerate(self.pieces):
            is_last = i == len(self.pieces) - 1
            text = piece.rstrip(" ") if is_last else piece
            found += text_ids(tokenizer, text, special_tokens=i % 2 == 0)
        return found


def as_prompts(tokenizer: PreTrainedTokenizerBase | None, prompt: Any) -> list[str]:
    """One text or dialogue, or several, as a list of texts."""
    is_list = isinstance(prompt, (list, tuple))
    is_dialogue = is_list and bool(prompt) and isinstance(prompt[0], dict)  # of turns
    prompts = list(prompt) if is_list and not is_dialogue else [prompt]
    if not prompts:
        raise ValueError("`prompt` is an empty list; give at least one text.")
    for i, turns in enumerate(prompts):
        if not isinstance(turns, (list, tuple)) or not turns:
            continue
        if all(isinstance(turn, int) for turn in turns):
            raise ValueError(
                f"`prompt` holds ids, {list(turns)}; give their text, `pipe.tokenizer.decode(ids)`."
            )
        if not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns):
            raise ValueError(f"a dialogue must be a list of {{'role', 'content'}}, not {turns!r}.")
        for turn in turns:
            if not isinstance(turn["content"], str):
                shown = _describe(turn["content"])
                raise ValueError(f"what a turn of a dialogue says must be a text, not {shown}.")
        if getattr(tokenizer, "chat_template", None):
            prompts[i] = ChatText.of(tokenizer, list(turns))
        else:
            prompts[i] = "\n".join(turn["content"] for turn in turns)
    return prompts


# ---- files of latents ----


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: list[str] | list[list[int]],
    max_length: int,
    truncation: str | None = None,
    chunk_size: int = 1,
) -> tuple[list[list[int]], list[bool]]:
    """Ids of prompts, which may be rows of ids already, and which of them lost their beginning.

    Trailing spaces are left to the continuation, whose first word carries its own. With
    `truncation="left"` a prompt of more than `max_length` tokens loses its first ones, in whole
    chunks, so that the others stay where they are in theirs.
    Raises `ValueError` for a prompt that is empty or too long.
    """
    if truncation not in (None, "left"):
        raise ValueError(
            f"`truncation` ({truncation!r}) must be None or 'left': the end of a prompt is what is "
            "continued."
        )
    rows = []
    for prompt in prompts:
        if isinstance(prompt, list) and prompt and all(isinstance(i, int) for i in prompt):
            rows.append(prompt)  # ids already
            continue
        text: Any = prompt
        if isinstance(text, str) and not isinstance(text, ChatText):
            text = text.rstrip(" ")
        rows += tokenize_texts(tokenizer, [text], "prompt")
    longest = max(map(len, rows))
    if longest > max_length and truncation is None:
        raise ValueError(
            f"`prompt` has {longest} tokens, more than the model's maximum of {max_length}; "
            "shorten it, or pass truncation='left' to leave its beginning out."
        )
    # tokens to leave out, rounded up to whole chunks
    beyond = [-(-max(0, len(row) - max_length) // chunk_size) * chunk_size for row in rows]
    return [row[first:] for row, first in zip(rows, beyond)], [first > 0 for first in beyond]


def write_latents(
    file: str | os.PathLike,
    latents: torch.Tensor,
    codes: torch.Tensor | None,
    attention_mask: torch.Tensor,
    chunk_size: int,
) -> None:
    """Write the codes if there are any, in the smallest integers that hold them, otherwise the
    latents; and the mask."""
    if codes is None:
        tensors = {
            "latents": latents.float().cpu().contiguous(),
            "attention_mask": attention_mask.cpu().contiguous(),
        }
    else:
        fitting = [
            dtype
            for dtype in (torch.int16, torch.int32)
            if int(codes.max()) <= torch.iinfo(dtype).max
        ]
        dtype = fitting[0] if fitting else codes.dtype
        tensors = {
            "codes": codes.to(dtype).cpu(),
            "attention_mask": attention_mask.to(torch.uint8).cpu(),  # as small as the codes
        }
    save_file(tensors, str(file), metadata={"format": "pt", "chunk_size": str(chunk_size)})


def read_latents(
    file: str | os.PathLike, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Latents or codes, and the mask, of a file that `encode` wrote; `ValueError` if it did not, or
    for another model."""
    try:
        with safe_open(str(file), framework="pt") as tensors:
            # a file without the number is taken as one of this model
            found = (tensors.metadata() or {}).get("chunk_size", str(chunk_size))  # a text
            name = "codes" if "codes" in tensors.keys() else "latents"
            latents = tensors.get_tensor(name)
            mask = None
            if "attention_mask" in tensors.keys():
                mask = tensors.get_tensor("attention_mask")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a latents file written by encode ({error}).") from error
    if found != str(chunk_size):
        raise ValueError(f"{file} holds chunks of {found} tokens, this model's hold {chunk_size}.")
    return latents, mask


# ---- lists of what people hold ----


def _is_array(value: Any, *dimensions: int) -> bool:
    return isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim in dimensions


def _name_of(value: Any, name: str) -> str:
    """A file or an argument as messages name it."""
    if isinstance(value, dict):
        value = value.get("path")
    return repr(os.fspath(value)) if isinstance(value, (str, os.PathLike)) else f"`{name}`"


def as_pictures(images: Any, name: str = "images") -> list[Any]:
    """One picture or several as a list of pictures, each as `TokComImageProcessor` takes it.

    Raises `ValueError` with the argument's `name` for an empty list, or for something else.
    """
    if isinstance(images, (list, tuple)) or _is_array(images, 4):
        pictures = list(images)
    else:
        pictures = [images]
    if not pictures:
        raise ValueError(f"`{name}` is an empty list; give at least one picture.")
    for picture in pictures:
        if not (isinstance(picture, Image.Image) or is_stored(picture) or _is_array(picture, 2, 3)):
            raise ValueError(
                f"`{name}` must be {PICTURE_FORMS}, or a list of these, not {_describe(picture)}."
            )
    return pictures


def as_clips(videos: Any, name: str = "videos") -> list[torch.Tensor | list[Any]]:
    """One clip or several as a list, each a tensor `(3, F, H, W)` or a list of pictures; a picture
    is a clip of one frame.

    Raises `ValueError` with the argument's `name` for something else.
    """
    if _is_array(videos, 5):  # (B, F, H, W, 3) or (B, 3, F, H, W)
        return [_one_clip(clip, name) for clip in videos]
    if isinstance(videos, (list, tuple)):
        clips = [isinstance(part, (list, tuple)) or _is_array(part, 4) for part in videos]
        # a list of files or images is a list of clips only if every one moves; else they are frames
        films = bool(videos) and all(map(_moves, videos))
        if films or (clips and all(clips)):
            return [_one_clip(clip, name) for clip in videos]
    return [_one_clip(videos, name)]


def _moves(value: Any) -> bool:
    """Whether a file or an image is a film or an animation."""
    if isinstance(value, Image.Image):
        return getattr(value, "n_frames", 1) > 1
    if not is_stored(value):
        return False
    return is_film(value) or len(Frames(value, _name_of(value, "videos"))) > 1


def _one_clip(clip: Any, name: str) -> torch.Tensor | list[Any]:
    if isinstance(clip, torch.Tensor) and clip.ndim == 4:
        if clip.shape[0] != 3:
            raise ValueError(
                f"`{name}` as a tensor must be (3, F, H, W) or (B, 3, F, H, W), not "
                f"{tuple(clip.shape)}."
            )
        return clip
    if is_stored(clip) or isinstance(clip, Image.Image):
        frames = Frames(clip, _name_of(clip, name))
        return frames.clip(0, len(frames))  # pictures at one rate
    if _is_array(clip, 2, 3):  # a picture
        return [clip]
    if isinstance(clip, (list, tuple)) or _is_array(clip, 4):
        pictures = as_pictures(list(clip), name) if len(clip) else []
        if any(map(_moves, pictures)):
            raise ValueError(f"`{name}` has films among its pictures; give films alone, or frames.")
        return pictures
    raise ValueError(f"`{name}` must be {CLIP_FORMS}, not {_describe(clip)}.")


def as_sounds(sounds: Any) -> list[Any]:
    """One sound or several as a list; a list of numbers is one sound, a single number is none."""
    if isinstance(sounds, (bool, int, float, np.number)):
        raise ValueError(f"a sound must be a file, its bytes or samples, not {_describe(sounds)}.")
    if not isinstance(sounds, (list, tuple)):
        return [sounds]
    return [sounds] if is_samples(sounds) else list(sounds)


def _describe(value: Any) -> str:
    """What a value is, for an error."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return f"values of {value.dtype} and shape {tuple(value.shape)}"
    return f"{value!r:.60} of type {type(value).__name__}"


# ---- pictures ----


class TokComImageProcessor(BaseImageProcessor):
    """Prepare pictures for a TokCom model of images.

    Args:
        image_size (`int` or `list[int]`): pixels of a side of what the model sees, or height and
            width.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, image_size: int | list[int] = 64, **kwargs):
        super().__init__(**kwargs)
        self.image_size = image_size
        if min(self._size) < 1:
            raise ValueError(f"`image_size` ({image_size}) must be at least 1 pixel.")

    @property
    def _size(self) -> tuple[int, int]:
        """Height and width."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs) -> BatchFeature:
        """One picture or a list of them -> `pixel_values (B, 3, height, width)`, float32 in
        [-1, 1].

        A picture is a PIL image, a file or its bytes, an array `(H, W)`, `(H, W, 3)` or `(H, W, 4)`
        of uint8 or of floats in [0, 1], or a tensor `(3, H, W)` of uint8 or of floats in [-1, 1],
        such as `output_type="pt"` gives. Raises `ValueError` for others.
        """
        pixels = torch.stack([self._prepare(image) for image in as_pictures(images)])
        return BatchFeature({"pixel_values": pixels.numpy()}, tensor_type=return_tensors)

    def _prepare(self, image: Any) -> torch.Tensor:
        if is_stored(image):
            image = Frames(image, _name_of(image, "images"))[0]
        elif isinstance(image, torch.Tensor) and (image.is_floating_point() or image.shape[0] == 3):
            pixels = pixels_of_tensor(image)  # (3, h, w)
            if tuple(pixels.shape) == (3, *self._size):
                return pixels  # as it is, without rounding to 8 bits
            image = self.postprocess(pixels[None])[0]  # to be cut and scaled like any picture
        elif not isinstance(image, Image.Image):
            image = Image.fromarray(_bytes_of_array(np.asarray(image)))
        return self._prepare_image(image)

    def _prepare_image(self, image: Image.Image) -> torch.Tensor:
        image = upright(image)
        if min(image.size) < 1:
            raise ValueError(
                f"a picture of {image.width} x {image.height} pixels shows nothing; leave it out."
            )
        if image.mode.startswith("I;16"):  # 16 bits a pixel
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # the upper 8
        # whole numbers and floats of any size
        if image.mode in ("I", "F"):
            raise ValueError(
                f"a picture of mode {image.mode!r} has no known range; convert it to 8 bits first."
            )
        if image.mode != "RGB":  # what is transparent becomes white
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image).convert("RGB")
        height, width = self._size
        # the largest cut of the wanted proportions, from the middle
        scale = min(image.height / height, image.width / width)
        cut_height = max(1, round(height * scale))
        cut_width = max(1, round(width * scale))
        left = (image.width - cut_width) // 2
        top = (image.height - cut_height) // 2
        image = image.crop((left, top, left + cut_width, top + cut_height))
        if image.size != (width, height):
            # BOX averages all pixels that become one; for enlarging it would leave squares
            resample = Image.Resampling.BOX if scale > 1 else Image.Resampling.BICUBIC
            image = image.resize((width, height), resample)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1  # (3, H, W)

    def postprocess(self, pixel_values: torch.Tensor) -> list[Image.Image]:
        """`pixel_values (B, 3, H, W)` -> pictures."""
        pixels = ((pixel_values.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in pixels]


def pixels_of_tensor(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels `(3, ..., H, W)` of uint8, or of floats in [-1, 1], as float32 in [-1, 1]; raises
    `ValueError` for others."""
    if pixels.ndim >= 3 and pixels.shape[0] == 3:
        if pixels.dtype == torch.uint8:
            return pixels.cpu().float() / 127.5 - 1
        if pixels.is_floating_point() and pixels.numel():
            pixels = pixels.detach().cpu().float()
            if bool((pixels.abs() <= 1 + 1e-3).all()):  # half precision rounds; NaN is refused, too
                return pixels
            raise ValueError(
                f"a tensor of pixels must hold floats in [-1, 1], not {float(pixels.min()):g} to "
                f"{float(pixels.max()):g}; divide by 127.5 and subtract 1, or give uint8."
            )
    raise ValueError(
        "a picture as a tensor must be (3, H, W) of uint8 or of floats in [-1, 1], not "
        f"{_describe(pixels)}."
    )


def _bytes_of_array(array: np.ndarray) -> np.ndarray:
    """An array `(H, W)`, `(H, W, 3)` or `(H, W, 4)` of uint8, or of floats in [0, 1], as uint8."""
    is_picture = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    # empty arrays have no minimum
    if is_picture and np.issubdtype(array.dtype, np.floating) and array.size:
        if not (array.min() >= 0 and array.max() <= 1):  # this form refuses NaN, too
            raise ValueError(
                f"an array of floats must be in [0, 1], not {array.min():g} to {array.max():g}; "
                "give uint8 for 0 to 255."
            )
        return (array * 255).round().astype(np.uint8)
    if is_picture and array.dtype == np.uint8:
        return array
    raise ValueError(
        "a picture as an array must be (H, W, 3) of uint8 or of floats in [0, 1], not "
        f"{_describe(array)}."
    )


TokComImageProcessor.register_for_auto_class("AutoImageProcessor")


__all__ = [
    "ChatText",
    "TokComAudioProcessor",
    "TokComImageProcessor",
    "TokComScore",
    "as_clips",
    "as_pictures",
    "as_prompts",
    "as_sounds",
    "decode_ids",
    "decode_rows",
    "end_at_eos",
    "likeliest",
    "pixels_of_tensor",
    "prompt_ids",
    "read_latents",
    "read_sound",
    "read_wav",
    "take_new",
    "text_ids",
    "text_rows",
    "tokenize_texts",
    "vocabulary_size",
    "warn_of_new_characters",
    "with_pad_token",
    "write_latents",
    "write_wav",
]
