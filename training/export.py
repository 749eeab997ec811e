"""What a stage leaves: latent statistics of its codec, and the finished model as a Hub repository
that is whole or not there."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tokcom.integrity_tokcom import CHECKSUMS, check_checksums
from tokcom.modeling_tokcom import TokComModel
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler
from tokcom.training.checkpoints import CheckpointError, first_line, flush, flush_all
from tokcom.training.pipelines import build_pipeline


def export_repository(
    model: TokComModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: Path,
    scheduler: TokComFlowMatchScheduler | None = None,
    autoencoder: torch.nn.Module | None = None,
) -> None:
    """Save a model as a Hub repository: with its tokenizer, an external autoencoder, the code, and
    a scheduler, by default the one that its training implies.

    Raises `CheckpointError` if it cannot be written; then what `directory` held before is still
    there.
    """
    pipe = build_pipeline(model, tokenizer, scheduler, autoencoder)
    with _replacement(directory) as partial:
        pipe.save_pretrained(partial)


def copy_repository(source: Path, directory: Path) -> None:
    """Copy a model that `export_repository` has saved; raises as that does."""
    with _replacement(directory) as partial:
        shutil.copytree(source, partial)


@contextmanager
def _replacement(directory: Path) -> Iterator[Path]:
    """A place for what becomes `directory` once it is on the disk."""
    partial = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        # before the rename: after a power cut a name without its content would look finished
        flush_all(partial)
    except Exception as error:  # safetensors and the system name a full disk in ways of their own
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{directory} could not be written ({first_line(error)}); what was there is as it was. "
            "Free some space and run the same command again."
        ) from error
    replace_folder(partial, directory)


def replace_folder(new: Path, target: Path) -> None:
    """Give the folder `new` the name `target`; what had that name is set aside until the new one is
    in its place.

    A process that is killed in between leaves the old folder as `target.old`, and `recover_folder`
    puts it back.
    """
    old = target.with_name(target.name + ".old")
    recover_folder(target)
    # a folder cannot take the name of one that is not empty, so this takes two renames
    if target.exists():
        target.rename(old)
    new.rename(target)
    # the new name is on the disk before the old content is removed
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def check_folder(folder: Path) -> None:
    """Raise `CheckpointError` if an exported model is not as it was written; exports of version 0.2
    have no checksums."""
    if not (folder / CHECKSUMS).is_file():
        return
    try:
        check_checksums(folder)
    except ValueError as error:
        problem = str(error).partition(";")[0]
        raise CheckpointError(
            f"{problem}; remove {folder} and run the same command again: it is made anew from the "
            "newest checkpoint."
        ) from error


def recover_folder(target: Path) -> None:
    """Put back a folder that `replace_folder` had set aside when it was killed, or finish to remove
    it."""
    old = target.with_name(target.name + ".old")
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def measure_latent_statistics(model: TokComModel, tokens: np.ndarray, rows: int = 65536) -> None:
    """Set the codec's per-channel mean and standard deviation from up to `rows` random chunks
    `(rows, K)`."""
    # without the dropout and the noise of training, which would widen the latents
    codec = model.codec.eval()
    size = codec.config.chunk_size
    # The same chunks whatever the seed of the run. Chunks may begin anywhere, as in training.
    starts = np.random.default_rng(0).integers(
        0, max(1, len(tokens) - size + 1), size=min(rows, len(tokens))
    )
    chunks = torch.from_numpy(np.stack([tokens[s : s + size] for s in starts]).astype(np.int64))
    # with mean 0 and deviation 1 `encode` returns raw latents, of which the statistics are wanted
    codec.set_latent_statistics(
        torch.zeros_like(codec.latent_mean), torch.ones_like(codec.latent_std)
    )
    device = codec.latent_mean.device
    # one latent a row, (rows, C)
    latents = torch.cat(
        [codec.encode(part.to(device)).latents[:, 0] for part in chunks.split(4096)]
    ).float()
    codec.set_latent_statistics(latents.mean(0), latents.std(0))
