"""The work of `tokcom sample-corpus`: texts of a causal language model, to train another one on.

    tokcom sample-corpus --model HuggingFaceTB/SmolLM2-135M --output corpus --num_characters 1000000

The folder gets train/part-00000.parquet and so on (column `text`), validation.parquet if asked for,
and provenance.json. It is written after every batch, so the same command given again goes on where
it was stopped. To train on it: data.train=corpus/train data.validation=corpus/validation.parquet.
"""

import argparse
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tokcom.cli.loading import usable_device
from tokcom.integrity_tokcom import file_digest
from tokcom.training.checkpoints import first_line
from tokcom.training.tokens import load_tokenizer

COUNTS = ("sampled", "kept", "not_ended", "too_short", "duplicates", "characters")  # of texts
# What may differ when a run goes on: the texts sampled so far do not depend on it.
NOT_SETTINGS = ("output", "num_texts", "num_characters", "debug", "command_line")
TRAIN = "train"  # of a corpus: the folder of its texts but those for validation
PATIENCE = 8  # batches without a text to keep, after which something must be wrong


class InPlaceLayer(DynamicLayer):
    """A layer of the cache that writes into one buffer: joining copies on every token is slow."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.buffers: tuple[torch.Tensor, ...] = ()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Add (rows, heads, new, size); gives views of all (rows, heads, length, size) so far."""
        start = self.get_seq_length()
        states = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            # the longest text from the start: growing would copy what is there
            self.buffers = tuple(s.new_empty(*s.shape[:2], self.room, s.shape[3]) for s in states)
        end = start + key_states.shape[2]
        for buffer, state in zip(self.buffers, states, strict=True):
            buffer[:, :, start:end] = state
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows of `indices` (rows,)."""
        length = self.get_seq_length()
        self.buffers = tuple(buffer[indices] for buffer in self.buffers)
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)


@torch.compile(dynamic=True)
def _attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float):
    """One query per row, (rows, groups, repeats, 1, size), over keys (rows, groups, 1, n, size)."""
    # a sum of products instead of a matrix product, which the compiler fuses with the softmax
    scores = (query.float() * keys.float()).sum(-1) * scale
    weights = torch.softmax(scores, dim=-1)
    return (weights[..., None] * values.float()).sum(-2).to(query.dtype)


def single_token_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention (rows, 1, heads, size) of one new token, fused; anything else goes to sdpa.

    On a processor a fused loop reads the cache once, several times faster than sdpa in bfloat16.
    """
    # variants of attention that the fused loop does not know
    extra = any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    if query.shape[2] > 1 or attention_mask is not None or extra:
        kwargs["scaling"] = scaling
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows, heads, _, size = query.shape
    scale = size**-0.5 if scaling is None else scaling
    # heads that share a key stand together
    grouped = query.view(rows, key.shape[1], heads // key.shape[1], 1, size)
    found = _attend(grouped, key[:, :, None], value[:, :, None], scale)
    return found.reshape(rows, 1, heads, value.shape[-1]), None


def draw(
    logits: torch.Tensor, temperature: float, top_k: int, min_p: float, generator: torch.Generator
) -> torch.Tensor:
    """Next tokens (rows, 1) from logits (rows, vocabulary): top-k, then min-p, then one draw."""
    size = logits.shape[1]
    values, indices = logits.topk(min(top_k or size, size))
    # probabilities relative to the largest, which is 1; `multinomial` needs no sum of 1
    weights = ((values.float() - values[:, :1].float()) / temperature).exp()
    # so min-p is a plain comparison
    weights = weights.masked_fill(weights < min_p, 0.0)
    return indices.gather(1, torch.multinomial(weights, 1, generator=generator))


def load_teacher(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model in a folder or on the Hub; runs none of its code.

    Raises `FileNotFoundError` if nothing is there, and `ValueError` for what is no such model.
    """
    folder = Path(name)
    # a missing folder would be taken for a Hub id, which it cannot be
    if name.startswith(("/", ".")) and not folder.is_dir():
        raise FileNotFoundError(f"--model {name} does not exist.")
    wanted = "name a causal language model of transformers, such as HuggingFaceTB/SmolLM2-135M"
    if (folder / "model_index.json").is_file():
        raise ValueError(
            f"--model {name} is a TokCom model, which cannot be the teacher; {wanted}."
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"--model {name} holds no config.json, so it is no model; {wanted}."
        )
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError) as error:
        # the message of transformers may name other files, or an option that there is not here
        raise ValueError(
            f"--model {name} cannot be loaded ({first_line(error).rstrip('.')}); {wanted}."
        ) from error


class Teacher:
    """A causal language model with what its texts begin and end with."""

    def __init__(self, args: argparse.Namespace) -> None:
        args.device = usable_device(args.device)  # a setting of the corpus, as it was found
        self.args = args
        self.model = load_teacher(args.model, getattr(torch, args.dtype))
        self.model.eval().to(args.device)
        if args.compile:
            AttentionInterface.register("single_token", single_token_attention)
            AttentionMaskInterface.register("single_token", sdpa_mask)
            self.model.set_attn_implementation("single_token")
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(args.model)
        self.start = self._start()
        self.ends = self._ends()
        # positions of the longest text
        self.room = len(self.start) + args.max_new_tokens
        limit = getattr(self.model.config, "max_position_embeddings", None) or self.room
        if self.room > limit:
            raise ValueError(
                f"--max_new_tokens {args.max_new_tokens} after a start of {len(self.start)} tokens "
                f"is beyond the {limit} positions of {args.model}; "
                f"give at most {limit - len(self.start)}."
            )

    def _start(self) -> list[int]:
        if self.args.prompt:
            return self.tokenizer(self.args.prompt).input_ids
        bos = self.tokenizer.bos_token_id
        bos = self.model.config.bos_token_id if bos is None else bos
        if bos is None:
            raise ValueError(f"{self.args.model} has no BOS token to begin with; give --prompt.")
        return [bos]

    def _ends(self) -> torch.Tensor:
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        if ends is None:
            raise ValueError(
                f"{self.args.model} has no EOS token, so no text could end by itself; "
                "set eos_token_id in its generation_config.json."
            )
        # A BOS in the middle begins another text; some models are trained with no other end.
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        ends = [*(ends if isinstance(ends, list) else [ends]), *bos]
        return torch.tensor(ends, device=self.args.device)

    def identity(self) -> dict:
        """The Hub revision, or the sha256 of each weight file of a folder."""
        folder = Path(self.args.model)
        if folder.is_dir():
            # a folder has no revision, so its weights identify it
            files = sorted(folder.glob("*.safetensors"))
            return {"sha256": {file.name: file_digest(file) for file in files}}
        return {"revision": getattr(self.model.config, "_commit_hash", None)}

    def _cache(self) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        # Only plain layers: those of a sliding window or of a state keep their own bookkeeping.
        for index, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer:
                cache.layers[index] = InPlaceLayer(self.room)
        return cache

    @torch.inference_mode()
    def sample(self, number: int) -> list[str | None]:
        """The texts of batch `number`, None for each that did not end by itself."""
        args = self.args
        # of the batch alone: a run that goes on draws what it would have drawn
        seed = hashlib.sha256(f"{args.seed} {number}".encode()).digest()
        # 7 bytes, which are within what torch takes for a seed
        generator = torch.Generator(args.device).manual_seed(int.from_bytes(seed[:7]))
        cache = self._cache()
        rows = torch.arange(args.batch_size, device=args.device)
        tokens = rows.new_zeros(args.batch_size, args.max_new_tokens)  # (rows, longest text)
        # -1 is a text that has not ended
        lengths = rows.new_full((args.batch_size,), -1)
        inputs = torch.tensor([self.start], device=args.device).repeat(args.batch_size, 1)
        active = torch.ones_like(rows, dtype=torch.bool)
        for step in range(args.max_new_tokens):
            # (rows left, V)
            logits = self.model(inputs, past_key_values=cache, use_cache=True).logits[:, -1]
            # (rows left, 1)
            inputs = draw(logits, args.temperature, args.top_k, args.min_p, generator)
            # `rows` are the places in the batch of the rows that are left
            tokens[rows, step] = inputs[:, 0]
            ended = active & torch.isin(inputs[:, 0], self.ends)
            lengths[rows[ended]] = step
            # ended rows go on being computed until they are dropped, but nothing of them is kept
            active &= ~ended
            left = int(active.sum())
            if not left:
                break
            # Dropping ended rows copies the cache, so it pays only when it drops many.
            if left <= 0.85 * len(rows):
                chosen = active.nonzero()[:, 0]
                cache.batch_select_indices(chosen)
                rows = rows[chosen]
                inputs = inputs[chosen]
                active = active[chosen]
        pairs = zip(tokens.tolist(), lengths.tolist(), strict=True)
        return [self._text(row[:length]) if length >= 0 else None for row, length in pairs]

    def _text(self, tokens: list[int]) -> str:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        # with the start, since the first token's space depends on what stands before it
        return self.tokenizer.decode(self.start + tokens, **options).strip()


def digest_text(text: str) -> bytes:
    """16 bytes that stand for a text, as the texts of a large corpus would fill the memory."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def read_texts(path: Path) -> list[str]:
    """The column `text` of a parquet file; `ValueError` if it has none."""
    try:
        return pq.read_table(path, columns=["text"])["text"].to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is not a parquet file with a column `text` ({error}).") from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and rename it, so that it is never seen half written."""
    part = path.with_name(path.name + ".tmp")
    write(part)
    os.replace(part, path)


class Corpus:
    """A folder of texts, written again after every batch, and the state to go on from.

    The file in progress is written before the state. After a crash between the two it holds the
    texts of one batch too many, at its end, where the state's number of texts leaves them out.
    """

    def __init__(self, folder: Path, settings: dict, excluded: Sequence[Path]) -> None:
        self.folder = folder
        self.settings = settings
        self.seen = {digest_text(text) for path in excluded for text in read_texts(path)}
        self.texts: list[str] = []
        (folder / TRAIN).mkdir(parents=True, exist_ok=True)
        if (folder / "state.json").exists():
            self.state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            self._resume()
        else:
            self._refuse_others()
            date = datetime.now(UTC).isoformat(timespec="seconds")
            self.state = {"settings": settings, "date": date, "batches": 0, "files": 0, "texts": 0}
            self.state |= {"seconds": 0.0, "counts": dict.fromkeys(COUNTS, 0)}

    def _refuse_others(self) -> None:
        """Raise `ValueError` if the folder holds texts that no run of ours has written."""
        others = [*sorted((self.folder / TRAIN).glob("*")), self.folder / "validation.parquet"]
        others = [path for path in others if path.exists()]
        if others:
            raise ValueError(
                f"{self.folder} holds {others[0].relative_to(self.folder)}, but no state.json to go "
                "on from, so it is not a corpus that was begun here; give another --output."
            )

    def _resume(self) -> None:
        for name in self.settings | self.state["settings"]:
            old = self.state["settings"].get(name)
            new = self.settings.get(name)
            # texts of two settings in one corpus could not be told apart
            if old != new:
                raise ValueError(
                    f"{self.folder} was begun with {name} {old!r}, not {new!r}; "
                    "give the old value or another --output."
                )
        for index in range(self.state["files"]):
            # digests are not stored, since the texts are there to compute them from
            self.seen.update(map(digest_text, read_texts(self._file(index)[0])))
        if self.state["texts"]:
            self.texts = read_texts(self._file(self.state["files"])[0])[: self.state["texts"]]
            self.seen.update(map(digest_text, self.texts))

    def _file(self, index: int) -> tuple[Path, int]:
        """Path of the file of this index, and how many texts it takes."""
        validation = self.settings["validation"]
        if validation and index == 0:
            # the first texts: a corpus that is still growing has its validation part already
            return self.folder / "validation.parquet", validation
        name = f"part-{index - bool(validation):05d}.parquet"
        # a folder of their own, which training reads as a whole
        return self.folder / TRAIN / name, self.settings["texts_per_file"]

    def add(self, texts: list[str | None], seconds: float) -> None:
        """Take a batch: keep its new, ended and long enough texts, and write files and state."""
        counts = self.state["counts"]
        for text in texts:
            counts["sampled"] += 1
            if text is None:
                counts["not_ended"] += 1
            elif len(text) < self.settings["min_characters"]:
                counts["too_short"] += 1
            elif (digest := digest_text(text)) in self.seen:
                counts["duplicates"] += 1
            else:
                self.seen.add(digest)
                self.texts.append(text)
                counts["kept"] += 1
                counts["characters"] += len(text)
        self.state["batches"] += 1
        self.state["seconds"] += seconds
        self._write()

    def _write(self) -> None:
        provenance = {key: self.state[key] for key in ("settings", "date", "batches", "counts")}
        provenance |= {"torch": torch.__version__, "transformers": transformers.__version__}
        # in every file, so that it is known where a part comes from that lies elsewhere
        schema = pa.schema([("text", pa.string())], {"provenance": json.dumps(provenance)})
        # full files are finished, and the rest is written to the one in progress
        while self.texts:
            path, room = self._file(self.state["files"])
            table = pa.table({"text": self.texts[:room]}, schema=schema)
            replace_file(path, lambda part, table=table: pq.write_table(table, part))
            if len(self.texts) < room:
                break
            self.texts = self.texts[room:]
            self.state["files"] += 1
        self.state["texts"] = len(self.texts)
        # the state last: it says which of the other files' texts count
        for name, content in (("provenance", provenance), ("state", self.state)):
            text = json.dumps(content, indent=2) + "\n"
            replace_file(
                self.folder / f"{name}.json",
                lambda part, text=text: part.write_text(text, encoding="utf-8"),
            )


def run(args: argparse.Namespace, stop: threading.Event | None = None) -> dict[str, int]:
    """Sample until there is enough or `stop` is set; gives the counts."""
    teacher = Teacher(args)
    settings = {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}
    # by content: the files may lie elsewhere when the run goes on
    settings |= {"exclude": [file_digest(path) for path in args.exclude]}
    # another revision of the model would write other texts from the same seeds
    settings |= teacher.identity()
    corpus = Corpus(args.output, settings, args.exclude)
    state = corpus.state
    counts = state["counts"]
    max_texts = args.num_texts or float("inf")
    max_characters = args.num_characters or float("inf")
    unit = "kept" if args.num_characters is None else "characters"
    total = max_texts if args.num_characters is None else max_characters
    with tqdm(total=total, initial=counts[unit], unit=f" {unit}", unit_scale=True) as bar:
        while counts["kept"] < max_texts and counts["characters"] < max_characters:
            if stop is not None and stop.is_set():
                break
            began = time.monotonic()
            corpus.add(teacher.sample(state["batches"]), time.monotonic() - began)
            if not counts["kept"] and state["batches"] >= PATIENCE:
                raise ValueError(
                    f"none of {counts['sampled']} texts is kept: {counts['not_ended']} did not end "
                    f"within --max_new_tokens {args.max_new_tokens}, {counts['too_short']} are "
                    f"below --min_characters {args.min_characters}; change one of the two."
                )
            bar.update(counts[unit] - bar.n)
            bar.set_postfix({"batches": state["batches"], "duplicates": counts["duplicates"]})
    # over all calls: the seconds are kept with the state
    rate = counts["characters"] / max(state["seconds"], 1e-9)
    print(*(f"{name} {value:,}" for name, value in counts.items()), sep=", ", end="")
    print(f", {rate:,.0f} characters/s")
    return counts


def run_until_stopped(args: argparse.Namespace) -> dict[str, int]:
    """`run`, which SIGTERM or SIGINT ends after the batch in progress, so that none is lost."""
    stopped = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    # only noted, because a batch that is interrupted would be lost
    before = [signal.signal(number, lambda *_: stopped.set()) for number in numbers]
    try:
        return run(args, stopped)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
