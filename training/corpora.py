"""What a run learns from: packed text, a stream of it, dialogues, or pictures.

Every kind gives the datasets of a stage, says how much a batch holds, and measures the
statistics of a codec's latents.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase

from tokcom.configuration_codec_tokcom import TokComCodecConfig
from tokcom.configuration_tokcom import TokComConfig
from tokcom.modeling_tokcom import CODECS, TokComModel
from tokcom.processing_tokcom import CHARACTERS, with_pad_token
from tokcom.training.audit import audit
from tokcom.training.card import WORK
from tokcom.training.config import DataConfig, StageConfig, TrainConfig
from tokcom.training.data import (
    CodecMix,
    DialogueDataset,
    PackedDataset,
    StreamingPackedDataset,
    WindowShape,
    cache_latents,
)
from tokcom.training.documents import cut_document, part_kind
from tokcom.training.export import measure_latent_statistics
from tokcom.training.images import (
    ImageDataset,
    check_autoencoder,
    device_of,
    load_autoencoder,
    measure_image_statistics,
)
from tokcom.training.modalities import MODALITIES
from tokcom.training.presets import merge_overrides, preset_config
from tokcom.training.report import EXAMPLES, Report
from tokcom.training.sources import load_documents, read_sources
from tokcom.training.streams import (
    OmniDataset,
    is_text,
    measure_stream_statistics,
    unmeasured_streams,
)
from tokcom.training.tokens import (
    get_tokenizer,
    has_tokenizer,
    load_tokenizer,
    tokenize_dialogues,
    tokenize_documents,
)

EXAMPLE_TOKENS = 40  # of a text that is shown
MOST_LETTERS = 20_000  # characters of the training text that are kept with the tokenizer


class Corpus:
    """Packed text, and what the other kinds have in common with it.

    Args:
        train, validation: what is learnt, and what is held out; tokens `(T,)` each.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of the text or the captions.
    """

    modalities: tuple[str, ...] = ("text",)  # of the codecs that read such data
    rows_of = "texts"
    presets = "text such as tiny"
    streamed = False
    rows = "windows of {} tokens"
    autoencoder = None
    report: Report | None = None  # what was read
    digest: str | None = None  # of the training data, on the main process
    validation_digest: str | None = None  # likewise

    def __init__(self, train, validation, tokenizer: PreTrainedTokenizerBase | None):
        self.train = train
        self.validation = validation
        self.tokenizer = tokenizer

    def datasets(
        self,
        model: TokComModel,
        config: TrainConfig,
        options: StageConfig,
        accelerator: Accelerator,
    ) -> tuple[torch.utils.data.Dataset, torch.utils.data.Dataset]:
        """Training and validation dataset of the stage whose options these are; raises
        `ValueError` if a window does not fit."""
        shape = self._shape(model, config, options)
        latents = None
        rest = self.tokenizer.eos_token_id, config.seed
        if config.cache_latents and model.objective.stage != "codec":
            if shape.marks_starts:
                raise ValueError(
                    "this model reads token ids and no latents; set cache_latents=false."
                )
            if not list(model.codec.parameters()):
                raise ValueError(
                    "a codec without parameters encodes at no cost; set cache_latents=false."
                )
            with accelerator.main_process_first():  # which writes the file
                file = Path(config.output_dir) / WORK / "latents.f32"
                latents = cache_latents(model.to(accelerator.device).eval(), self.train, file)
        held_out = PackedDataset(self.validation, shape, *rest, training=False)
        train = PackedDataset(self.train, shape, *rest, training=True, latents=latents)
        if model.objective.stage == "codec":
            train = CodecMix(train, self.tokenizer, config.seed)
        return train, held_out

    @classmethod
    def serves(cls, codec_config: TokComCodecConfig | None) -> bool:
        """Whether a codec reads such data."""
        return codec_config is not None and codec_config.modality in cls.modalities

    def check_codec(
        self, codec_config: TokComCodecConfig, data: DataConfig, donor: str | None = None
    ) -> None:
        """Raise `ValueError`, with what to change, if a codec, that of the model `donor` if it is
        given, does not read such data."""
        if self.serves(codec_config):
            return
        known = MODALITIES[codec_config.modality]
        owner = f" of {donor}" if donor else ""
        other = "another model" if donor else f"a preset of {self.presets}"
        raise ValueError(
            f"the codec {codec_config.model_type!r}{owner} reads {known.reads} but the data are "
            f"{self.rows_of}; {known.remedy(data)}, or choose {other}."
        )

    def _shape(self, model: TokComModel, config: TrainConfig, options: StageConfig) -> WindowShape:
        self.check_codec(model.config.codec_config, config.data)
        chunk_size = model.config.codec_config.chunk_size
        longest = model.config.transformer_config.max_position_embeddings * chunk_size  # in tokens
        key = f"{model.objective.stage}.sequence_length"
        if options.sequence_length > longest:
            raise ValueError(
                f"`{key}` ({options.sequence_length}) is longer "
                f"than the model's maximum of {longest} tokens; shorten it or raise "
                "transformer_config.max_position_embeddings."
            )
        return WindowShape.of(model.config, options.sequence_length, key)

    def sampler(
        self, dataset: torch.utils.data.Dataset, batch_size: int, seed: int
    ) -> torch.utils.data.Sampler | None:
        """The order of rows, if it is not just any."""
        return None

    def count(self, batch: dict[str, torch.Tensor], codec_config) -> int:
        """Tokens in a batch."""
        return batch["input_ids"].numel()

    def measure(self, model: TokComModel) -> None:
        """Set the latent statistics of a codec, if it has any, from these data."""
        if hasattr(model.codec, "latent_mean"):
            measure_latent_statistics(model, self.first_tokens())

    def measure_rest(self, model: TokComModel) -> None:
        """Set the statistics of what the data of the codec's own stage did not have."""

    def first_tokens(self, count: int = 1_000_000) -> np.ndarray:
        """Training tokens, about `count` of them if not all are in memory."""
        return self.train


class StreamCorpus(Corpus):
    """Text that is read as it comes; every process reads a part of its own."""

    streamed = True

    def __init__(self, train, validation, tokenizer, text_column: str):
        super().__init__(train, validation, tokenizer)
        self.text_column = text_column

    def datasets(self, model, config, options, accelerator):
        shape = self._shape(model, config, options)
        place = str(config.data.train), accelerator.process_index, accelerator.num_processes
        settings = shape, config.seed, config.data.shuffle_buffer
        stream = StreamingPackedDataset(
            self.train, self.tokenizer, self.text_column, *settings, *place
        )
        held_out = PackedDataset(
            self.validation, shape, self.tokenizer.eos_token_id, config.seed, training=False
        )
        return stream, held_out

    def first_tokens(self, count: int = 1_000_000) -> np.ndarray:
        rows = []
        total = 0
        for row in self.train:
            rows.append(row)
            total += len(row[self.text_column] or "")
            # characters, about four to a token
            if total > 4 * count:
                break
        return tokenize_documents(
            rows, self.tokenizer, self.text_column, "a sample for latent statistics"
        )[:count]


class DialogueCorpus(Corpus):
    """Pairs of a prompt and its answer."""

    rows = "dialogues"

    def datasets(self, model, config, options, accelerator):
        rest = self._shape(model, config, options), self.tokenizer.eos_token_id
        return DialogueDataset(self.train, *rest), DialogueDataset(self.validation, *rest)

    def first_tokens(self, count: int = 1_000_000) -> np.ndarray:
        rows = [np.asarray([*prompt, *answer]) for prompt, answer in self.train]
        return np.concatenate(rows)[:count]


class PictureCorpus(Corpus):
    """Pictures or clips, with captions if there is a tokenizer; clips as the latents of a frozen
    autoencoder, if there is one."""

    modalities = ("image", "video")
    rows_of = "pictures"
    presets = "images such as style-tiny or of clips such as video-tiny"
    rows = "pictures"

    def __init__(self, train, validation, tokenizer, autoencoder: str | None = None):
        super().__init__(train, validation, tokenizer)
        self.autoencoder = None if autoencoder is None else load_autoencoder(autoencoder)

    def datasets(self, model, config, options, accelerator):
        codec = model.config.codec_config
        self.check_codec(codec, config.data)
        captions = (self.train.captions, self.validation.captions)
        longest = max((c["input_ids"].shape[1] for c in captions if c is not None), default=0)
        if longest > model.config.condition_length:
            raise ValueError(
                f"the longest caption has {longest} tokens, more than `model.condition_length` "
                f"({model.config.condition_length}); raise it or shorten the captions."
            )
        if config.cache_latents:
            raise ValueError("the latents of pictures are not cached; set cache_latents=false.")
        device = accelerator.device
        train = self._fitted(self.train, codec, device)
        # after `_fitted`, which forgets what an earlier stage has asked for
        train.augment(options.flip, options.shift)
        return train, self._fitted(self.validation, codec, device)

    def _fitted(self, dataset: ImageDataset, codec, device: torch.device) -> ImageDataset:
        """A part of the data as the codec reads it; raises `ValueError` if it does not fit."""
        check_autoencoder(self.autoencoder, codec)
        dataset.fit(codec, self.autoencoder)
        if self.autoencoder is not None:
            dataset.encode_once(device)
        return dataset

    def count(self, batch: dict[str, torch.Tensor], codec_config) -> int:
        return len(batch["pixel_values"]) * codec_config.num_tokens

    def measure(self, model: TokComModel) -> None:
        dataset = self._fitted(self.train, model.config.codec_config, device_of(model))
        dataset.set_epoch(0)  # wherever training has ended, or was taken up again
        measure_image_statistics(model, dataset)


class OmniCorpus(Corpus):
    """Records of several streams."""

    modalities = ("several",)
    rows_of = "records with several streams"
    presets = "several streams such as omni-tiny"
    rows = "records"

    def datasets(self, model, config, options, accelerator):
        self.check_codec(model.config.codec_config, config.data)
        if config.cache_latents:
            raise ValueError(
                "the latents of several streams are not cached; set cache_latents=false."
            )
        return self.train.fit(model.codec), self.validation.fit(model.codec)

    def sampler(self, dataset, batch_size, seed):
        return dataset.sampler(batch_size, seed)

    def count(self, batch, codec_config) -> int:
        return sum(
            len(rows) * self.train.lengths[name]
            for name, rows in batch["present"].items()
            if rows.any()
        )

    def measure(self, model: TokComModel) -> None:
        dataset = self.train.fit(model.codec)
        dataset.set_epoch(0)  # wherever training has ended, or was taken up again
        measure_stream_statistics(model, dataset)

    def measure_rest(self, model: TokComModel) -> None:
        dataset = self.train.fit(model.codec)
        # the codec of texts may have been trained alone
        names = unmeasured_streams(model.codec, dataset.streams)
        if names:
            dataset.set_epoch(0)
            measure_stream_statistics(model, dataset, names=names)


def codec_config_of(config: TrainConfig) -> TokComCodecConfig | None:
    """The configuration of the codec that the run will have; None if there is none, which
    whoever builds the model explains."""
    donor = config.init_from or config.codec_from
    try:
        if donor is None:
            fields = preset_config(config.preset, config.tokenizer_vocab_size).to_dict()
        else:
            fields = TokComConfig.from_pretrained(donor).to_dict()
        # the overrides of the run may choose another codec
        merge_overrides(fields, config.model)
        return TokComConfig(**fields).codec_config
    # here a mistake only costs what the data would be checked against; building the model reports
    # it
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError):
        return None


class Reading:
    """What a run reads: `corpus()` opens its sources, decodes or tokenizes them, and says in
    `report` what they are."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.codec_config = codec_config_of(config)
        # a folder may hold several kinds of data; without a word the codec's are read
        modality = None if self.codec_config is None else MODALITIES[self.codec_config.modality]
        kind = config.data.kind or getattr(modality, "data_kind", None)
        self.data = dataclasses.replace(config.data, kind=kind)
        self.report = Report(config.data.max_skipped)
        self.saved = Path(config.output_dir) / WORK / "tokenizer"

    def corpus(self, hold_out: bool = True) -> Corpus:
        """Everything, read; without `hold_out` all of it is training data, and is shown as
        validation data, too."""
        data = self.data
        train = load_documents(data.train, data, "train", self.report)
        several = bool(data.fields) or any(source.fields for source in read_sources(data.train))
        if not hold_out:
            validation = train
        elif data.validation is None:
            train, validation = self._split(train, several)
        else:
            validation = load_documents(data.validation, data, "validation", self.report)
        if several:
            return self._streams(train, validation)
        found = part_kind(train, data)
        other = part_kind(validation, data)
        if other != found:
            raise ValueError(
                f"`data.train` holds {found} and `data.validation` {other}; give the same kind."
            )
        # what the data are decides, and not what the codec reads: `check_codec` compares the two
        read = {"pictures": self._pictures, "dialogues": self._dialogues, "texts": self._texts}
        if found not in read:
            raise ValueError(
                f"{data.train} holds {found}; say which stream they are: "
                f"data.fields={{audio: audio}}, with a preset of several streams."
            )
        return read[found](train, validation)

    def _split(self, train, several: bool):
        """Hold out the last documents."""
        data = self.data
        if any(source.weight is not None for source in read_sources(data.train)):
            raise ValueError(
                "weighted sources repeat documents, so the last ones cannot be held out; give "
                "`data.validation` of its own."
            )
        if data.streaming:
            raise ValueError(
                "a stream has no last documents to hold out; give `data.validation` or "
                "streaming=false."
            )
        if len(train) == 1 and data.text_column in (train.column_names or ()) and not data.fields:
            train = cut_document(train, data)  # such as one .txt file
        if data.image_column in train.column_names or several:
            train = train.shuffle(seed=0)  # folders come class by class
        held_out = max(1, int(len(train) * data.validation_fraction))
        if len(train) < 2:
            raise ValueError(
                f"{data.train} holds one record, of which none can be held out; give "
                "`data.validation` or more of them."
            )
        cut = len(train) - held_out
        return train.select(range(cut)), train.select(range(cut, len(train)))

    def _audited(self, parts: dict, setting) -> dict:
        """The two parts of the data, decoded once; what is one and the same is decoded and
        counted once."""
        audited = {}
        same = len({id(dataset.records) for dataset in parts.values()}) == 1
        for name, dataset in parts.items():
            if audited and same:
                audited[name] = next(iter(audited.values()))
                continue
            part = self.report.part(name)
            dataset = audit(dataset, part, self.report, repr(setting), self.config.num_workers)
            part.records = len(dataset)
            part.examples = [
                dataset.describe(index) for index in range(min(EXAMPLES, len(dataset)))
            ]
            audited[name] = dataset
        return audited

    def _streams(self, train, validation) -> OmniCorpus:
        """The corpus of records whose columns are streams; texts of all streams share a
        tokenizer."""
        config = self.config
        columns = [name for name in train.column_names if is_text(train, name)]
        if more := set(validation.column_names) - set(train.column_names):
            raise ValueError(
                f"`data.validation` has the streams {sorted(more)}, which `data.train` lacks; "
                "correct `fields`."
            )
        tokenizer = None
        name = self._tokenizer_name()
        # that of an earlier call: a tokenizer trained anew may number its tokens otherwise
        if self.saved.is_dir():
            tokenizer = load_tokenizer(self.saved)
        elif columns or (name is not None and has_tokenizer(name)):
            texts = [{"text": row or ""} for column in columns for row in train[column]]
            tokenizer = get_tokenizer(name, config.tokenizer_vocab_size, texts, "text")
        if validation is not train:
            # of several sources, too, the first batches show all
            validation = validation.shuffle(seed=0)
        parts = {
            "training data": OmniDataset(train, tokenizer),
            "validation data": OmniDataset(validation, tokenizer),
        }
        if OmniCorpus.serves(self.codec_config):
            # its lengths are asked for, not its weights: nothing is allocated, and the random
            # numbers that weights would draw are left for the model of the run
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                codec = CODECS[self.codec_config.model_type]._from_config(self.codec_config)
            parts = self._audited(
                {name: part.fit(codec) for name, part in parts.items()}, self.codec_config
            )
        return OmniCorpus(*parts.values(), tokenizer)

    def _pictures(self, train, validation) -> PictureCorpus:
        data = self.data
        captions = data.captions
        tokenizer = None
        if captions in train.column_names:
            tokenizer = self._tokenizer(train, captions, pictures=True)
        if tokenizer is not None and captions not in validation.column_names:
            raise ValueError(
                f"`data.train` has captions ({captions!r}) and `data.validation` has none; give "
                "both or remove the captions by data.caption_column=none."
            )
        columns = data.image_column, captions, tokenizer, self.config.seed
        parts = {
            "training data": ImageDataset(train, *columns, training=True),
            "validation data": ImageDataset(validation, *columns, training=False),
        }
        if tokenizer is not None:
            self._remember(tokenizer, "".join(parts["training data"].letters))
        codec = self.codec_config
        if PictureCorpus.serves(codec):
            # what decoding depends on: with another size the outcome in the cache does not count
            size = codec.image_size, codec.clip_length
            parts = self._audited({name: part.fit(codec) for name, part in parts.items()}, size)
        return PictureCorpus(*parts.values(), tokenizer, self.config.autoencoder)

    def _tokenizer_name(self, pictures: bool = False) -> str | None:
        """Where the tokenizer comes from; raises `ValueError` if the model that training starts
        from gives ids another meaning."""
        config = self.config
        # the codec of pictures does not read their captions
        donor = config.init_from or (None if pictures else config.codec_from)
        if config.tokenizer and donor and has_tokenizer(donor):
            given, known = (
                with_pad_token(load_tokenizer(name)).get_vocab()
                for name in (config.tokenizer, donor)
            )
            if given != known:
                raise ValueError(
                    f"the tokenizer {config.tokenizer} gives ids another meaning than that of "
                    f"{donor}, whose weights know only its own; remove `tokenizer`."
                )
        return config.tokenizer or config.init_from or config.codec_from

    def _tokenizer(
        self, documents, text_column: str, pictures: bool = False
    ) -> PreTrainedTokenizerBase:
        config = self.config
        if self.saved.is_dir():
            return load_tokenizer(self.saved)
        name = self._tokenizer_name(pictures)
        if pictures and name == config.codec_from and name is not None and not has_tokenizer(name):
            name = None  # a codec of pictures without captions
        texts = documents.select_columns(text_column) if pictures else documents
        return get_tokenizer(name, config.tokenizer_vocab_size, texts, text_column)

    def _dialogues(self, train, validation) -> DialogueCorpus:
        if self.data.streaming or self.config.cache_latents:
            raise ValueError(
                "dialogues are neither streamed nor cached; set data.streaming and "
                "cache_latents to false."
            )
        tokenizer = self._tokenizer(train, self.data.text_column)
        pairs = self._pairs(train, tokenizer, "dialogues")
        # without held-out data the training data are shown as validation data, and tokenized once
        held_out = pairs
        if validation is not train:
            held_out = self._pairs(validation, tokenizer, "validation")
        return DialogueCorpus(pairs, held_out, tokenizer)

    def _texts(self, train, validation) -> Corpus:
        data = self.data
        tokenizer = self._tokenizer(train, data.text_column)
        if data.streaming and self.config.cache_latents:
            raise ValueError(
                "a stream is not cached; set data.streaming=false or cache_latents=false."
            )
        same = validation is train
        if data.streaming and same:
            # nothing of a stream can be held out, and reading it twice would take its time
            return StreamCorpus(train, np.zeros(0, np.int32), tokenizer, data.text_column)
        # validation text is tokenized whole, also beside a stream: every validation sees the same
        validation = self._tokens(
            validation, tokenizer, "training text" if same else "validation text"
        )
        if data.streaming:
            return StreamCorpus(train, validation, tokenizer, data.text_column)
        train = validation if same else self._tokens(train, tokenizer, "training text")
        return Corpus(train, validation, tokenizer)

    def _tokens(self, documents, tokenizer: PreTrainedTokenizerBase, name: str) -> np.ndarray:
        part = self.report.part(name)
        tokens = tokenize_documents(
            documents, tokenizer, self.data.text_column, name, self.data.num_proc, part
        )
        # examples come from the beginning: the ids may be a mapped file of many gigabytes
        ends = np.flatnonzero(tokens[: 1 << 20] == tokenizer.eos_token_id)
        for start, end in list(zip([0, *(ends + 1)], [*ends, len(tokens)]))[:EXAMPLES]:
            if start < end:
                ids = tokens[start : min(end, start + EXAMPLE_TOKENS)]
                part.examples.append(repr(tokenizer.decode(ids.tolist(), skip_special_tokens=True)))
        if name == "training text":
            self._remember(tokenizer, part.letters)
        return tokens

    def _remember(self, tokenizer: PreTrainedTokenizerBase, letters: str) -> None:
        """Keep with the tokenizer which characters the training texts have, so that a pipeline
        can tell which they never had. Of a model that training starts from they are known if its
        tokenizer tells."""
        known = tokenizer.init_kwargs.get(CHARACTERS)
        # then nobody knows what the donor was trained on, and a partial list would blame the wrong
        # texts
        if known is None and (self.config.init_from or self.config.codec_from):
            return
        together = "".join(sorted(set(letters) | set(known or "")))
        # beyond that the list says little and would bloat every tokenizer file
        if len(together) <= MOST_LETTERS:
            tokenizer.init_kwargs[CHARACTERS] = together

    def _pairs(self, documents, tokenizer: PreTrainedTokenizerBase, name: str) -> list[tuple]:
        part = self.report.part(name)
        pairs = tokenize_dialogues(documents, tokenizer, name, self.report, part)
        if name == "dialogues":
            self._remember(tokenizer, part.letters)
        part.records = len(pairs)
        window = self.config.flow.sequence_length
        for prompt, answer in pairs:
            part.add({"tokens of the prompt": len(prompt), "tokens of the answer": len(answer)})
            cut = len(prompt) + len(answer) > window
            part.add({f"cut to a window of {window} tokens": cut})
        for prompt, answer in pairs[:EXAMPLES]:
            texts = (
                tokenizer.decode(ids[:EXAMPLE_TOKENS], skip_special_tokens=True)
                for ids in (prompt, answer)
            )
            part.examples.append(" -> ".join(map(repr, texts)))
        return pairs


def read_data(config: TrainConfig) -> Corpus:
    """The data of a run; the main process prints what was read. A tokenizer that
    `output_dir/run` keeps is used again.

    Raises `ValueError` for data that do not serve.
    """
    reading = Reading(config)
    corpus = reading.corpus()
    corpus.report = reading.report
    if os.environ.get("RANK", "0") == "0":
        print(reading.report, flush=True)
    return corpus
