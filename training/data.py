"""Windows of packed tokens, and dialogues, as training reads them.

Documents are joined with the tokenizer's BOS / EOS and cut into windows from an offset that is
drawn anew for every epoch, so nearly every position holds a real token and chunk boundaries fall
everywhere. How documents are found and tokenized is in `sources.py` and `tokens.py`, whose
functions can be imported from here, too.
"""

import hashlib
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from tokcom.processing_tokcom import text_ids, vocabulary_size
from tokcom.training.checkpoints import first_line
from tokcom.training.config import DataConfig
from tokcom.training.records import messages_of
from tokcom.training.sources import Source, load_documents, read_sources
from tokcom.training.tokens import (
    get_tokenizer,
    tokenize_dialogues,
    tokenize_document,
    tokenize_documents,
    tokenize_prompt,
    tokenize_rows,
    train_tokenizer,
)

__all__ = [
    "CodecMix",
    "DataConfig",
    "DialogueDataset",
    "PackedDataset",
    "Source",
    "StreamingPackedDataset",
    "WindowShape",
    "cache_latents",
    "get_tokenizer",
    "load_documents",
    "messages_of",
    "random_unicode",
    "read_patiently",
    "read_sources",
    "tokenize_dialogues",
    "tokenize_document",
    "tokenize_documents",
    "tokenize_prompt",
    "tokenize_rows",
    "train_tokenizer",
]
SLOW = 30.0  # seconds for one record of a stream, after which it is named


@dataclass(frozen=True)
class WindowShape:
    """How texts are cut into the windows that a model is trained on.

    Args:
        length (`int`): tokens of a window. multiple (`int`): tokens of which a window holds a
            multiple, K of most models.
        pads_left (`bool`): of models that regress latents, which know whole chunks only: a
            prompt is padded on its left to whole chunks. Others go on inside a prompt's last
            chunk.
        marks_starts (`bool`): windows say whether they begin where a text begins, for models
            that tell it apart.
        ends_at_eos (`bool`): nothing is learnt after the chunk with the first EOS; bidirectional
            models, which denoise all at once, learn to fill the rest with EOS.
        lead (`int`): tokens before a document that a window moved to its beginning holds: 1 is
            the EOS from which an autoregressive model begins a text.
        key (`str`): the setting that says the length, which errors name.
    """

    length: int
    multiple: int
    pads_left: bool = False
    marks_starts: bool = False
    ends_at_eos: bool = False
    lead: int = 0
    key: str = field(default="sequence_length", compare=False)

    def __post_init__(self):
        if self.length % self.multiple:
            raise ValueError(
                f"`{self.key}` ({self.length}) must be a multiple of `chunk_size` "
                f"({self.multiple}); use {self.length + -self.length % self.multiple}."
            )

    @classmethod
    def of(cls, config, length: int, key: str = "sequence_length") -> "WindowShape":
        """The shape that a `TokComConfig` asks for."""
        return cls(
            length,
            config.codec_config.length_multiple,
            config.prediction_type != "tokens",
            config.transformer_config.start_latents,
            config.transformer_config.block_size is not None,
            key=key,
        )


class DialogueDataset(torch.utils.data.Dataset):
    """One prompt and its answer per window; `known_mask` is 1 on the prompt, which is given
    clean and not predicted.

    A long prompt loses its beginning, a long answer its end. What follows the answer is EOS.
    """

    def __init__(self, pairs: list[tuple], shape: WindowShape, eos_token_id: int):
        # a chunk for each of the two
        if shape.length < 2 * shape.multiple:
            raise ValueError(
                f"`{shape.key}` ({shape.length}) must hold a prompt and an answer; use at "
                f"least {2 * shape.multiple}."
            )
        self.pairs = pairs
        self.shape = shape
        self.eos_token_id = eos_token_id

    def set_epoch(self, epoch: int) -> None:
        """Windows are the same in every epoch."""

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        prompt, answer = self.pairs[index]
        length = self.shape.length
        multiple = self.shape.multiple
        # at least one chunk is left for the answer
        prompt = prompt[-(length - multiple) :]
        start = len(prompt)
        if self.shape.pads_left:
            # rounded up; an empty prompt becomes one chunk of padding
            start = -(-max(1, start) // multiple) * multiple
        answer = answer[: length - start]
        end = start + len(answer)
        input_ids = torch.full((length,), self.eos_token_id)  # (T,)
        attention_mask = torch.ones_like(input_ids)
        known_mask = torch.zeros_like(input_ids)
        input_ids[start - len(prompt) : start] = torch.tensor(prompt, dtype=torch.long)
        input_ids[start:end] = torch.tensor(answer, dtype=torch.long)
        # the padding on the left
        attention_mask[: start - len(prompt)] = 0
        if self.shape.ends_at_eos:
            # the chunk in which the answer ends is learnt whole, EOS included; those after it are
            # not
            attention_mask[-(-end // multiple) * multiple :] = 0
        known_mask[:start] = 1
        item = {"input_ids": input_ids, "attention_mask": attention_mask, "known_mask": known_mask}
        return item | ({"text_start": torch.tensor(True)} if self.shape.marks_starts else {})


class PackedDataset(torch.utils.data.Dataset):
    """Windows over the packed documents, from a random offset per epoch.

    Training moves every second window back to where its document begins, if that is less than a
    window away: prompts mostly begin there, too. A corpus shorter than a window gives one window
    padded at the end. Of models that pad prompts on the left, one window in four has its first
    0..K-1 tokens masked instead.

    With `latents (T // K, C)`, those of the whole corpus, each window brings its own, begins at
    a multiple of K and has no token masked.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        shape: WindowShape,
        eos_token_id: int,
        seed: int,
        training: bool,
        latents: np.ndarray | None = None,
    ):
        if len(tokens) == 0:
            raise ValueError(
                "the dataset is empty: no token after tokenization; check the data path."
            )
        if latents is not None and len(tokens) < shape.length:
            raise ValueError(
                f"`cache_latents` needs more text: {len(tokens)} tokens do not fill a window of "
                f"{shape.length}."
            )
        self.tokens = tokens
        self.shape = shape
        self.length = shape.length
        # where documents begin; an EOS that ends the corpus begins none
        self.starts = np.concatenate(([0], np.flatnonzero(tokens[:-1] == eos_token_id) + 1))
        self.seed = seed
        self.training = training
        self.epoch = 0
        self.latents = latents
        # In training one window less than would fit, which leaves at least a window's length of
        # room for the offset of the epoch.
        self.windows = max(1, len(tokens) // shape.length - int(training))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        multiple = self.shape.multiple
        room = max(0, len(self.tokens) - self.windows * self.length)
        # stored latents are of fixed chunks, so windows may begin only where a chunk does
        stride = 1 if self.latents is None else multiple
        # one offset for the whole epoch, so its windows do not overlap and hold no token twice
        generator = np.random.default_rng((self.seed, self.epoch))
        offset = generator.integers(room // stride + 1) * stride if self.training else 0
        start = int(offset) + index * self.length
        if self.latents is not None:
            window = self.tokens[start : start + self.length]
            places = slice(start // multiple, (start + self.length) // multiple)
            return _window(window, self.length, 0) | {
                "latents": torch.from_numpy(self.latents[places].copy())
            }
        # of this window alone, whichever worker reads it and in whatever order
        generator = np.random.default_rng((self.seed, self.epoch, index))
        # of the document
        # the last document that begins at `start` or before
        begin = int(self.starts[np.searchsorted(self.starts, start, side="right") - 1])
        if (
            not self.shape.pads_left
            and self.training
            and generator.random() < 0.5
            # then the moved window still overlaps the one that it replaces
            and start - begin < self.length
        ):
            # the first document has no EOS before it
            start = max(0, begin - self.shape.lead)
        left = _left_padding(generator, multiple) if self.training and self.shape.pads_left else 0
        item = _window(self.tokens[start : start + self.length], self.length, left)
        return item | (
            {"text_start": torch.tensor(start == begin)} if self.shape.marks_starts else {}
        )


class CodecMix(torch.utils.data.Dataset):
    """Windows of another dataset, some of them replaced by what its text lacks, so that a codec
    learns every token.

    One window in four holds ids drawn uniformly, one in eight random Unicode text, which is
    mostly single bytes.
    """

    def __init__(
        self, dataset: torch.utils.data.Dataset, tokenizer: PreTrainedTokenizerBase, seed: int
    ):
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.seed = seed
        self.epoch = 0
        self.size = vocabulary_size(tokenizer)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = self.dataset[index]
        # the 1 keeps these draws apart from those of the window itself, which are of (seed, epoch,
        # index)
        generator = np.random.default_rng((self.seed, self.epoch, index, 1))
        draw = generator.random()
        length = len(item["input_ids"])
        # uniform ids meet every row of the table, however rare its token is in the text
        if draw < 1 / 4:
            item["input_ids"] = torch.from_numpy(generator.integers(self.size, size=length))
        elif draw < 3 / 8:
            ids = text_ids(self.tokenizer, random_unicode(generator, length))[:length]
            item["input_ids"][: len(ids)] = torch.tensor(ids, dtype=torch.long)
        return item


def random_unicode(generator: np.random.Generator, length: int) -> str:
    """A string of `length` characters from all planes of Unicode; half of them from Latin and
    its neighbours."""
    # below the ideographs of East Asia: alphabets and syllabaries
    near = generator.integers(1, 0x3000, size=length)
    far = generator.integers(1, 0x110000, size=length)
    points = np.where(generator.random(length) < 0.5, near, far)
    # surrogates are no characters
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


@torch.no_grad()
def cache_latents(model, tokens: np.ndarray, file: Path, rows: int = 16384) -> np.ndarray:
    """The standardised latents `(T // K, C)` of `tokens (T,)`, float32, memory-mapped from `file`.

    The file is written once, whole or not at all, and read again as long as text and codec are
    the same.
    """
    codec = model.config.codec_config
    shape = len(tokens) // codec.chunk_size, codec.latent_channels  # (N, C)
    digest = hashlib.sha256(np.ascontiguousarray(tokens))
    for name, value in sorted(model.codec.state_dict().items()):
        # numpy has no bfloat16
        digest.update(name.encode() + value.cpu().float().numpy().tobytes())
    key = file.with_suffix(".sha256")
    if (
        not file.is_file()
        or not key.is_file()
        or key.read_text(encoding="utf-8") != digest.hexdigest()
    ):
        partial = file.with_suffix(".tmp")
        # the key goes, too: it must never stand beside latents of something else
        for old in (file, key, partial):
            old.unlink(missing_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        size = 4 * shape[0] * shape[1]  # bytes of float32
        free = shutil.disk_usage(file.parent).free
        if size > free:
            raise ValueError(
                f"`cache_latents` would write {size / 2**30:.1f} GiB but {file.parent} has "
                f"{free / 2**30:.1f} GiB free."
            )
        written = np.memmap(partial, np.float32, "w+", shape=shape)
        # chunks of one call: about `rows` tokens, as one long row
        stride = rows // codec.chunk_size
        for start in tqdm(range(0, shape[0], stride), desc="encoding training text", unit="batch"):
            part = tokens[
                start * codec.chunk_size : min(start + stride, shape[0]) * codec.chunk_size
            ]
            ids = torch.from_numpy(part.astype(np.int64))[None].to(model.device)
            written[start : start + stride] = model.encode(ids).latents[0].float().cpu().numpy()
        written.flush()
        partial.rename(file)
        # after the rename: a run that is killed in between has no key, and computes them again
        key.write_text(digest.hexdigest(), encoding="utf-8")
    return np.memmap(file, np.float32, "r", shape=shape)


def read_patiently(
    documents: Iterable[dict], name: str, attempts: int = 5, wait: float = 1.0
) -> Iterator[dict]:
    """Records of a stream. What fails is opened again, where it failed, after `wait` seconds,
    then twice as many, up to `attempts` times in a row; what is slow is named.

    Raises `ConnectionError` when it keeps failing, and at once `ValueError` for records that
    cannot be parsed.
    """
    done = failures = 0
    while True:
        try:
            asked = time.monotonic()
            for index, record in enumerate(documents):
                # opening a stream again begins at its start: pass over what was already given out
                if index < done:
                    continue
                if time.monotonic() - asked > SLOW:
                    warnings.warn(
                        f"{name} took {time.monotonic() - asked:.0f} s for record {index}.",
                        stacklevel=2,
                    )
                done = done + 1
                # only failures in a row count
                failures = 0
                yield record
                # not while the receiver works on a record
                asked = time.monotonic()
            return
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{name}: record {done} cannot be read ({first_line(error)})."
            ) from error
        except Exception as error:
            failures += 1
            if failures > attempts:
                raise ConnectionError(
                    f"{name} failed {failures} times in a row at record {done} ({error}); check "
                    "the source, then run the same command again."
                ) from error
            pause = wait * 2 ** (failures - 1)
            warnings.warn(
                f"{name} failed at record {done} ({error}); again in {pause:g} s.", stacklevel=2
            )
            time.sleep(pause)


class StreamingPackedDataset(torch.utils.data.IterableDataset):
    """The same windows from documents that are read as a stream, tokenized on the fly.

    Of `world` processes every one reads documents of its own: whole files if their number is a
    multiple of it, else every so many documents. Its workers share its files. Half of the
    windows leave out what remains of a document and begin with the next.
    """

    def __init__(
        self,
        documents,
        tokenizer,
        text_column,
        shape: WindowShape,
        seed,
        shuffle_buffer,
        name="the stream",
        rank=0,
        world=1,
    ):
        self.documents = documents
        self.tokenizer = tokenizer
        self.text_column = text_column
        self.shape = shape
        self.length = shape.length
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.name = name
        self.rank = rank
        self.world = world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        generator = np.random.default_rng(
            (self.seed, self.epoch, self.rank, 0 if worker is None else worker.id)
        )
        # the same order on every process, which is then split, so no document is read by two of
        # them
        documents = self.documents.shuffle(
            seed=self.seed + self.epoch, buffer_size=self.shuffle_buffer
        )
        if self.world > 1:
            documents = split_dataset_by_node(documents, self.rank, self.world)
        documents = read_patiently(documents, self.name)
        shape = self.shape
        buffer: list[int] = []
        begins: list[int] = []  # where documents begin in the buffer
        # the first window of an epoch begins anywhere, so that boundaries differ from epoch to
        # epoch
        skip = int(generator.integers(self.length))
        for ids in tokenize_rows(documents, self.tokenizer, self.text_column):
            begins.append(len(buffer))
            buffer.extend(ids)
            start = skip
            while len(buffer) >= start + self.length:
                later = next((begin for begin in begins if begin >= start), None)
                if not shape.pads_left and later is not None and generator.random() < 0.5:
                    start = later
                    if len(buffer) < start + self.length:
                        break
                left = _left_padding(generator, shape.multiple) if shape.pads_left else 0
                item = _window(
                    np.asarray(buffer[start : start + self.length], dtype=np.int32),
                    self.length,
                    left,
                )
                yield item | (
                    {"text_start": torch.tensor(start in begins)} if shape.marks_starts else {}
                )
                start = start + self.length
                skip = 0
            # until the first window `skip` counts from the start of the buffer, which must stay as
            # it is
            if skip == 0:
                buffer = buffer[start:]
                begins = [begin - start for begin in begins if begin >= start]


def _left_padding(generator: np.random.Generator, chunk_size: int) -> int:
    """0 for three windows in four, otherwise 0..K-1."""
    # K - 1 at most: what is padded is less than a chunk, as in a prompt of any length
    return int(generator.integers(chunk_size)) if generator.random() < 0.25 else 0


def _window(ids: np.ndarray, length: int, left_padding: int) -> dict[str, torch.Tensor]:
    input_ids = torch.zeros(length, dtype=torch.long)
    attention_mask = torch.zeros(length, dtype=torch.long)
    input_ids[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
    attention_mask[left_padding : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
