"""Kill a run, fill its disk or change its data at many points, and see how the same command goes
on.

    python tests/harness/faults.py kill                              # this checkout, 27 points
    python tests/harness/faults.py disk --points 17
    python tests/harness/faults.py data
    python tests/harness/faults.py kill --package_parent /elsewhere  # /elsewhere/tokcom

A point is the n-th time that a run touches the disk: a file is written, flushed, renamed, copied or
removed. `kill` ends the process there, as SIGKILL does, before the n-th operation. `disk` lets that
operation, and all later ones that write, fail as a full disk does. Points are spread evenly over a
run of both stages. Then the same command runs again with nothing in its way, and its weights must
be those of a run that nobody disturbed, to the last bit.

Every run is a fork of one process that has imported everything, so a point takes seconds.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve()
STORIES = HERE.parents[2] / "sample_data" / "stories_validation.jsonl"
POINTS = {"kill": 27, "disk": 17, "data": 4}
SETTINGS = [
    *("report_to=none", "num_samples=0", "tokenizer_vocab_size=320", "mixed_precision=no"),
    *("model.transformer_config.num_hidden_layers=1", "data.validation=null"),
    *(f"{stage}.max_steps=6" for stage in ("codec", "flow")),
    *(f"{stage}.checkpoint_steps=3" for stage in ("codec", "flow")),
    *(f"{stage}.eval_steps=3" for stage in ("codec", "flow")),
    *(f"{stage}.eval_batches=1" for stage in ("codec", "flow")),
    *(f"{stage}.sequence_length=32" for stage in ("codec", "flow")),
    *(f"{stage}.batch_size=4" for stage in ("codec", "flow")),
]
WRITES = ("fsync", "save", "save_file", "write_text", "write_bytes", "copy2", "copy", "mkdir")


class Disk:
    """Counts what touches the disk, and disturbs from the n-th time on."""

    def __init__(self, how: str, point: int | None):
        self.how = how
        self.point = point
        self.count = 0

    def touch(self, name: str) -> None:
        self.count += 1
        if self.point is None or self.count < self.point:
            return
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if name in WRITES:
            raise OSError(28, "No space left on device", name)

    def watch(self) -> None:
        """Patch the ways in which training writes; only ever in a fork."""
        import shutil

        import safetensors.torch
        import torch
        import transformers.modeling_utils

        places = [(os, "fsync"), (torch, "save"), (safetensors.torch, "save_file")]
        places += [(transformers.modeling_utils, "safe_save_file")]
        places += [(Path, name) for name in ("rename", "replace", "write_text", "write_bytes")]
        places += [(Path, "mkdir"), (Path, "unlink")]
        places += [(shutil, name) for name in ("copy2", "copy", "rmtree")]
        for owner, name in places:
            if hasattr(owner, name):
                setattr(owner, name, self._watched(getattr(owner, name), name))

    def _watched(self, function: Callable, name: str) -> Callable:
        known = "save_file" if name == "safe_save_file" else name

        def call(*args, **kwargs):
            self.touch(known)
            return function(*args, **kwargs)

        return call


def train(folder: Path, disk: Disk, extra: tuple[str, ...] = ()) -> tuple[int, str, int]:
    """Run a fork of this process; returns its status, the last line that it said, and what it
    touched."""
    log = folder.with_suffix(".log")
    count = folder.with_suffix(".count")
    child = os.fork()
    if child == 0:
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = 1
        try:
            from tokcom.cli.errors import report_errors
            from tokcom.train_accelerate import run
            from tokcom.training.config import load_train_config

            text = folder.with_suffix(".jsonl")
            source = text if text.exists() else STORIES
            options = [*SETTINGS, f"data.train={source}", f"output_dir={folder}", *extra]
            with report_errors():
                config = load_train_config("debug", options)
                disk.watch()
                run(config)
            status = 0
        except SystemExit as ended:
            print(ended.code if isinstance(ended.code, str) else f"status {ended.code}", flush=True)
        except BaseException as error:
            print(f"raw {type(error).__name__}: {error}", flush=True)
            status = 2
        finally:
            descriptor = os.open(count, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.write(descriptor, str(disk.count).encode())
            os._exit(status)
    _, status = os.waitpid(child, 0)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("error: ", "raw "))]
    touched = int(count.read_text()) if count.is_file() else 0
    return os.waitstatus_to_exitcode(status), (told or lines or [""])[-1], touched


def weights(folder: Path) -> bytes | None:
    file = folder / "model.safetensors"
    return file.read_bytes() if file.is_file() else None


def disturb(how: str, point: int, whole: bytes, work: Path) -> str:
    """What comes of a run that is disturbed at a point, in one word and a reason."""
    folder = work / f"{how}-{point}"
    status, said, _ = train(folder, Disk(how, point))
    if status == 0:  # what fails here is tidying up, without which the run is done
        return "identical" if weights(folder) == whole else "other weights"
    if how == "disk" and (status != 1 or not said.startswith("error: ")):
        return f"raw: {said[:150]}"
    if how == "disk" and "space" not in said:
        return f"unclear: {said[:150]}"
    status, said, _ = train(folder, Disk(how, None))
    if status != 0:
        return f"does not go on: {said[:150]}"
    return "identical" if weights(folder) == whole else "other weights"


def change(text: Path, how: str) -> None:
    """Change the data of a run in one of four ways."""
    lines = text.read_text(encoding="utf-8").splitlines()
    if how == "a record more":
        lines.append(lines[0])
    elif how == "a record less":
        lines.pop()
    elif how == "another order":
        lines.reverse()
    else:
        record = json.loads(lines[0])
        record["text"] = "X" + record["text"][1:]
        lines[0] = json.dumps(record)
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")


def changed_data(work: Path) -> list[str]:
    found = []
    for number, how in enumerate(("a record more", "a record less", "another order", "one letter")):
        folder = work / f"data-{number}"
        text = folder.with_suffix(".jsonl")
        text.write_bytes(STORIES.read_bytes())
        status, said, _ = train(folder, Disk("none", None), ("codec.max_steps=3", "stage=codec"))
        assert status == 0, said
        change(text, how)
        status, said, _ = train(folder, Disk("none", None), ("stage=codec",))
        refused = status == 1 and "changed since" in said
        found.append("refused" if refused else "silent" if status == 0 else f"raw: {said[:150]}")
        print(f"{how}: {found[-1]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=sorted(POINTS))
    parser.add_argument("--package_parent", help="folder that holds the checkout `tokcom`")
    parser.add_argument("--points", type=int)
    args = parser.parse_args()
    parent = Path(args.package_parent or HERE.parents[3]).resolve()
    sys.path.insert(0, str(parent))
    # all that a fork needs, imported once
    import tokcom.training.card
    import tokcom.training.distill
    import tokcom.training.stage  # noqa: F401

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if args.what == "data":
            found = changed_data(work)
        else:
            status, said, total = train(work / "whole", Disk(args.what, None))
            assert status == 0, said
            whole = weights(work / "whole")
            points = args.points or POINTS[args.what]
            found = []
            for index in range(points):
                point = 1 + index * (total - 1) // max(1, points - 1)
                found.append(disturb(args.what, point, whole, work))
                print(f"{args.what} {point} of {total}: {found[-1]}", flush=True)
    words = Counter(entry.split(":")[0] for entry in found)
    print(f"{args.what}: " + ", ".join(f"{many} {word}" for word, many in sorted(words.items())))


if __name__ == "__main__":
    main()
