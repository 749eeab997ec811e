"""How a pipeline lies on disk and on the Hub: one flat repository, with a model card, pushed whole.

Notable choices: weights, tokenizer, card and code at the root, the scheduler in `scheduler/`; what is pushed is written anew
into an empty folder, so that checkpoints, logs and caches of a training run cannot slip in; the Hub's refusals are explained.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import create_branch, create_repo, upload_folder
from huggingface_hub.constants import ENDPOINT as HF_ENDPOINT
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from transformers.dynamic_module_utils import custom_object_save

CARD = "README.md"
HTTP_ERROR = HfHubHTTPError.__bases__[0]  # of the client that huggingface_hub uses, whichever it is
WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]  # of earlier pushes, which these replace
WHERE = re.compile(r'^path_or_id = ".*"', re.MULTILINE)  # the line of a card's example that names the repository
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
METADATA = """---
library_name: transformers
pipeline_tag: {task}
tags: [diffusion, flow-matching, latent-diffusion, {task}, tokcom, custom_code]
{more}---
"""
TEXT = """
# {title}

A TokCom model: it {does}. {parameters} parameters, {codec}
in the codec and {transformer} in the transformer; {vocab_size} tokens; {objective}.

```python
from diffusers import DiffusionPipeline

path_or_id = "."
pipe = DiffusionPipeline.from_pretrained(path_or_id, trust_remote_code=True)
{call}
```

`trust_remote_code=True` runs the `*_tokcom.py` files of this repository: read them and pin `revision=`.
"""


@contextlib.contextmanager
def explain_hub_errors(repo_id: str) -> Iterator[None]:
    """Turn the Hub's refusals into a `ValueError` that says what to do; other errors pass."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ValueError(
            f"pushing to {repo_id!r} needs a token: run `hf auth login`, set HF_TOKEN, or pass `token`."
        ) from error
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository id: write it as 'user/name'. ({error})") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        remedy = {
            401: "the token is missing, expired or wrong: run `hf auth login`, set HF_TOKEN, or pass `token`",
            403: "the token may not write there: make one with write access, or push to your own namespace",
            404: "there is no such repository or namespace for this token",
        }.get(status)
        if remedy is None:
            raise
        raise ValueError(f"the Hub refused {repo_id!r} ({status}): {remedy}.") from error
    except (ConnectionError, HTTP_ERROR) as error:
        raise ValueError(
            f"the Hub at {HF_ENDPOINT} cannot be reached ({error}); check network and HF_ENDPOINT."
        ) from error


def model_card(
    config, parameters: dict[str, int], title: str = "A TokCom model", sections: dict | None = None, **metadata
) -> str:
    """The card of a model with this `TokComConfig` and these `parameters` of codec and transformer.

    `sections` (heading -> Markdown) follow the example; `metadata` (license, language, datasets, ...) joins the header.
    """
    block_size = config.transformer_config.block_size
    objective = {"tokens": "predicts token probabilities", "latents": "predicts latents"}[config.prediction_type]
    objective += ", all latents at once" if block_size is None else f", {block_size} latent(s) at a time"
    more = "".join(f"{key}: {json.dumps(value)}\n" for key, value in metadata.items() if value)
    codec = config.codec_config
    task, call = "text-generation", 'print(pipe("Once upon a time", gen_length=64).texts[0])'
    does = f"writes text by denoising vectors that stand for {codec.chunk_size} tokens each"
    if codec.modality == "image":
        task, call = "text-to-image", 'pipe("a caption").images[0].save("picture.png")'
        if not config.condition_vocab_size:
            task, call = "unconditional-image-generation", 'pipe.generate_images().images[0].save("picture.png")'
        size = f"{codec.image_size}x{codec.image_size}"
        does = f"makes pictures of {size} pixels by denoising {codec.num_tokens} ordered tokens"
    elif codec.modality == "video":
        task, videos = (
            ("text-to-video", 'pipe("a caption")') if config.condition_vocab_size else ("image-to-video", "")
        )
        call = f"first, *others = {videos or 'pipe.generate_videos()'}.videos[0]\n"
        call += 'first.save("clip.gif", save_all=True, append_images=others, duration=125, loop=0)'
        size = "x".join(map(str, [*codec.image_size, codec.clip_length]))
        does = f"makes clips of {size} pixels and frames by denoising {codec.num_tokens} patches of space and time"
    elif codec.modality == "several":
        kinds = {name: stream.kind for name, stream in codec.stream_configs().items()}
        first, *others = sorted(kinds, key=lambda name: kinds[name] != "text")
        given = f'{first}="a word", ' if kinds[first] == "text" and others else ""
        task, call = "any-to-any", f"print(pipe({given}generate=[{(others or [first])[0]!r}]).streams)"
        does = f"makes any of the streams {', '.join(kinds)} for any others by denoising {codec.num_tokens} latents"
    text = METADATA.format(more=more, task=task) + TEXT.format(
        title=title,
        does=does,
        call=call,
        parameters=f"{sum(parameters.values()):,}",
        **{name: f"{count:,}" for name, count in parameters.items()},
        vocab_size=f"{max(0, config.text_vocab_size - 1):,}",
        objective=objective,
    )
    return text + "".join(f"\n## {heading}\n\n{body.strip()}\n" for heading, body in (sections or {}).items())


def with_section(card: str, heading: str, body: str) -> str:
    """The card with the section `heading` replaced by `body`, or added at its end."""
    section = f"## {heading}\n\n{body.strip()}\n"
    found = re.search(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    if found is None:
        return card.rstrip() + "\n\n" + section
    return card[: found.start()] + section + ("\n" if found.end() < len(card) else "") + card[found.end() :]


class TokComHubMixin:
    """What `TokComPipeline` adds to DiffusionPipeline's loading and saving."""

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """Resolve TokCom components of `model_index.json` to the classes this module imported."""
        resolved = {}
        for name, value in config_dict.items():
            if isinstance(value, (list, tuple)) and value[-1] in cls._local_classes:
                value = [cls._local_classes[value[-1]][1].__module__, value[-1]]
            resolved[name] = value
        return super().extract_init_dict(resolved, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file):
        # a directly imported TokComPipeline uses itself, never the copy of the code beside the checkpoint
        return {**super()._dict_from_json_file(json_file), "_class_name": cls.__name__}

    def to_json_string(self) -> str:
        index = json.loads(super().to_json_string())
        index["_class_name"] = [type(self).__module__.split(".")[-1], type(self).__name__]
        for name, value in index.items():
            if isinstance(value, list) and value[-1] in self._local_classes:
                index[name] = [self._local_classes[value[-1]][0], value[-1]]
        index.pop("_name_or_path", None)
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def model_card(self, title: str = "A TokCom model", sections: dict | None = None, **metadata) -> str:
        """A card for this pipeline; see the function of that name."""
        model = self.model
        codec = sum(p.numel() for p in model.codec.parameters())
        sizes = {"codec": codec, "transformer": sum(p.numel() for p in model.parameters()) - codec}
        return model_card(model.config, sizes, title, sections, **metadata)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        max_shard_size: str | None = None,
        push_to_hub: bool = False,
        card: str | None = None,
        **kwargs,
    ) -> None:
        """Write a flat Hub repository: weights, tokenizer, scheduler, `model_index.json`, the code, and a model card:
        `card`, or if the directory has none, one that says what the configuration tells."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        # what was there stays if this fails
        with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as partial:
            self.model.save_pretrained(partial, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
            written = sorted(Path(partial).iterdir())
            # one file and several shards must not lie side by side: the one file would be loaded
            stale = {file.name for pattern in WEIGHTS for file in directory.glob(pattern)} - {f.name for f in written}
            for file in written:
                file.replace(directory / file.name)
            for name in stale:
                (directory / name).unlink()
        for processor in (self.tokenizer, self.image_processor):
            if processor is not None:
                processor.save_pretrained(directory)
        self.scheduler.save_pretrained(directory / "scheduler")
        if self.vae is not None:
            self.vae.save_pretrained(directory / "vae")
        self.save_config(directory)
        custom_object_save(self, directory)
        if card is not None or not (directory / CARD).is_file():
            (directory / CARD).write_text(card or self.model_card())
        if push_to_hub:
            name = kwargs.pop("repo_id", directory.resolve().name)
            self.push_to_hub(name, max_shard_size=max_shard_size, card=(directory / CARD).read_text(), **kwargs)

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
        """Create the repository `user/name` if there is none and upload the pipeline as one commit; returns its address.

        `card` is the README, in whose example the repository's id replaces `path_or_id`; pictures that it shows are taken
        from the folder `pictures`. Raises `ValueError` when the Hub refuses name or token.
        """
        with explain_hub_errors(repo_id), tempfile.TemporaryDirectory() as folder:
            repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/"):
                create_branch(repo_id, branch=revision, token=token, exist_ok=True)
            text = WHERE.sub(f'path_or_id = "{repo_id}"', card or self.model_card(repo_id.split("/")[-1]))
            self.save_pretrained(folder, max_shard_size, card=text)
            if pictures is not None:
                copy_pictures(text, Path(pictures), Path(folder))
            message = commit_message or f"Upload {type(self).__name__}"
            options = {"token": token, "create_pr": create_pr, "revision": revision, "delete_patterns": WEIGHTS}
            return str(upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, **options))


def copy_pictures(card: str, source: Path, target: Path) -> None:
    """Copy the pictures that a card shows by relative path, and which lie inside `source`, to the same places in `target`."""
    for name in PICTURE.findall(card):
        file = (source / name).resolve()
        if file.is_file() and file.is_relative_to(source.resolve()):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target / name)


__all__ = ["TokComHubMixin", "copy_pictures", "explain_hub_errors", "model_card", "with_section"]
