"""Text in, packed token windows out.

Documents are tokenized once, joined with the tokenizer's BOS / EOS, and cut into windows from an offset that is drawn
anew for every epoch, so nearly every position holds a real token and chunk boundaries fall everywhere.
"""

import hashlib
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import datasets
import numpy as np
import torch
import yaml
from datasets.distributed import split_dataset_by_node
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tokcom.processing_tokcom import text_ids, vocabulary_size, with_pad_token
from tokcom.training.checkpoints import first_line
from tokcom.training.config import DataConfig

DIALOGUES = ("prompt", "messages", "conversations")  # fields that make a record a dialogue
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}
SLOW = 30.0  # seconds for one record of a stream, after which it is named
FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
FILMS = (".mp4", ".webm", ".mov", ".avi", ".mkv")
EOS_TOKEN = "</s>"


def _local_files(source: str) -> tuple[str, list[str]] | None:
    """`(builder, files)` of a local file or folder; None for a name on the Hub."""
    path = Path(source)
    if not path.exists():
        if path.suffix in FORMATS:
            raise FileNotFoundError(
                f"data file {source} does not exist; give an existing file, folder or Hub name."
            )
        return None
    for builder, kinds in (
        (("videofolder", FILMS), ("imagefolder", PICTURES)) if path.is_dir() else ()
    ):
        found = sorted(
            p for p in path.rglob("*") if p.suffix.lower() in kinds or p.stem == "metadata"
        )
        if any(p.suffix.lower() in kinds for p in found):
            return builder, [str(p) for p in found]
    files = sorted(p for p in path.rglob("*") if p.suffix in FORMATS) if path.is_dir() else [path]
    kinds = {FORMATS.get(p.suffix) for p in files}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(
            f"{source}: expected files of one kind out of {', '.join(FORMATS)}, found {sorted(map(str, kinds))}."
        )
    return kinds.pop(), [str(p) for p in files]


def _folders_of_frames(path: Path, config: DataConfig) -> datasets.Dataset:
    """Every folder that holds pictures as one clip of them in the order of their names; with several folders of such folders the
    names of those are captions."""
    folders = sorted({p.parent for p in path.rglob("*") if p.suffix.lower() in PICTURES})
    if not folders:
        raise ValueError(
            f"{path} holds no pictures; with data.frame_folders=true every folder of pictures is a clip."
        )
    frames = [
        [str(p) for p in sorted(f.iterdir()) if p.suffix.lower() in PICTURES] for f in folders
    ]
    classes = [folder.parent.name for folder in folders]
    columns = {config.image_column: frames}
    if len(set(classes)) > 1:
        columns[config.caption_column] = classes
    return datasets.Dataset.from_dict(columns)


@dataclass
class Source:
    """One of several sources: where it lies, which of its fields holds the text, and how much of it is used.

    `weight` is the share of documents drawn from it, relative to the other sources; `fraction` in (0, 1] or `max_samples`
    take a part, of a stream its head. `fields` names for each of several streams the field that holds it; `modality` with `field` is
    short for one.
    """

    path: str
    field: str | None = None
    fields: dict[str, str] | None = None
    modality: str | None = None
    name: str | None = None  # configuration of a Hub dataset
    weight: float | None = None
    max_samples: int | None = None
    fraction: float = 1.0

    def __post_init__(self):
        if (self.weight is not None and self.weight <= 0) or not 0 < self.fraction <= 1:
            raise ValueError(
                f"source {self.path}: `weight` ({self.weight}) must be positive, `fraction` ({self.fraction}) in (0, 1]."
            )
        if self.modality is not None:
            if self.field is None or self.fields is not None:
                raise ValueError(
                    f"source {self.path}: `modality` ({self.modality!r}) is that of one `field`; name it."
                )
            self.fields = {self.modality: self.field}
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(
                f"source {self.path}: `max_samples` ({self.max_samples}) must be at least 1."
            )

    def load(self, config: DataConfig, split: str):
        """Its records with the fields that training reads."""
        local = _local_files(self.path)
        if local is None:
            name = self.name or config.name
            part = datasets.load_dataset(self.path, name, split=split, streaming=config.streaming)
        else:
            builder, files = local
            options = {"sample_by": "document"} if builder == "text" else {}
            options |= {"drop_labels": False} if builder in ("imagefolder", "videofolder") else {}
            if config.frame_folders:
                return self._part_of(_folders_of_frames(Path(self.path), config), config.streaming)
            try:
                part = datasets.load_dataset(
                    builder, data_files=files, split="train", streaming=config.streaming, **options
                )
            except datasets.exceptions.DatasetGenerationError as error:
                reason = first_line(error.__cause__ or error)
                raise ValueError(
                    f"{self.path} cannot be read ({reason}); repair or remove the file."
                ) from error
            if builder == "videofolder" and config.image_column not in part.column_names:
                part = part.rename_column("video", config.image_column)
        part = self._select(part, config)
        return self._part_of(part, config.streaming)

    def _select(self, part, config: DataConfig):
        fields = self.fields or config.fields
        if fields:
            return self._streams(part, fields, config)
        columns = part.column_names or list(next(iter(part), {}))
        text = self.field or config.text_column
        if config.image_column in columns and (
            text not in columns or text == config.caption_column
        ):
            return self._pictures(part, config)
        wanted = [text]
        if columns and text not in columns:
            wanted = (
                [] if self.field else [name for name in (*DIALOGUES, "answer") if name in columns]
            )
            if not wanted or ("prompt" in wanted) != ("answer" in wanted):
                raise ValueError(
                    f"records of {self.path} have no field {text!r} (fields: {', '.join(columns)}); set "
                    "`data.text_column` to one of them, or give dialogues: `prompt` and `answer`, `messages`, `conversations`."
                )
        part = as_stored(part.select_columns(wanted))
        return (
            part
            if wanted != [text] or text == config.text_column
            else part.rename_column(text, config.text_column)
        )

    def _streams(self, part, fields: dict[str, str], config: DataConfig):
        """The fields of several streams under the names of the streams, undecoded."""
        if config.streaming:
            raise ValueError(
                "records of several streams are not streamed; set data.streaming=false."
            )
        missing = [field for field in fields.values() if field not in part.column_names]
        if self.fields and missing or len(missing) == len(fields):
            raise ValueError(
                f"records of {self.path} have no field {missing[0]!r} (fields: {', '.join(part.column_names)}); correct `fields`."
            )
        columns = {stream: field for stream, field in fields.items() if field not in missing}
        part = part.select_columns(list(columns.values()))
        part = part.rename_columns(
            {field: stream for stream, field in columns.items() if field != stream}
        )
        return as_stored(part)

    @staticmethod
    def _pictures(part, config: DataConfig):
        """Pictures with their captions; the names of folders or classes serve where there are none."""
        if config.streaming:
            raise ValueError("pictures are not streamed; set data.streaming=false.")
        image, caption = config.image_column, config.caption_column
        label = part.features.get("label")
        if (
            caption not in part.column_names
            and isinstance(label, datasets.ClassLabel)
            and label.num_classes > 1
        ):
            names = [label.names[i] for i in part["label"]]
            part = part.remove_columns("label").add_column(caption, names)
        return as_stored(
            part.select_columns([name for name in (image, caption) if name in part.column_names])
        )

    def _part_of(self, part, streaming: bool):
        if streaming:
            if self.fraction < 1:
                raise ValueError(
                    f"source {self.path}: the length of a stream is unknown, so `fraction` cannot be taken; use `max_samples`."
                )
            return part if self.max_samples is None else part.take(self.max_samples)
        count = max(1, round(self.fraction * len(part)))
        count = count if self.max_samples is None else min(count, self.max_samples)
        return part if count >= len(part) else part.shuffle(seed=0).select(range(count))


def read_sources(source: str | dict | list[str | dict]) -> list[Source]:
    """`data.train`: one source or several, each a path or name, a dictionary of `Source`'s fields, or a .yaml list of them."""
    if isinstance(source, str) and Path(source).suffix in (".yaml", ".yml"):
        source = yaml.safe_load(Path(source).read_text())
    known, sources = {field.name for field in fields(Source)}, []
    for item in source if isinstance(source, list) else [source]:
        values = item if isinstance(item, dict) else {"path": item}
        if "path" not in values or set(values) - known:
            raise ValueError(
                f"a data source must have `path` and may have {sorted(known - {'path'})}, not {values!r}."
            )
        sources.append(Source(**values))
    return sources


def as_stored(part):
    """Records whose pictures, films and sounds are not decoded, and whose texts are of one type: sources are joined by equal ones,
    and parquet knows two."""
    for name, feature in (part.features or {}).items():
        if type(feature) in (datasets.Image, datasets.Video, datasets.Audio):
            part = part.cast_column(name, type(feature)(decode=False))
        elif getattr(feature, "dtype", None) == "large_string":
            part = part.cast_column(name, datasets.Value("string"))
    return part


def load_documents(
    source: str | dict | list[str | dict], config: DataConfig, split: str
) -> Iterable[str]:
    """Records of one or several sources as an iterable that can be iterated again: with field `config.text_column`, or if
    there is none with those of a dialogue: `prompt` and `answer`, `messages`, or `conversations`.

    Sources follow each other, or if any has a weight are mixed, the smaller ones repeated until all are used up. Raises
    `ValueError` when a source has neither and when there is no document.
    """
    sources = read_sources(source)
    parts = [item.load(config, split) for item in sources]
    if any(item.weight is not None for item in sources):
        weights = np.array([1.0 if item.weight is None else item.weight for item in sources])
        shares = (weights / weights.sum()).tolist()
        joined = datasets.interleave_datasets(
            parts, shares, seed=0, stopping_strategy="all_exhausted"
        )
    else:
        joined = datasets.concatenate_datasets(parts)
    if config.streaming:
        return joined
    first = joined.column_names[0] if joined.column_names else None
    if any(item.fields for item in sources) or config.fields:
        shared = split == "train" and any(
            item.fields is None for item in sources
        )  # else each names its own
        missing = set(config.fields or ()) - set(joined.column_names) if shared else set()
        if missing or not len(joined):
            raise ValueError(
                f"{source} has no record with {sorted(missing) or 'a stream'}; correct `data.fields` ({config.fields}), which names "
                "the field of each stream."
            )
        return joined
    if len(joined) == 0 or not any(str(row or "").strip() for row in joined[first]):
        raise ValueError(
            f"no text in {source}: the dataset is empty; check the path and `data.text_column`."
        )
    return joined


def cut_document(documents: datasets.Dataset, config: DataConfig) -> datasets.Dataset:
    """One text as two documents, the second `validation_fraction` of it from the beginning of a line or a word."""
    text = documents[0][config.text_column]
    place = int(len(text) * (1 - config.validation_fraction))
    for mark in ("\n", " "):
        found = text.rfind(mark, int(0.9 * place), place)
        if found > 0:
            place = found + 1
            break
    return datasets.Dataset.from_dict({config.text_column: [text[:place], text[place:]]})


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` tokens, one of which, `</s>`, ends a document, and a pad token behind them.

    Every text round-trips exactly, since every byte is a token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    options = {"eos_token": EOS_TOKEN, "clean_up_tokenization_spaces": False}
    return with_pad_token(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options))


def get_tokenizer(
    name: str | None, vocab_size: int, documents: Iterable[dict], text_column: str
) -> PreTrainedTokenizerBase:
    """Load any AutoTokenizer by name or path, or train a BPE tokenizer on the documents."""
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"tokenizer {name!r} has no EOS token, which ends a document; choose one that has."
            )
        return with_pad_token(tokenizer)
    texts = (
        text
        for row in tqdm(documents, desc="training tokenizer", unit="doc")
        for text in (
            [row[text_column]]
            if text_column in row
            else [turn["content"] for turn in messages_of(row)]
        )
        if isinstance(text, str)
    )
    tokenizer = train_tokenizer(texts, vocab_size)
    smallest = vocabulary_size(tokenizer)
    if smallest > vocab_size:
        raise ValueError(
            f"`tokenizer_vocab_size` ({vocab_size}) must be at least {smallest}: 256 bytes and </s>."
        )
    return tokenizer


def tokenize_document(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """BOS (if the tokenizer has one) + ids + EOS."""
    ids = text_ids(tokenizer, text)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*start, *ids, tokenizer.eos_token_id]


def tokenize_rows(
    documents: Iterable[dict], tokenizer: PreTrainedTokenizerBase, text_column: str
) -> Iterator[list[int]]:
    """Ids of every document that is not blank; raises `ValueError` on a record whose text is missing."""
    for index, row in enumerate(documents):
        text = row[text_column]
        if not isinstance(text, str):
            raise ValueError(
                f"record {index} has no text in field {text_column!r} ({text!r}); repair or remove it."
            )
        if text.strip():
            yield tokenize_document(tokenizer, text)


def tokenize_documents(
    documents: Iterable[dict], tokenizer: PreTrainedTokenizerBase, text_column: str, desc: str
) -> np.ndarray:
    """All documents as one array of ids `(tokens,)`."""
    rows = tqdm(documents, desc=f"tokenizing {desc}", unit="doc")
    pieces = [
        np.asarray(ids, dtype=np.int32) for ids in tokenize_rows(rows, tokenizer, text_column)
    ]
    if not pieces:
        raise ValueError(
            f"{desc} has no record with text in field {text_column!r}; give other data or another field."
        )
    return np.concatenate(pieces)


def is_dialogue(documents) -> bool:
    """Whether records are dialogues, not texts."""
    return bool(set(DIALOGUES) & set(documents.column_names or next(iter(documents), {})))


def messages_of(record: dict) -> list[dict[str, str]]:
    """`[{"role", "content"}, ...]` of a record of any of the three forms; `ValueError` if it does not end with an answer."""
    if record.get("prompt") is not None:
        return [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["answer"]},
        ]
    turns = record.get("messages") or record.get("conversations") or []
    try:
        pairs = [
            (turn["role"], turn["content"]) if "role" in turn else (turn["from"], turn["value"])
            for turn in turns
        ]
        messages = [{"role": ROLES[role], "content": text} for role, text in pairs]
    except KeyError as error:
        raise ValueError(
            f"a turn of {turns!r} has no or an unknown {error}; known roles are {sorted(ROLES)}."
        ) from error
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"the dialogue {turns!r} must end with an answer of the assistant to something."
        )
    return messages


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> list[int]:
    """Ids of the turns before an answer: by the tokenizer's chat template, or if it has none their texts, line by line."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text_ids(tokenizer, text.rstrip(" "), special_tokens=True)
    text = "\n".join(message["content"] for message in messages)
    return text_ids(tokenizer, text.rstrip(" "))  # as the pipeline does


def tokenize_dialogues(
    documents: Iterable[dict], tokenizer: PreTrainedTokenizerBase, desc: str
) -> list[tuple]:
    """Ids of the prompt and of the last answer, which EOS ends, of every record."""
    pairs = []
    for record in tqdm(documents, desc=f"tokenizing {desc}", unit="doc"):
        *before, answer = messages_of(record)
        ids = text_ids(tokenizer, answer["content"])
        pairs.append((tokenize_prompt(tokenizer, before), [*ids, tokenizer.eos_token_id]))
    return pairs


@dataclass(frozen=True)
class WindowShape:
    """How texts are cut into the windows that a model is trained on.

    Args:
        length (`int`): tokens of a window. multiple (`int`): tokens of which a window holds a multiple, K of most models.
        pads_left (`bool`): of models that regress latents, which know whole chunks only: a prompt is padded on its left
            to whole chunks. Others go on inside a prompt's last chunk.
        marks_starts (`bool`): windows say whether they begin where a text begins, for models that tell it apart.
        ends_at_eos (`bool`): nothing is learnt after the chunk with the first EOS; bidirectional models, which denoise all
            at once, learn to fill the rest with EOS.
        lead (`int`): tokens before a document that a window moved to its beginning holds: 1 is the EOS from which an
            autoregressive model begins a text.
    """

    length: int
    multiple: int
    pads_left: bool = False
    marks_starts: bool = False
    ends_at_eos: bool = False
    lead: int = 0

    def __post_init__(self):
        if self.length % self.multiple:
            raise ValueError(
                f"`sequence_length` ({self.length}) must be a multiple of `chunk_size` ({self.multiple}); "
                f"use {self.length + -self.length % self.multiple}."
            )

    @classmethod
    def of(cls, config, length: int) -> "WindowShape":
        """The shape that a `TokComConfig` asks for."""
        return cls(
            length,
            config.codec_config.length_multiple,
            config.prediction_type != "tokens",
            config.transformer_config.start_latents,
            config.transformer_config.block_size is not None,
        )


class DialogueDataset(torch.utils.data.Dataset):
    """One prompt and its answer per window; `known_mask` is 1 on the prompt, which is given clean and not predicted.

    A long prompt loses its beginning, a long answer its end. What follows the answer is EOS.
    """

    def __init__(self, pairs: list[tuple], shape: WindowShape, eos_token_id: int):
        if shape.length < 2 * shape.multiple:
            raise ValueError(
                f"`sequence_length` ({shape.length}) must hold a prompt and an answer; use at least {2 * shape.multiple}."
            )
        self.pairs, self.shape, self.eos_token_id = pairs, shape, eos_token_id

    def set_epoch(self, epoch: int) -> None:
        """Windows are the same in every epoch."""

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        prompt, answer = self.pairs[index]
        length, multiple = self.shape.length, self.shape.multiple
        prompt = prompt[-(length - multiple) :]
        start = len(prompt)
        if self.shape.pads_left:
            start = -(-max(1, start) // multiple) * multiple
        answer = answer[: length - start]
        end = start + len(answer)
        input_ids = torch.full((length,), self.eos_token_id)
        attention_mask = torch.ones_like(input_ids)
        known_mask = torch.zeros_like(input_ids)
        input_ids[start - len(prompt) : start] = torch.tensor(prompt, dtype=torch.long)
        input_ids[start:end] = torch.tensor(answer, dtype=torch.long)
        attention_mask[: start - len(prompt)] = 0
        if self.shape.ends_at_eos:
            attention_mask[-(-end // multiple) * multiple :] = 0
        known_mask[:start] = 1
        item = {"input_ids": input_ids, "attention_mask": attention_mask, "known_mask": known_mask}
        return item | ({"text_start": torch.tensor(True)} if self.shape.marks_starts else {})


class PackedDataset(torch.utils.data.Dataset):
    """Windows over the packed documents, from a random offset per epoch.

    Training moves every second window back to where its document begins, if that is less than a window away: prompts
    mostly begin there, too. A corpus shorter than a window gives one window padded at the end. Of models that pad
    prompts on the left, one window in four has its first 0..K-1 tokens masked instead.

    With `latents (T // K, C)`, those of the whole corpus, each window brings its own, begins at a multiple of K and has no
    token masked.
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
                f"`cache_latents` needs more text: {len(tokens)} tokens do not fill a window of {shape.length}."
            )
        self.tokens, self.shape, self.length = tokens, shape, shape.length
        self.starts = np.concatenate(
            ([0], np.flatnonzero(tokens[:-1] == eos_token_id) + 1)
        )  # of documents
        self.seed, self.training, self.epoch, self.latents = seed, training, 0, latents
        self.windows = max(1, len(tokens) // shape.length - int(training))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        multiple = self.shape.multiple
        room = max(0, len(self.tokens) - self.windows * self.length)
        stride = 1 if self.latents is None else multiple
        generator = np.random.default_rng((self.seed, self.epoch))
        offset = generator.integers(room // stride + 1) * stride if self.training else 0
        start = int(offset) + index * self.length
        if self.latents is not None:
            window = self.tokens[start : start + self.length]
            places = slice(start // multiple, (start + self.length) // multiple)
            return _window(window, self.length, 0) | {
                "latents": torch.from_numpy(self.latents[places].copy())
            }
        generator = np.random.default_rng((self.seed, self.epoch, index))
        begin = int(
            self.starts[np.searchsorted(self.starts, start, side="right") - 1]
        )  # of the document
        if (
            not self.shape.pads_left
            and self.training
            and generator.random() < 0.5
            and start - begin < self.length
        ):
            start = max(0, begin - self.shape.lead)
        left = _left_padding(generator, multiple) if self.training and self.shape.pads_left else 0
        item = _window(self.tokens[start : start + self.length], self.length, left)
        return item | (
            {"text_start": torch.tensor(start == begin)} if self.shape.marks_starts else {}
        )


class CodecMix(torch.utils.data.Dataset):
    """Windows of another dataset, some of them replaced by what its text lacks, so that a codec learns every token.

    One window in four holds ids drawn uniformly, one in eight random Unicode text, which is mostly single bytes.
    """

    def __init__(
        self, dataset: torch.utils.data.Dataset, tokenizer: PreTrainedTokenizerBase, seed: int
    ):
        self.dataset, self.tokenizer, self.seed, self.epoch = dataset, tokenizer, seed, 0
        self.size = vocabulary_size(tokenizer)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = self.dataset[index]
        generator = np.random.default_rng((self.seed, self.epoch, index, 1))
        kind = generator.random()
        length = len(item["input_ids"])
        if kind < 1 / 4:
            item["input_ids"] = torch.from_numpy(generator.integers(self.size, size=length))
        elif kind < 3 / 8:
            ids = text_ids(self.tokenizer, random_unicode(generator, length))[:length]
            item["input_ids"][: len(ids)] = torch.tensor(ids, dtype=torch.long)
        return item


def random_unicode(generator: np.random.Generator, length: int) -> str:
    """A string of `length` characters from all planes of Unicode; half of them from Latin and its neighbours."""
    near = generator.integers(1, 0x3000, size=length)
    far = generator.integers(1, 0x110000, size=length)
    points = np.where(generator.random(length) < 0.5, near, far)
    return "".join(
        chr(point) for point in points if not 0xD800 <= point < 0xE000
    )  # surrogates are no characters


@torch.no_grad()
def cache_latents(model, tokens: np.ndarray, file: Path, rows: int = 16384) -> np.ndarray:
    """The standardised latents `(T // K, C)` of `tokens (T,)`, float32, memory-mapped from `file`.

    The file is written once, whole or not at all, and read again as long as text and codec are the same.
    """
    codec = model.config.codec_config
    shape = len(tokens) // codec.chunk_size, codec.latent_channels
    digest = hashlib.sha256(np.ascontiguousarray(tokens))
    for name, value in sorted(model.codec.state_dict().items()):
        digest.update(name.encode() + value.cpu().float().numpy().tobytes())
    key = file.with_suffix(".sha256")
    if not file.is_file() or not key.is_file() or key.read_text() != digest.hexdigest():
        partial = file.with_suffix(".tmp")
        for old in (file, key, partial):
            old.unlink(missing_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        size = 4 * shape[0] * shape[1]
        free = shutil.disk_usage(file.parent).free
        if size > free:
            raise ValueError(
                f"`cache_latents` would write {size / 2**30:.1f} GiB but {file.parent} has {free / 2**30:.1f} GiB free."
            )
        written = np.memmap(partial, np.float32, "w+", shape=shape)
        stride = rows // codec.chunk_size
        for start in tqdm(range(0, shape[0], stride), desc="encoding training text", unit="batch"):
            part = tokens[
                start * codec.chunk_size : min(start + stride, shape[0]) * codec.chunk_size
            ]
            ids = torch.from_numpy(part.astype(np.int64))[None].to(model.device)
            written[start : start + stride] = model.encode(ids).latents[0].float().cpu().numpy()
        written.flush()
        partial.rename(file)
        key.write_text(digest.hexdigest())
    return np.memmap(file, np.float32, "r", shape=shape)


def read_patiently(
    documents: Iterable[dict], name: str, attempts: int = 5, wait: float = 1.0
) -> Iterator[dict]:
    """Records of a stream. What fails is opened again, where it failed, after `wait` seconds, then twice as many, up to
    `attempts` times in a row; what is slow is named.

    Raises `ConnectionError` when it keeps failing, and at once `ValueError` for records that cannot be parsed.
    """
    done = failures = 0
    while True:
        try:
            asked = time.monotonic()
            for index, record in enumerate(documents):
                if index < done:
                    continue
                if time.monotonic() - asked > SLOW:
                    warnings.warn(
                        f"{name} took {time.monotonic() - asked:.0f} s for record {index}.",
                        stacklevel=2,
                    )
                done, failures = done + 1, 0
                yield record
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
                    f"{name} failed {failures} times in a row at record {done} ({error}); check the source, then run the same "
                    "command again."
                ) from error
            pause = wait * 2 ** (failures - 1)
            warnings.warn(
                f"{name} failed at record {done} ({error}); again in {pause:g} s.", stacklevel=2
            )
            time.sleep(pause)


class StreamingPackedDataset(torch.utils.data.IterableDataset):
    """The same windows from documents that are read as a stream, tokenized on the fly.

    Of `world` processes every one reads documents of its own: whole files if their number is a multiple of it, else every so many
    documents. Its workers share its files. Half of the windows leave out what remains of a document and begin with the next.
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
        self.documents, self.tokenizer, self.text_column = documents, tokenizer, text_column
        self.shape, self.length, self.seed, self.shuffle_buffer = (
            shape,
            shape.length,
            seed,
            shuffle_buffer,
        )
        self.name, self.rank, self.world = name, rank, world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        generator = np.random.default_rng(
            (self.seed, self.epoch, self.rank, 0 if worker is None else worker.id)
        )
        documents = self.documents.shuffle(
            seed=self.seed + self.epoch, buffer_size=self.shuffle_buffer
        )
        if self.world > 1:
            documents = split_dataset_by_node(documents, self.rank, self.world)
        documents = read_patiently(documents, self.name)
        shape = self.shape
        buffer: list[int] = []
        begins: list[int] = []  # where documents begin in the buffer
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
                start, skip = start + self.length, 0
            if skip == 0:
                buffer = buffer[start:]
                begins = [begin - start for begin in begins if begin >= start]


def _left_padding(generator: np.random.Generator, chunk_size: int) -> int:
    """0 for three windows in four, otherwise 0..K-1."""
    return int(generator.integers(chunk_size)) if generator.random() < 0.25 else 0


def _window(ids: np.ndarray, length: int, left_padding: int) -> dict[str, torch.Tensor]:
    input_ids = torch.zeros(length, dtype=torch.long)
    attention_mask = torch.zeros(length, dtype=torch.long)
    input_ids[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
    attention_mask[left_padding : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
