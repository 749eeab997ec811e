"""What all pipelines share: files on disk and on the Hub, noise, the sampler, progress, callbacks.

Notable choices: weights, tokenizer, card and code lie at the root of one flat repository, the
scheduler in `scheduler/`; a push writes everything anew into an empty folder, so that checkpoints
and logs of a training run cannot slip in; the Hub's refusals are explained. `TokComPipeline`
(texts) and the pipelines of `pipeline_media_tokcom.py` add the calls.
"""

import contextlib
import inspect
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from huggingface_hub import create_branch, create_repo, upload_folder
from huggingface_hub.constants import ENDPOINT as HF_ENDPOINT
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from .integrity_tokcom import CheckedFiles, write_checksums
from .interface_tokcom import explain_unknown_arguments
from .processing_tokcom import tokenize_texts, vocabulary_size, with_pad_token
from .sampling_tokcom import (
    Blocks,
    TokComBlockSampler,
    TokComSampling,
    join_blocks,
    row_noise,
    spawn_generators,
    split_blocks,
)
from .tasks_tokcom import TokComTask, captions_of, pad_rows

# modality of a codec -> the pipeline of its models
PIPELINE_NAMES = {
    "text": "TokComPipeline",
    "image": "TokComImagePipeline",
    "video": "TokComVideoPipeline",
    "several": "TokComOmniPipeline",
}
CARD = "README.md"
HTTP_ERROR = HfHubHTTPError.__bases__[0]  # of the client that huggingface_hub uses, whichever it is
# of earlier pushes, which these replace
WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]
RECOMPILE_LIMIT = 64  # graphs of one network
# the line of a card's example that names the repository
WHERE = re.compile(r'^path_or_id = ".*"', re.MULTILINE)
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
CARD_TEXT = """---
library_name: transformers
pipeline_tag: {task}
tags: [diffusion, flow-matching, latent-diffusion, {task}, tokcom, custom_code]
{more}---

# {title}

A TokCom model: it {does}. {parameters} parameters, {codec}
in the codec and {transformer} in the transformer; {vocab_size} tokens; {objective}.

```python
from diffusers import DiffusionPipeline

path_or_id = "."
pipe = DiffusionPipeline.from_pretrained(path_or_id, trust_remote_code=True)
{example}
```

`trust_remote_code=True` runs the `*_tokcom.py` files of this repository: read them, and pin
`revision=`.
"""

StepCallback = Callable[["TokComBasePipeline", int, torch.Tensor, torch.Tensor], torch.Tensor]


# ---- the Hub ----


@contextlib.contextmanager
def explain_hub_errors(repo_id: str) -> Iterator[None]:
    """Turn the Hub's refusals into a `ValueError` that says what to do; other errors pass."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        remedy = "run `hf auth login`, set HF_TOKEN, or pass `token`"
        raise ValueError(f"pushing to {repo_id!r} needs a token: {remedy}.") from error
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} is not a valid repository id: write it as 'user/name'. ({error})"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        remedy = {
            401: "the token is missing, expired or wrong: run `hf auth login` or pass `token`",
            403: "the token may not write there: make one with write access, or push to yours",
            404: "there is no such repository or namespace for this token",
        }.get(status)
        if remedy is None:
            raise
        raise ValueError(f"the Hub refused {repo_id!r} ({status}): {remedy}.") from error
    except (ConnectionError, HTTP_ERROR) as error:
        remedy = "check network and HF_ENDPOINT"
        if "xet" in str(error):  # the Hub answers, but a proxy or mirror lacks its chunk store
            remedy = "without the Hub's chunk store set HF_HUB_DISABLE_XET=1"
        reason = f"the Hub at {HF_ENDPOINT} cannot be reached ({error})"
        raise ValueError(f"{reason}; {remedy}.") from error


class CardFacts(NamedTuple):
    """What a pipeline says of itself in a model card."""

    task: str  # the Hub's name of it, such as "text-to-image"
    does: str  # continues "A TokCom model: it ..."
    example: str  # a line of code that calls `pipe`


def with_section(card: str, heading: str, body: str) -> str:
    """The card with the section `heading` replaced by `body`, or added at its end."""
    section = f"## {heading}\n\n{body.strip()}\n"
    # up to the next heading of this level or the end
    found = re.search(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    if found is None:
        return card.rstrip() + "\n\n" + section
    gap = "\n" if found.end() < len(card) else ""
    return card[: found.start()] + section + gap + card[found.end() :]


def copy_pictures(card: str, source: Path, target: Path) -> None:
    """Copy the pictures that a card shows by relative path, if they lie inside `source`, to the
    same places in `target`."""
    for name in PICTURE.findall(card):
        file = (source / name).resolve()
        # a card is text of others: `../` must not publish what lies elsewhere
        if file.is_file() and file.is_relative_to(source.resolve()):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target / name)


# ---- the base class ----


class TokComBasePipeline(CheckedFiles, DiffusionPipeline):
    """Loading, saving, publishing and sampling for the pipelines of all modalities.

    Args:
        model (`TokComModel`): of the pipeline's modality; `ValueError` names the right pipeline for
            another.
        scheduler (`TokComFlowMatchScheduler` or a stock flow scheduler).
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed for text; ids and latents work
            without.
    """

    modality: str  # of the models it runs; set by subclasses
    output_types: tuple[str, ...]
    model_cpu_offload_seq = "model"  # what `enable_model_cpu_offload` moves, in order
    _callback_tensor_inputs = ["latents"]  # what a callback of diffusers may ask for
    _optional_components = ["tokenizer"]
    # components that our own modules define, which are loaded from there whatever
    # `model_index.json` says: class -> the library that the index names, and the module
    _local_classes = {
        "TokComModel": ("transformers", "modeling_tokcom"),
        "TokComFlowMatchScheduler": ("diffusers", "scheduling_tokcom"),
    }

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name, value in list(vars(cls).items()):
            # what users call; properties and class methods are no functions here
            if inspect.isfunction(value) and (name == "__call__" or not name.startswith("_")):
                setattr(cls, name, explain_unknown_arguments(value))

    def __init__(
        self,
        model: PreTrainedModel,
        scheduler: SchedulerMixin,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        modality = model.config.codec_config.modality
        if modality != self.modality:
            raise ValueError(
                f"{type(self).__name__} runs models of modality {self.modality!r}, but this model "
                f"has modality {modality!r}: use {PIPELINE_NAMES[modality]}, or load_pipeline, "
                "which picks the class."
            )
        if tokenizer is not None:
            size = vocabulary_size(tokenizer)
            # the model's last id is that of the pad token, which the tokenizer may not have yet
            if size + 1 != model.config.text_vocab_size:
                raise ValueError(
                    f"the tokenizer has {size} tokens but the model was built for "
                    f"{model.config.text_vocab_size - 1}; load the tokenizer saved beside the "
                    "model."
                )
            tokenizer = with_pad_token(tokenizer)
        self.register_modules(model=model, scheduler=scheduler, tokenizer=tokenizer)

    # ---- loading and saving ----

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Resolve TokCom components of `model_index.json` to the classes this module imported."""
        resolved = {}
        for name, value in config_dict.items():
            is_component = isinstance(value, (list, tuple))
            if is_component and value[-1] in cls._local_classes:
                package = __name__.rpartition(".")[0]
                value = [f"{package}.{cls._local_classes[value[-1]][1]}", value[-1]]
            # an index of an earlier version names a `vae` for all modalities
            if is_component and value[0] is None and name not in cls._optional_components:
                continue
            resolved[name] = value
        return super().extract_init_dict(resolved, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file):
        # an imported class uses itself, never the copy of the code beside the checkpoint
        return {**super()._dict_from_json_file(json_file), "_class_name": cls.__name__}

    def to_json_string(self) -> str:
        """`model_index.json`: names the file and class of this pipeline, so that
        `DiffusionPipeline` finds them."""
        index = json.loads(super().to_json_string())
        # a list names a file of the repository, a text a class of diffusers
        index["_class_name"] = [type(self).__module__.split(".")[-1], type(self).__name__]
        for name, value in index.items():
            if isinstance(value, list) and value[-1] in self._local_classes:
                index[name] = [self._local_classes[value[-1]][0], value[-1]]
        index.pop("_name_or_path", None)  # a path of this machine is nobody's business
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def _card_facts(self) -> CardFacts:
        """What a model card says of this pipeline; every modality has its own."""
        raise NotImplementedError

    def model_card(
        self, title: str = "A TokCom model", sections: dict[str, str] | None = None, **metadata: Any
    ) -> str:
        """A model card for this pipeline.

        `sections` (heading -> Markdown) follow the example; `metadata` (license, language, ...)
        joins the header.
        """
        config = self.model.config
        facts = self._card_facts()
        codec = sum(p.numel() for p in self.model.codec.parameters())
        total = sum(p.numel() for p in self.model.parameters())
        predictions = {"tokens": "token probabilities", "latents": "latents"}
        block_size = config.transformer_config.block_size
        blocks = "all latents" if block_size is None else f"{block_size} latent(s)"
        objective = f"predicts {predictions[config.prediction_type]}, {blocks} at "
        objective += "once" if block_size is None else "a time"
        # JSON is YAML, whatever characters a value has
        more = [f"{key}: {json.dumps(value)}\n" for key, value in metadata.items() if value]
        text = CARD_TEXT.format(
            more="".join(more),
            title=title,
            parameters=f"{total:,}",
            codec=f"{codec:,}",
            transformer=f"{total - codec:,}",
            vocab_size=f"{max(0, config.text_vocab_size - 1):,}",
            objective=objective,
            **facts._asdict(),
        )
        for heading, body in (sections or {}).items():
            text += f"\n## {heading}\n\n{body.strip()}\n"
        return text

    def _save_components(self, directory: Path) -> None:
        """Save everything but the model and the code."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)
        self.scheduler.save_pretrained(directory / "scheduler")

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        max_shard_size: str | None = None,
        push_to_hub: bool = False,
        card: str | None = None,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
    ) -> None:
        """Write a flat Hub repository: weights, tokenizer, scheduler, `model_index.json`, the code,
        and a model card.

        The card is `card`; without it, and if the directory has none, one that says what the
        configuration tells. With `push_to_hub` it is also pushed to `repo_id`, by default named
        like the directory.
        """
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        # what was there stays if this fails
        with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as partial:
            options = {"max_shard_size": max_shard_size} if max_shard_size else {}
            self.model.save_pretrained(partial, **options)
            written = sorted(Path(partial).iterdir())
            # one file and several shards must not lie side by side: the one file would be loaded
            stale = {file.name for pattern in WEIGHTS for file in directory.glob(pattern)}
            stale -= {file.name for file in written}
            for file in written:
                file.replace(directory / file.name)  # atomic, as both are on one disk
            for name in stale:
                (directory / name).unlink()
        self._save_components(directory)
        self._save_language_model(directory)
        self.save_config(directory)
        custom_object_save(self, directory)  # the code
        # after all that they cover
        write_checksums(directory)
        if card is not None or not (directory / CARD).is_file():
            (directory / CARD).write_text(card or self.model_card(), encoding="utf-8")
        if push_to_hub:
            text = (directory / CARD).read_text(encoding="utf-8")
            name = repo_id or directory.resolve().name
            self.push_to_hub(
                name, private=private, token=token, max_shard_size=max_shard_size, card=text
            )

    def _save_language_model(self, directory: Path) -> None:
        """Let `AutoModelForCausalLM` find a model of texts that has exact probabilities of the next
        token."""
        config = self.model.config
        if not config.is_causal_lm:
            return
        file = directory / "config.json"
        code = Path(__file__).with_name("modeling_causal_tokcom.py")
        if not code.is_file():  # diffusers copied only what the pipeline itself needs
            return
        shutil.copy(code, directory)
        fields = json.loads(file.read_text(encoding="utf-8"))
        where = "modeling_causal_tokcom.TokComForCausalLM"
        fields.setdefault("auto_map", {})["AutoModelForCausalLM"] = where
        file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        eos = None if self.tokenizer is None else self.tokenizer.eos_token_id
        GenerationConfig(
            do_sample=True,
            temperature=config.sampling_temperature,
            top_p=config.sampling_top_p,
            top_k=0,  # off: all of the distribution
            eos_token_id=eos,
            pad_token_id=config.vocab_size - 1,
        ).save_pretrained(directory)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        max_shard_size: str | None = None,
        card: str | None = None,
        pictures: str | os.PathLike | None = None,
        revision: str | None = None,
    ) -> str:
        """Create the repository `user/name` if there is none and upload the pipeline as one commit;
        returns its address.

        `card` is the README, in whose example the repository's id replaces `path_or_id`; pictures
        that it shows are taken from the folder `pictures`. Raises `ValueError` when the Hub refuses
        name or token.
        """
        with explain_hub_errors(repo_id), tempfile.TemporaryDirectory() as folder:
            repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/"):
                create_branch(repo_id, branch=revision, token=token, exist_ok=True)
            text = card or self.model_card(repo_id.split("/")[-1])
            text = WHERE.sub(f'path_or_id = "{repo_id}"', text)
            self.save_pretrained(folder, max_shard_size, card=text)
            if pictures is not None:
                copy_pictures(text, Path(pictures), Path(folder))
            commit = upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                token=token,
                create_pr=create_pr,
                revision=revision,
                delete_patterns=WEIGHTS,  # shards of an earlier push
            )
            return str(commit)

    # ---- what diffusers' callbacks read ----

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    # ---- what the model reads ----

    def _tokenize(self, texts: Sequence[str], name: str) -> list[list[int]]:
        """Ids of each text; raises `ValueError` with the argument's `name` for an empty one, or
        without a tokenizer."""
        return tokenize_texts(self.tokenizer, texts, name)

    def _pad(self, rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of ids -> `input_ids (B, T)` and `attention_mask (B, T)`, T a multiple of K."""
        return pad_rows(self.model.config, rows, side, self._execution_device)

    def _caption_prefix(
        self, prompt: str | Sequence[str] | None, batch_size: int
    ) -> tuple[int, tuple[torch.Tensor, ...] | None]:
        """How many samples are asked for, `batch_size` of one caption or one for each of several,
        and what the transformer reads of the captions."""
        if prompt is None:
            return batch_size, None
        rows: list[list[int]] = []
        for caption in captions_of(prompt, batch_size):
            # an empty caption is hidden as a whole, like those that training drops
            rows.append([] if caption == "" else self._tokenize([caption], "prompt")[0])
        return len(rows), self.model.condition(*self._pad(rows, "right"))

    def _guidance(self, scale: Any, has_conditions: bool, wanted: str | None = None) -> Any:
        """The guidance scale that was asked for, or the model's own if there is anything to follow;
        raises `ValueError` with what is `wanted` for a scale of nothing."""
        if scale is None:
            return self.model.config.sampling_guidance_scale if has_conditions else 1.0
        if wanted and not has_conditions and scale != 1.0:
            raise ValueError(f"`guidance_scale` ({scale}) needs {wanted}; leave it at 1.")
        return scale

    def _to_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(B, N, C)` as they are, or those that integer codes `(B, N, R)` stand for;
        `ValueError` for others."""
        if not isinstance(latents, torch.Tensor):
            raise ValueError(
                "`latents` must be a tensor of latents or of integer codes, not a "
                f"{type(latents).__name__}."
            )
        latents = latents.to(self._execution_device)
        if not latents.is_floating_point():
            latents = self.model.from_codes(latents.long())  # files hold small integers
        channels = self.model.config.codec_config.latent_channels
        if latents.ndim != 3 or latents.shape[-1] != channels:
            raise ValueError(
                f"`latents` has shape {tuple(latents.shape)} but (B, N, {channels}) is needed."
            )
        if not bool(latents.isfinite().all()):
            raise ValueError("`latents` hold NaN or infinite numbers, which stand for nothing.")
        return latents

    # ---- checks of arguments ----

    def check_inputs(
        self,
        num_inference_steps: int | None = None,
        output_type: str | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        length: tuple[str, int] | None = None,
    ) -> None:
        """Raise `ValueError` for arguments that are out of range; `length` is one with its name."""
        counts = [("num_inference_steps", num_inference_steps), *([length] if length else [])]
        for name, value in counts:
            if value is not None and (not hasattr(value, "__index__") or value < 1):
                raise ValueError(f"`{name}` ({value}) must be a whole number, at least 1.")
        if output_type is not None and output_type not in self.output_types:
            raise ValueError(
                f"`output_type` ({output_type!r}) must be one of {self.output_types} for this "
                "model."
            )
        unknown = set(callback_on_step_end_tensor_inputs or []) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback inputs {sorted(unknown)} are unknown; known are "
                f"{self._callback_tensor_inputs}."
            )

    # ---- the sampler ----

    def compile(self, **options: Any) -> None:
        """Compile the network in place; `options` are those of `torch.compile`.

        The first call then takes a minute or more. One graph serves all blocks and all lengths,
        and every kind of call has one: batches of one text and of several, with guidance, in gaps.
        """
        # beyond torch's 8 a network is no longer compiled, and nothing says so
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
        self.model.transformer.compile(**options)

    def prepare_latents(
        self,
        batch_size: int,
        num_latents: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Initial noise `(B, n, C)` in float32 with the model's `noise_std`, or the given
        `latents`, checked.

        The noise of a latent depends on the generator, its row and its place alone, not on how many
        rows or latents there are.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` ({batch_size}) must be at least 1.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` has {len(generator)} entries but there are {batch_size} samples; "
                "give one each."
            )
        channels = self.model.config.codec_config.latent_channels
        if latents is None:
            # drawn on the CPU, so that a seed means the same on every device
            noise = row_noise(spawn_generators(generator, batch_size), num_latents, channels)
            return noise.to(self._execution_device) * self.model.config.noise_std
        shape = (batch_size, num_latents, channels)
        if tuple(latents.shape) != shape:
            raise ValueError(f"`latents` has shape {tuple(latents.shape)} but {shape} is needed.")
        return latents.to(device=self._execution_device, dtype=torch.float32)

    def _sampler(self, sampling: TokComSampling | None = None) -> TokComBlockSampler:
        return TokComBlockSampler(self.model, self.scheduler, sampling or TokComSampling())

    def _step_callback(
        self,
        callback: Callable[[Any, int, int, dict], dict] | None,
        tensor_inputs: list[str] | None,
    ) -> StepCallback | None:
        """The user's `callback_on_step_end` as `sample_blocks` calls it: x in, x out."""
        if callback is None:
            return None
        if not callable(callback):
            raise ValueError(f"`callback_on_step_end` ({callback!r}) must be a function.")
        names = ["latents"] if tensor_inputs is None else tensor_inputs

        def on_step_end(pipe, step: int, timestep: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            tensors = {"latents": x} if "latents" in names else {}
            before = x.clone()
            found = callback(pipe, step, timestep, tensors) or {}
            changed = found.get("latents", x)
            # the sampler tells by identity that x is another one, and it may be written into
            return x.clone() if changed is x and not torch.equal(x, before) else changed

        return on_step_end

    def sample_latents(
        self,
        task: TokComTask,
        sampling: TokComSampling | None = None,
        decode: bool = True,
        on_step_end: StepCallback | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All blocks of `sample_blocks` joined: clean latents `(B, n, C)` and ids `(B, n * K)`."""
        return join_blocks(self.sample_blocks(task, sampling, decode, on_step_end), task.noise)

    def sample_blocks(
        self,
        task: TokComTask,
        sampling: TokComSampling | None = None,
        decode: bool = True,
        on_step_end: StepCallback | None = None,
    ) -> Blocks:
        """Run the sampler with a progress bar and yield blocks of clean latents `(B, Q, C)` and ids
        `(B, Q * K)`.

        Without `decode` the ids may be None. `on_step_end(pipe, step, timestep, x)` returns x; it
        may set `pipe._interrupt` to stop.
        """
        sampler = self._sampler(sampling)
        self.scheduler = sampler.scheduler  # whose grid callbacks read
        self._guidance_scale = sampler.sampling.guidance_scale
        self._interrupt = False
        block_size = self.model.config.transformer_config.block_size
        num_blocks = len(split_blocks(task.noise.shape[1], block_size, task.edges))
        bar = None

        def after_step(block: int, step: int, timestep: torch.Tensor, x: torch.Tensor):
            nonlocal bar
            # known only now: some schedulers add steps of their own
            steps = len(sampler.planner.timesteps)
            self._num_timesteps = steps * num_blocks
            if bar is None:
                bar = self.progress_bar(total=self._num_timesteps)
            bar.update()
            if on_step_end is not None:
                x = on_step_end(self, block * steps + step, timestep, x)  # steps of all blocks
            sampler.interrupt = self._interrupt  # a callback sets the pipeline's
            return x

        try:
            for latents, ids in sampler.blocks(task, after_step):
                if ids is None and decode:
                    ids = self.model.to_ids(latents)
                yield latents, ids
        finally:  # also if the caller stops reading, or an error passes
            if bar is not None:
                bar.close()


__all__ = [
    "PIPELINE_NAMES",
    "CardFacts",
    "TokComBasePipeline",
    "copy_pictures",
    "explain_hub_errors",
    "with_section",
]
