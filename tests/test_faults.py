"""Training survives faults: of checkpoints, processes, directories and data."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, same_weights
from test_training import QUICK, launch, quick

from tokcom.modeling_tokcom import TokComModel
from tokcom.train_accelerate import run
from tokcom.training import trainer
from tokcom.training.checkpoints import CheckpointError, Checkpoints, damage, seal
from tokcom.training.directory import RunLock
from tokcom.training.export import recover_folder, replace_folder
from tokcom.training.progress import Progress
from tokcom.training.stopping import StopSignals, TrainingStopped

TEXT = ROOT / "sample_data" / "stories_validation.jsonl"


# ---- checkpoints ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished codec stage with checkpoints 3 and 6."""
    path = tmp_path_factory.mktemp("trained")
    run(quick(path, "stage=codec"))
    return path / "out" / "run" / "codec"


def mutate(file, generator: random.Random) -> str:
    """Damage a file in one of five ways; returns which."""
    data = bytearray(file.read_bytes())
    how = generator.choice(["flip", "truncate", "extend", "empty", "remove"])
    if how == "flip":
        place = generator.randrange(len(data))
        data[place] ^= 1 << generator.randrange(8)
    elif how == "truncate":
        del data[generator.randrange(len(data)) :]
    elif how == "extend":
        data += b"\0"
    elif how == "empty":
        data = bytearray()
    file.unlink()
    if how != "remove":
        file.write_bytes(data)
    return how


def test_two_hundred_mutations_of_every_file_of_a_checkpoint_are_all_noticed(trained, tmp_path):
    generator, names, silent = random.Random(0), set(), []
    files = sorted(
        p.relative_to(trained) for p in (trained / "checkpoint-6").rglob("*") if p.is_file()
    )
    for case in range(200):
        work = tmp_path / str(case)
        shutil.copytree(trained / "checkpoint-3", work / "checkpoint-3")
        shutil.copytree(trained / "checkpoint-6", work / "checkpoint-6")
        name = files[case % len(files)]
        how = mutate(work / name, generator)
        with pytest.warns(UserWarning, match="passing over a broken checkpoint"):
            newest = Checkpoints(work, 2).newest()
        names.add(name)
        if newest != work / "checkpoint-3":
            silent.append((str(name), how))
        shutil.rmtree(work)
    assert not silent and names == set(files)


def test_a_run_goes_on_from_the_newest_whole_checkpoint(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        run(quick(folder, "stage=codec"))
    stage = second / "out" / "run" / "codec"
    weights = stage / "checkpoint-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    for done in ("final", "best"):
        shutil.rmtree(stage / done)
    with pytest.warns(UserWarning, match="checkpoint-6: model.safetensors has"):
        run(quick(second, "stage=codec"))
    assert same_weights(first / "out", second / "out") and damage(stage / "checkpoint-6") is None


def test_a_run_whose_checkpoints_are_all_broken_says_so(trained, tmp_path):
    shutil.copytree(trained / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "optimizer.bin").unlink()
    with (
        pytest.warns(UserWarning),
        pytest.raises(CheckpointError, match="optimizer.bin is missing.*start again"),
    ):
        Checkpoints(tmp_path, 2).newest()
    assert Checkpoints(tmp_path / "empty", 2).newest() is None


def test_checkpoints_rotate_by_number_and_an_unfinished_one_counts_for_nothing(tmp_path):
    store = Checkpoints(tmp_path, 2)

    def save(folder: str) -> None:
        os.makedirs(folder)
        (tmp_path / folder / "weights").write_text("x")

    for step in (9, 10, 100):
        store.write(step, save, True, lambda: None)
    (tmp_path / "checkpoint-200.tmp").mkdir()
    (tmp_path / "checkpoint-latest").mkdir()
    assert [p.name for p in store.all()] == ["checkpoint-10", "checkpoint-100"]
    assert store.newest() == tmp_path / "checkpoint-100"


def test_a_checkpoint_that_cannot_be_written_leaves_the_ones_before(trained, tmp_path):
    shutil.copytree(trained / "checkpoint-3", tmp_path / "checkpoint-3")

    def fail(folder: str) -> None:
        os.makedirs(folder)
        raise OSError(28, "No space left on device")

    store = Checkpoints(tmp_path, 2)
    with pytest.raises(
        CheckpointError, match="No space left on device.*the last one is .*checkpoint-3"
    ):
        store.write(6, fail, True, lambda: None)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"] and store.newest() is not None


def test_training_state_is_read_without_running_code(trained, tmp_path):
    """A pickle that would run something is refused, even with a matching manifest."""
    target = tmp_path / "out" / "run" / "codec"
    run(quick(tmp_path, "stage=codec", "codec.max_steps=3"))
    for done in ("final", "best"):
        shutil.rmtree(target / done)
    marker = tmp_path / "ran"
    for name in ("extra.pt", "optimizer.bin"):
        shutil.rmtree(target / "checkpoint-3", ignore_errors=True)
        shutil.copytree(trained / "checkpoint-3", target / "checkpoint-3")
        torch.save(Exploit(str(marker)), target / "checkpoint-3" / name)
        seal(target / "checkpoint-3")
        with pytest.raises(Exception, match="[Ww]eights.only"):
            run(quick(tmp_path, "stage=codec", "codec.max_steps=6"))
        assert not marker.exists(), name


class Exploit:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


# ---- signals and processes ----


@pytest.mark.slow
def test_a_signal_saves_exits_with_success_and_says_how_to_go_on(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    command = [
        sys.executable,
        str(ROOT / "train_accelerate.py"),
        "--preset",
        "debug",
        *QUICK,
        f"data.train={TEXT}",
    ]
    command += [
        "data.validation=null",
        "stage=codec",
        "codec.max_steps=300",
        "codec.checkpoint_steps=20",
    ]
    command += ["codec.eval_steps=300", "codec.batch_size=16"]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    process = subprocess.Popen(
        [*command, f"output_dir={stopped}"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (stopped / "run" / "codec" / "checkpoint-20").is_dir():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    assert (
        "stopped by SIGTERM after codec step" in printed and "run the same command again" in printed
    )
    assert not (stopped / "model.safetensors").exists()
    assert (
        subprocess.run([*command, f"output_dir={stopped}"], env=env, capture_output=True).returncode
        == 0
    )
    assert (
        subprocess.run([*command, f"output_dir={whole}"], env=env, capture_output=True).returncode
        == 0
    )
    assert same_weights(whole, stopped)


def accelerate_command(processes: int, output, *extra: str) -> list[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if processes == 2:
        command += [
            "--config_file",
            str(ROOT / "accelerate_configs" / "cpu_2proc.yaml"),
            "--main_process_port",
            "0",
        ]
    else:
        command += ["--num_processes", "1", "--cpu"]
    command += [
        str(ROOT / "train_accelerate.py"),
        "--preset",
        "debug",
        *QUICK,
        f"data.train={TEXT}",
    ]
    return [*command, "data.validation=null", f"output_dir={output}", *extra]


def accelerate_environment() -> dict[str, str]:
    return dict(os.environ, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")


@pytest.mark.slow
def test_two_processes_train_what_one_process_does_that_accumulates(tmp_path):
    """Bit for bit, in float32, both stages, averages and latent statistics included."""
    half = [f"{stage}.gradient_accumulation_steps=2" for stage in ("codec", "flow")]
    half += ["flow.ema_half_life=0.2", "codec.ema_half_life=0.2"]
    one = accelerate_command(1, tmp_path / "one", *half)
    two = accelerate_command(2, tmp_path / "two", *[o for o in half if "accumulation" not in o])
    for command in (one, two):
        done = subprocess.run(
            command, cwd=tmp_path, env=accelerate_environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert same_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_bit(tmp_path):
    extra = ["flow.max_steps=160", "flow.checkpoint_steps=5"]
    assert launch(tmp_path / "whole", *extra).wait(600) == 0
    generator, kills = random.Random(0), 0
    while kills < 20:
        process, began = launch(tmp_path / "broken", *extra), time.monotonic()
        stage = tmp_path / "broken" / "run" / "flow"
        known = set(stage.glob("checkpoint-*"))
        while (
            process.poll() is None
            and not set(stage.glob("checkpoint-*")) - known
            and time.monotonic() - began < 60
        ):
            time.sleep(0.02)  # past the start, so that kills fall into training and saving
        time.sleep(generator.uniform(0, 0.5))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        kills += 1
    assert kills == 20, f"the run ended after {kills} kills; lengthen it"
    assert launch(tmp_path / "broken", *extra).wait(600) == 0
    assert same_weights(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_a_dying_process_ends_the_run_and_the_same_command_goes_on(tmp_path):
    extra = ["stage=codec", "codec.max_steps=60", "codec.checkpoint_steps=5", "codec.eval_steps=60"]
    options = dict(
        cwd=tmp_path,
        env=accelerate_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert (
        subprocess.run(accelerate_command(2, tmp_path / "whole", *extra), **options).returncode == 0
    )
    command = accelerate_command(2, tmp_path / "broken", *extra)
    process = subprocess.Popen(command, **options)
    while not list((tmp_path / "broken" / "run" / "codec").glob("checkpoint-[12]?")):
        assert process.poll() is None
        time.sleep(0.05)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert process.wait(120) != 0
    assert subprocess.run(command, **options).returncode == 0
    assert same_weights(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_a_full_disk_is_said_and_costs_nothing_but_the_newest_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        command = accelerate_command(
            1, disk / "out", "stage=codec", "codec.max_steps=40", "codec.checkpoint_steps=5"
        )
        options = dict(cwd=tmp_path, env=accelerate_environment(), capture_output=True, text=True)
        filler = disk / "filler"
        process = subprocess.Popen(
            command, cwd=tmp_path, env=accelerate_environment(), stderr=subprocess.PIPE, text=True
        )
        stage = disk / "out" / "run" / "codec"
        while not list(stage.glob("checkpoint-*[05]")):
            assert process.poll() is None
            time.sleep(0.02)
        with filler.open("wb") as file:
            try:
                while file.write(b"\0" * 65536):
                    file.flush()
            except OSError:
                pass
        errors = process.communicate(timeout=120)[1]
        assert process.returncode != 0 and "could not be written" in errors, errors[-2000:]
        assert Checkpoints(stage, 2).newest() is not None
        filler.unlink(missing_ok=True)
        done = subprocess.run(command, **options)
        assert done.returncode == 0 and "resumed codec from" in done.stdout + done.stderr
    finally:
        subprocess.run(["umount", "-l", str(disk)])


def test_a_clock_that_jumps_disturbs_nothing(tmp_path, monkeypatch):
    generator, now = random.Random(0), [1e9]

    def jump() -> float:
        now[0] += generator.choice([-1e8, -1.0, 0.0, 1.0, 1e8])
        return now[0]

    plain = tmp_path / "plain"
    plain.mkdir()
    expected = run(quick(plain, "stage=codec"))
    monkeypatch.setattr(trainer.time, "time", jump)
    monkeypatch.setattr(trainer.time, "perf_counter", jump)
    assert same_weights(expected, run(quick(tmp_path, "stage=codec")))


def test_a_stop_is_obeyed_after_the_update_at_hand(tmp_path, monkeypatch):
    after, calls = trainer.Trainer._after_update, []

    def told(self, *args):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGUSR1)
        after(self, *args)

    monkeypatch.setattr(trainer.Trainer, "_after_update", told)
    with pytest.raises(TrainingStopped, match="SIGUSR1 after codec step 2"):
        run(quick(tmp_path, "stage=codec"))
    assert (tmp_path / "out" / "run" / "codec" / "checkpoint-2").is_dir()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_first_interrupt_is_noted_and_the_second_ends_at_once():
    before = signal.getsignal(
        signal.SIGINT
    )  # ignored in a job that a shell started in the background
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


# ---- directories ----


def test_a_directory_in_use_is_refused_until_its_process_has_ended(tmp_path):
    file = tmp_path / "lock"
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    owner = {"pid": sleeper.pid, "host": socket.gethostname()}
    file.write_text(json.dumps(owner))
    with pytest.raises(ValueError, match=f"process {sleeper.pid} on .* is training in"):
        RunLock(file).acquire()
    sleeper.kill()
    sleeper.wait()
    lock = RunLock(file)
    lock.acquire()
    assert json.loads(file.read_text())["pid"] == os.getpid()
    lock.release()
    assert not file.exists()
    file.write_text(json.dumps({**owner, "host": "elsewhere"}))
    with pytest.raises(
        ValueError, match="on elsewhere is training here; if that run has ended, remove the file"
    ):
        RunLock(file).acquire()


def test_an_output_directory_that_cannot_serve_is_named_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_text("x")
    config = quick(tmp_path, "data.train=nothing.txt", f"output_dir={tmp_path / 'file' / 'out'}")
    with pytest.raises(ValueError, match="cannot be written .*choose another one"):
        run(config)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("x")
    with pytest.raises(ValueError, match="already holds model.safetensors"):
        run(quick(tmp_path, "data.train=nothing.txt"))


def test_a_folder_that_replaces_another_is_whole_or_the_other_is_there(tmp_path, monkeypatch):
    target = tmp_path / "best"
    for text in ("old", "new"):
        (tmp_path / text).mkdir()
        (tmp_path / text / "weights").write_text(text)
    replace_folder(tmp_path / "old", target)
    rename = Path.rename

    def die(self, name):
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, name)

    monkeypatch.setattr(Path, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(tmp_path / "new", target)
    monkeypatch.undo()
    recover_folder(target)
    assert (target / "weights").read_text() == "old"
    replace_folder(tmp_path / "new", target)
    assert (target / "weights").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == [
        "best"
    ]


def test_sizes_of_later_stages_are_checked_before_the_first_one_trains(tmp_path):
    with pytest.raises(ValueError, match="fewer than one batch of 5000.*lower flow.batch_size"):
        run(quick(tmp_path, "flow.batch_size=5000"))
    assert not (tmp_path / "out" / "run" / "codec").exists()
    run(
        quick(tmp_path, "stage=codec", "seed=7")
    )  # what was refused has left nothing that binds the directory
    assert not (tmp_path / "out" / "run" / "lock").exists()


# ---- going on with other settings ----


def test_a_finished_run_that_is_asked_for_more_steps_goes_on(tmp_path, capsys):
    run(quick(tmp_path))
    stage = tmp_path / "out" / "run" / "flow"
    with pytest.raises(ValueError, match="asks for more steps of a codec"):
        run(quick(tmp_path, "codec.max_steps=7"))
    run(quick(tmp_path, "flow.max_steps=8", "flow.learning_rate=1e-4"))
    assert "resumed flow from" in capsys.readouterr().out and (stage / "checkpoint-8").is_dir()
    assert json.loads((stage / "summary.json").read_text())["steps"] == 8
    rates = torch.load(stage / "checkpoint-8" / "extra.pt", weights_only=True)["scheduler"][
        "base_lrs"
    ]
    assert set(rates) == {1e-4}
    run(quick(tmp_path, "flow.max_steps=8"))
    assert "stage flow is already finished" in capsys.readouterr().out
    for checkpoint in stage.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match="finished after 8 steps and has no checkpoint"):
        run(quick(tmp_path, "flow.max_steps=9"))


@pytest.mark.parametrize("rows", [100, None])
def test_no_row_is_seen_twice_after_batches_change_their_size(rows):
    for before in ((8, 1, 1), (5, 2, 2), (12, 1, 3)):
        for after in ((4, 1, 2), (8, 2, 1), (7, 1, 1)):
            for micro_batch in range(40):
                progress = Progress(*before, rows)
                progress.micro_batch = micro_batch
                assert before == after or progress.relocate(*after, rows)
                seen, skipped = (size[0] * size[1] for size in (before, after))
                done = micro_batch * seen, progress.micro_batch * skipped
                if rows is not None:  # the last rows of an epoch that fill no batch are left out
                    old, new = (
                        divmod(count, rows // size)
                        for count, size in ((micro_batch, seen), (progress.micro_batch, skipped))
                    )
                    assert new[0] >= old[0]
                    done = old[1] * seen, new[1] * skipped + (new[0] - old[0]) * rows
                assert 0 <= done[1] - done[0] <= skipped * after[2] + seen
                assert progress.micro_batch % after[2] == 0
    assert Progress(8, 1, 1, rows).relocate(8, 1, 1, rows) is None


def test_an_epoch_of_another_size_ends_when_its_rows_become_other_ones():
    for micro_batch, rows, expected in ((5, 10, 1), (0, 10, 0), (12, 1000, 125), (13, 1000, 250)):
        progress = Progress(8, 1, 1, 100)  # 12 batches an epoch
        progress.micro_batch = micro_batch
        assert progress.relocate(8, 1, 1, rows) == f"rows of an epoch 100 became {rows}"
        assert progress.micro_batch == expected
    small = Progress(16, 1, 1, 8)  # an epoch that holds no batch
    small.micro_batch = 5
    small.relocate(8, 1, 1, 10)
    assert small.micro_batch == 5


def test_progress_of_an_earlier_version_is_taken_to_have_had_the_batches_of_now():
    progress = Progress(8, 2, 1, 100)
    old = {
        name: value
        for name, value in progress.state_dict().items()
        if name not in ("batch_size", "processes", "accumulation")
    }
    progress.load_state_dict({**old, "micro_batch": 5})
    assert progress.relocate(8, 2, 1, 100) is None and progress.micro_batch == 5


def test_a_run_goes_on_with_smaller_batches_and_the_average_switched_off_or_on(
    tmp_path, monkeypatch, capsys
):
    seen = []
    forward = TokComModel.forward

    def spy(self, input_ids, **kwargs):
        if self.training:
            seen.append(input_ids.clone())
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(TokComModel, "forward", spy)
    run(
        quick(
            tmp_path,
            "stage=codec",
            "codec.max_steps=3",
            "codec.batch_size=8",
            "codec.ema_half_life=0.2",
        )
    )
    more = ["codec.batch_size=4", "codec.gradient_accumulation_steps=2", "codec.max_steps=6"]
    run(quick(tmp_path, "stage=codec", *more))
    printed = capsys.readouterr().out
    assert (
        "batch size 8 became 4, accumulation 1 became 2;" in printed
        and "averaged weights of the checkpoint are dropped" in printed
    )
    assert [len(batch) for batch in seen] == [8] * 3 + [4] * 6
    other = tmp_path / "other"
    other.mkdir()
    half = len(seen)
    run(quick(other, "stage=codec", "codec.max_steps=6", "codec.batch_size=8"))
    assert torch.equal(
        torch.cat(seen[:half]), torch.cat(seen[half:])
    )  # the rows of a run that did not change
    run(quick(tmp_path, "stage=codec", *more[:2], "codec.max_steps=9", "codec.ema_half_life=0.2"))
    assert "averaging begins at step 6" in capsys.readouterr().out
    assert "average" in torch.load(
        tmp_path / "out/run/codec/checkpoint-9/extra.pt", weights_only=True
    )
