"""Texts and dialogues in, ids out: tokenizers are trained here, and documents tokenized once,
into a cache."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import xxhash
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from tokcom.processing_tokcom import ChatText, text_ids, vocabulary_size, with_pad_token
from tokcom.training.audit import cache_folder
from tokcom.training.records import messages_of
from tokcom.training.report import PartReport, Report

EOS_TOKEN = "</s>"
BATCH_BYTES = 1 << 22  # of text that is tokenized at once, whose ids take many times as much
LONGEST_WORD = 2000  # characters: the time that a word takes to learn from grows with its square
TOKENIZING = 1  # version of what the cache holds
# classes of tokenizers that `tokenizer.json` describes in full
PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
TOKENIZED = {
    "ids": datasets.List(datasets.Value("int32")),
    "characters": datasets.Value("int64"),
    "letters": datasets.Value("string"),
}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` tokens, one of which, `</s>`, ends a document, and a pad
    token behind them.

    Every text round-trips exactly, since every byte is a token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        # all 256 bytes, also those that the training text lacks
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece in _without_long_words(text))
    tokenizer.train_from_iterator(pieces, trainer)
    options = {"eos_token": EOS_TOKEN, "clean_up_tokenization_spaces": False}
    return with_pad_token(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options))


def _without_long_words(text: str) -> Iterator[str]:
    """A text in pieces that hold no word that is too long, such as a file in base64 or a genome;
    mostly the whole text."""
    start = 0
    for word in re.finditer(rf"\w{{{LONGEST_WORD}}}", text):
        yield text[start : word.end()]
        start = word.end()
    yield text[start:]


def has_tokenizer(name: str) -> bool:
    """Whether a local model directory holds a tokenizer; of others nothing is known, and it is
    taken to."""
    return not Path(name).is_dir() or (Path(name) / "tokenizer_config.json").is_file()


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or Hub repository; runs none of its code, and does not ask to.

    AutoTokenizer reads `config.json` first, and asks whether to run the code of a TokCom model,
    which its tokenizer does not need. So what is plain is loaded by its own class.
    """
    if get_tokenizer_config(name).get("tokenizer_class") in PLAIN_CLASSES:
        return PreTrainedTokenizerFast.from_pretrained(name)
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def get_tokenizer(
    name: str | None, vocab_size: int, documents: Iterable[dict], text_column: str
) -> PreTrainedTokenizerBase:
    """Load any AutoTokenizer by name or path, or train a BPE tokenizer on the documents."""
    if name is not None:
        tokenizer = load_tokenizer(name)
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"tokenizer {name!r} has no EOS token, which ends a document; choose one that has."
            )
        return with_pad_token(tokenizer)
    texts = (
        text
        for row in tqdm(documents, desc="training tokenizer", unit="doc")
        for text in _texts_of(row, text_column)
        if isinstance(text, str)
    )
    tokenizer = train_tokenizer(texts, vocab_size)
    smallest = vocabulary_size(tokenizer)
    if smallest > vocab_size:
        raise ValueError(
            f"`tokenizer_vocab_size` ({vocab_size}) must be at least {smallest}: 256 bytes and "
            "</s>."
        )
    return tokenizer


def _texts_of(record: dict, text_column: str) -> list:
    """The texts of a record: one, the several captions of a picture, or the turns of a dialogue;
    none of a broken dialogue, which is named when it is tokenized."""
    if text_column in record:
        text = record[text_column]
        return text if isinstance(text, list) else [text]
    try:
        return [turn["content"] for turn in messages_of(record)]
    except ValueError:
        return []


def tokenize_document(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """BOS (if the tokenizer has one) + ids + EOS."""
    ids = text_ids(tokenizer, text)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*start, *ids, tokenizer.eos_token_id]


def tokenize_rows(
    documents: Iterable[dict], tokenizer: PreTrainedTokenizerBase, text_column: str
) -> Iterator[list[int]]:
    """Ids of every document that is not blank; raises `ValueError` on a record whose text is
    missing."""
    for index, row in enumerate(documents):
        text = row[text_column]
        if not isinstance(text, str):
            raise ValueError(
                f"record {index} has no text in field {text_column!r} ({text!r}); repair or "
                "remove it."
            )
        # a blank document would be an EOS alone
        if text.strip():
            yield tokenize_document(tokenizer, text)


def tokenize_documents(
    documents: Iterable[dict],
    tokenizer: PreTrainedTokenizerBase,
    text_column: str,
    desc: str,
    num_proc: int = 1,
    part: PartReport | None = None,
) -> np.ndarray:
    """All documents as one array of ids `(tokens,)`, int32.

    Those of a `datasets.Dataset` are tokenized in batches by `num_proc` processes, once: the ids
    are mapped from a file in the cache of `datasets`, which other processes and later runs read,
    too. What was read is counted in `part`.
    """
    if isinstance(documents, datasets.Dataset):
        tokens, facts = _cached_tokens(documents, tokenizer, text_column, desc, num_proc)
    else:
        rows = tqdm(documents, desc=f"tokenizing {desc}", unit="doc")
        # int32: four bytes an id, for billions of them
        pieces = [
            np.asarray(ids, dtype=np.int32) for ids in tokenize_rows(rows, tokenizer, text_column)
        ]
        tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
        facts = {}
    if not len(tokens):
        raise ValueError(
            f"{desc} has no record with text in field {text_column!r}; give other data or another "
            "field."
        )
    if part is not None and facts:
        counted = {"documents": facts["documents"], "blank and left out": facts["blank"]}
        part.counts |= counted | {"characters": facts["characters"], "tokens": len(tokens)}
        part.letters = facts["letters"]
    return tokens


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the ids of a text depend on: it does not change when the tokenizer is used, as its
    pickle does."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content |= {"truncation": None, "padding": None}  # of the last call
    else:
        content = repr((type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())))
    # documents are joined with these, which `tokenizer.json` does not name
    ends = tokenizer.bos_token_id, tokenizer.eos_token_id
    return datasets.fingerprint.Hasher.hash(json.dumps([TOKENIZING, content, ends]))


def _content_digest(documents: datasets.Dataset, text_column: str) -> str:
    """Of records on the disk the fingerprint that `datasets` derived from their files, of others
    a digest of their texts."""
    if documents.cache_files:
        return documents._fingerprint
    digest = xxhash.xxh3_128()
    for text in documents[text_column]:
        content = (text or "").encode()
        # the length keeps "ab", "c" apart from "a", "bc"
        digest.update(f"{len(content)}:".encode() + content)
    return digest.hexdigest()


def _cached_tokens(
    documents: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    text_column: str,
    desc: str,
    num_proc: int,
) -> tuple[np.ndarray, dict]:
    """Ids from the cache, where they are written first if they are not there. A process waits at
    the lock of a file, not at a barrier of the process group, which would time out."""
    # whatever the ids depend on: another text or another tokenizer has another file
    key = datasets.fingerprint.Hasher.hash(
        [_content_digest(documents, text_column), tokenizer_digest(tokenizer)]
    )
    file = cache_folder() / f"tokens-{key}-{len(documents)}.i32"
    facts = file.with_suffix(".json")
    with FileLock(file.with_suffix(".lock")):
        if not facts.is_file():
            found = _write_tokens(file, documents, tokenizer, text_column, desc, num_proc)
            partial = facts.with_suffix(".tmp")
            partial.write_text(json.dumps(found), encoding="utf-8")
            partial.rename(facts)  # last, so that facts beside a file mean that it is whole
    # an empty file cannot be mapped
    if file.stat().st_size == 0:
        return np.zeros(0, np.int32), json.loads(facts.read_text(encoding="utf-8"))
    return np.asarray(np.memmap(file, np.int32, "r")), json.loads(facts.read_text(encoding="utf-8"))


def _write_tokens(
    file: Path, documents: datasets.Dataset, tokenizer, text_column: str, desc: str, num_proc: int
) -> dict:
    """Tokenize to a file; returns how many documents, blank ones and characters there were, and
    which characters."""
    # bytes of a document: with long ones a batch has fewer, so that its ids fit in memory
    mean = documents.data.nbytes / max(1, documents.data.num_rows)
    mapped = documents.select_columns([text_column]).map(
        _tokenize_batch,
        with_indices=True,
        batched=True,
        batch_size=int(min(1000, max(1, BATCH_BYTES // max(1.0, mean)))),
        remove_columns=[text_column],
        fn_kwargs={"tokenizer": tokenizer, "column": text_column},
        # told beforehand, since an empty first batch would be taken for a column of nulls
        features=datasets.Features(TOKENIZED),
        num_proc=num_proc if 1 < num_proc <= len(documents) else None,
        cache_file_name=str(file.with_suffix(".arrow")),
        # else `datasets` hashes the tokenizer's pickle, which changes when the tokenizer is used
        new_fingerprint=file.stem,
        load_from_cache_file=False,
        desc=f"tokenizing {desc}",
    )
    facts = {"documents": len(documents), "blank": 0, "characters": 0}
    letters: set[str] = set()
    with file.open("wb") as stream:
        for table in mapped.with_format("arrow").iter(1000):
            rows = table["ids"].combine_chunks()
            stream.write(rows.flatten().to_numpy(zero_copy_only=False).tobytes())
            facts["blank"] += rows.value_lengths().to_pylist().count(0)
            facts["characters"] += sum(table["characters"].to_pylist())
            letters.update(*(row for row in table["letters"].to_pylist() if row))
    written = [entry["filename"] for entry in mapped.cache_files]
    del mapped
    # the ids are in our own file now, and twice the space is not needed
    for name in written:
        Path(name).unlink(missing_ok=True)
    return facts | {"letters": "".join(sorted(letters))}


def _tokenize_batch(
    rows: dict[str, list], indices: list[int], tokenizer, column: str
) -> dict[str, list]:
    texts = rows[column]
    for index, text in zip(indices, texts):
        if not isinstance(text, str):
            raise ValueError(
                f"record {index} has no text in field {column!r} ({text!r}); repair or remove it."
            )
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    written = [text for text in texts if text.strip()]
    found = iter(text_ids(tokenizer, written) if written else [])
    # blank documents stay as empty rows, since `map` wants as many rows as it gave
    ids = [[*start, *next(found), tokenizer.eos_token_id] if text.strip() else [] for text in texts]
    letters = ["".join(set().union(*texts)), *[""] * (len(texts) - 1)]  # once for the batch
    return {"ids": ids, "characters": list(map(len, texts)), "letters": letters}


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> list[int]:
    """Ids of the turns before an answer: by the tokenizer's chat template, or if it has none
    their texts, line by line."""
    if tokenizer.chat_template:
        return ChatText.of(tokenizer, messages).ids(tokenizer)
    text = "\n".join(message["content"] for message in messages)
    return text_ids(tokenizer, text.rstrip(" "))  # as the pipeline does


def tokenize_dialogues(
    documents: Iterable[dict],
    tokenizer: PreTrainedTokenizerBase,
    desc: str,
    report: Report | None = None,
    part: PartReport | None = None,
) -> list[tuple]:
    """Ids of the prompt and of the last answer, which EOS ends, of every record; `report` counts
    or refuses those that are no dialogues, and `part` is told which characters there are."""
    report = Report() if report is None else report
    letters: set[str] = set()
    characters = 0
    pairs = []
    for index, record in enumerate(tqdm(documents, desc=f"tokenizing {desc}", unit="doc")):
        try:
            *before, answer = messages_of(record, f"{desc}, record {index}")
        except ValueError as error:
            report.skip(str(error))
            continue
        letters.update(answer["content"], *(message["content"] for message in before))
        characters += sum(len(message["content"]) for message in (*before, answer))
        ids = text_ids(tokenizer, answer["content"])
        pairs.append((tokenize_prompt(tokenizer, before), [*ids, tokenizer.eos_token_id]))
    if part is not None:
        part.letters = "".join(letters)
        part.counts["characters"] = characters
    return pairs
