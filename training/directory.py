"""The directory of a run: whose it is, what was started there, what is finished, and how it becomes
a repository.

    output_dir/                    the finished model, a Hub repository
    output_dir/run/                everything about training
        lock                       the process that is training here now
        train_config.json          the settings that the run was started with
        data.json                  digests of the data it is trained on
        README.md                  the model card as it was written
        tokenizer/                 the tokenizer that all stages share
        STAGE/checkpoint-N, best, final, logs, summary.json

Every file that another process may read appears under its name only when it is complete.
"""

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tokcom.training.config import STAGES, TrainConfig
from tokcom.training.export import check_folder, recover_folder
from tokcom.training.presets import read_preset

WORK = "run"
# settings with which the weights would be those of another run; all others may change
SAME_RUN = (
    "preset",
    "model",
    "tokenizer",
    "tokenizer_vocab_size",
    "init_from",
    "codec_from",
    "autoencoder",
    "seed",
)
# settings of `data` that do not say what is read
HOW_TO_READ = ("allow_changed", "num_proc", "max_skipped")
# of a distillation that goes on
MAY_CHANGE = (
    "max_steps",
    "checkpoint_steps",
    "checkpoints_total_limit",
)
# by a finished run
OVERWRITTEN = (
    "config.json",
    "model.safetensors",
    "model_index.json",
    "README.md",
)


def write_atomically(file: Path, text: str) -> None:
    """Write a text file that is either complete or as it was before."""
    partial = file.with_name(file.name + ".tmp")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        # `flush` hands the text to the system, `fsync` waits until it is on the disk
        os.fsync(stream.fileno())
    # a rename within a file system: readers see the old text or the new one, never a part
    partial.replace(file)


def is_running(pid: int) -> bool:
    """Whether a process of this machine other than this one has the number `pid`."""
    if pid == os.getpid():
        return False
    try:
        # signal 0 is not sent; the system only says whether it could be
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists and belongs to someone else
        return True
    return True


class RunLock:
    """A file that says which process trains in a directory; a second run there is refused while
    that process lives.

    A lock whose process has ended on this machine is stale and replaced. Whether a process of
    another machine lives cannot be known, so its lock is refused until someone removes the file.
    Raises `ValueError`.
    """

    def __init__(self, file: Path):
        self.file = file
        self.owner = {"pid": os.getpid(), "host": socket.gethostname()}

    def acquire(self) -> None:
        try:
            # O_EXCL creates the file or fails, in one step: of two processes only one gets the lock
            descriptor = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            self._remove_if_stale()
            # once more, and no third time: if it is there again, another process was faster
            descriptor = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump(self.owner, stream)

    def release(self) -> None:
        # someone may have removed the lock by hand, and another run taken it
        if self._read() == self.owner:
            self.file.unlink()

    def _read(self) -> dict[str, Any] | None:
        try:
            owner = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # gone, or its writer was killed while it wrote
            return None
        return owner if isinstance(owner, dict) and {"pid", "host"} <= owner.keys() else None

    def _remove_if_stale(self) -> None:
        owner = self._read()
        if owner is not None:
            where = f"process {owner['pid']} on {owner['host']}"
            # process numbers mean nothing on another machine, which may share the disk
            if owner["host"] != self.owner["host"]:
                raise ValueError(
                    f"{self.file} says that {where} is training here; if that run has ended, "
                    "remove the file and try again."
                )
            if is_running(owner["pid"]):
                raise ValueError(
                    f"{where} is training in {self.file.parent.parent}; wait for it, stop it, or "
                    "choose another output_dir."
                )
        # another process may have removed it at the same moment
        self.file.unlink(missing_ok=True)


class RunDirectory:
    """`output_dir` of a run. As a context it holds the lock, if this is the process that writes.

    Raises `ValueError` if the directory cannot be written, holds a model that no run made there,
    belongs to another run, or is in use.
    """

    def __init__(self, config: TrainConfig, is_main: bool):
        self.config = config
        self.is_main = is_main
        self.root = Path(config.output_dir)
        self.work = self.root / WORK
        self.settings = self.work / "train_config.json"
        self.lock = RunLock(self.work / "lock")

    def __enter__(self) -> "RunDirectory":
        if self.is_main:
            self._check_writable()
            self.lock.acquire()
        try:
            self.check_same_run()
            self._tidy()
        except BaseException:
            # Python calls `__exit__` only if `__enter__` has returned, and the lock would stay
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self.is_main:
            self.lock.release()

    def _check_writable(self) -> None:
        if self.root.exists() and not self.settings.is_file():
            present = [name for name in OVERWRITTEN if (self.root / name).exists()]
            if self.root.is_dir() and present:
                raise ValueError(
                    f"{self.root} already holds {present[0]}, which this run did not write and "
                    "would replace; choose another output_dir."
                )
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            # permissions do not tell: a disk may be full, or a share mounted read-only
            probe = self.work / "lock.probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"output_dir {self.root} cannot be written ({error.strerror}); choose another one."
            ) from error

    def _tidy(self) -> None:
        """Put back the folders that a killed process was replacing, and forget the tokenizer of a
        run that was refused."""
        if not self.is_main:
            return
        for stage in STAGES:
            recover_folder(self.work / stage / "best")
            recover_folder(self.final(stage))
        if not self.settings.is_file():
            shutil.rmtree(self.work / "tokenizer", ignore_errors=True)

    def check_same_run(self) -> None:
        """Raise `ValueError` if the directory was started with other settings; other weights or
        data cannot be continued."""
        if (self.work / "distill" / "distill_config.json").is_file():
            raise ValueError(
                f"{self.root} is a distillation of version 0.2, whose checkpoints this version "
                "cannot read; choose another output_dir."
            )
        if not self.settings.is_file():
            return
        started = json.loads(self.settings.read_text(encoding="utf-8"))
        # as the file holds it, where tuples have become lists
        now = json.loads(json.dumps(self.config, default=vars))
        # settings that are younger than the run are at their defaults, and not compared
        self._compare(started, {key: now[key] for key in SAME_RUN if key in started})
        if "preset_model" in started:
            preset = read_preset(self.config.preset).get("model", {})
            self._compare(started, {"preset_model": json.loads(json.dumps(preset))})
        if not self.config.data.allow_changed:
            self._compare_data(started.get("data", {}), now["data"])
        if self.config.stage == "distill":
            options = {key: value for key, value in now["distill"].items() if key not in MAY_CHANGE}
            self._compare(started.get("distill", {}), options, "distill.")

    def _compare_data(self, started: dict[str, Any], now: dict[str, Any]) -> None:
        if started.get("caption_column") == "caption":  # what null was once called
            now["caption_column"] = now["caption_column"] or "caption"
        known = {
            name: value
            for name, value in now.items()
            if name in started and name not in HOW_TO_READ
        }
        self._compare(started, known, "data.", " or set data.allow_changed=true")

    def _compare(
        self, started: dict[str, Any], now: dict[str, Any], prefix: str = "", remedy: str = ""
    ) -> None:
        for key, value in now.items():
            if started.get(key) != value:
                raise ValueError(
                    f"{self.root} was started with {prefix}{key}={started.get(key)!r}, now it is "
                    f"{value!r}; choose another output_dir{remedy}."
                )

    def keep_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Save the tokenizer of a new run, which other processes and later stages read."""
        if not self.is_main or tokenizer is None or (self.work / "tokenizer").is_dir():
            return
        partial = self.work / "tokenizer.tmp"
        shutil.rmtree(partial, ignore_errors=True)
        tokenizer.save_pretrained(partial)
        # other processes wait for nothing but this name, so the folder must be complete
        partial.rename(self.work / "tokenizer")

    def begin(self) -> None:
        """Write down the settings of a new run, once nothing in them was refused."""
        if self.is_main and not self.settings.is_file():
            # a preset may be edited, or be another one in the next version
            model = {"preset_model": read_preset(self.config.preset).get("model", {})}
            write_atomically(
                self.settings, json.dumps(vars(self.config) | model, default=vars, indent=2) + "\n"
            )

    def final(self, stage: str) -> Path:
        """Where the finished model of a stage is."""
        return self.work / stage / "final"

    def is_finished(self, stage: str) -> bool:
        """Whether a stage has ended and is not asked for more steps than it made; raises
        `ValueError` if it cannot make more."""
        work = self.work / stage
        summary = work / "summary.json"
        if not (self.final(stage) / "config.json").is_file():
            return False
        has_checkpoint = any(work.glob("checkpoint-*"))
        if not summary.is_file():  # it is written last: the run was killed before
            return not has_checkpoint
        made = json.loads(summary.read_text(encoding="utf-8"))["steps"]
        wanted = getattr(self.config, stage).max_steps
        if made >= wanted:
            return True
        if not has_checkpoint:
            raise ValueError(
                f"{work} is finished after {made} steps and has no checkpoint to go on from to "
                f"{stage}.max_steps ({wanted}); choose another output_dir and start there with "
                "init_from."
            )
        flow = self.work / "flow"
        if stage == "codec" and (any(flow.glob("checkpoint-*")) or self.final("flow").is_dir()):
            raise ValueError(
                f"codec.max_steps ({wanted}) asks for more steps of a codec that the transformer "
                f"in {flow} was trained for; keep codec.max_steps={made}, or choose another "
                "output_dir."
            )
        return False

    def latest(self, stage: str) -> str:
        """The last finished stage, which may have followed this one in an earlier call."""
        later = STAGES[STAGES.index(stage) + 1 :]
        finished = [s for s in later if (self.final(s) / "config.json").is_file()]
        return [stage, *finished][-1]

    def write_card(self, card: str) -> None:
        """Write `README.md`, unless somebody has edited the one that an earlier call wrote."""
        target = self.root / "README.md"
        copy = self.work / "README.md"
        # runs without a copy are older than it
        if target.is_file() and copy.is_file() and target.read_bytes() != copy.read_bytes():
            print(f"{target} has been edited and stays as it is; the new card is {copy}")
        else:
            write_atomically(target, card)
        write_atomically(copy, card)

    def publish(self, stage: str) -> None:
        """Copy the finished model of a stage to `output_dir`, one whole file at a time."""
        source = self.final(stage)
        check_folder(source)
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            if file == source / "README.md":  # `write_card` says more
                continue
            target = self.root / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            # below `output_dir`, hence on its file system, within which a rename is atomic
            partial = self.work / "publish.tmp"
            shutil.copy2(file, partial)
            partial.replace(target)
