import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import ROOT, same_weights, tiny_config, tiny_model
from safetensors.torch import load_file

from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.processing_tokcom import vocabulary_size
from tokcom.sampling_tokcom import TokComSampling
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler
from tokcom.tasks_tokcom import TokComTask
from tokcom.train_accelerate import run
from tokcom.training import attention, progress, samples
from tokcom.training import launch as processes
from tokcom.training.command import parse_config
from tokcom.training.config import as_override, known_keys, load_train_config
from tokcom.training.data import PackedDataset
from tokcom.training.export import measure_latent_statistics
from tokcom.training.pipelines import build_pipeline
from tokcom.training.presets import PRESET_DIR
from tokcom.training.progress import NonFiniteLossError, UpdateGuard

QUICK = [
    *(
        "report_to=none",
        "num_samples=0",
        "tokenizer_vocab_size=320",
        "model.transformer_config.num_hidden_layers=1",
    ),
    *(
        "codec.max_steps=6",
        "codec.checkpoint_steps=3",
        "codec.eval_steps=3",
        "codec.eval_batches=1",
    ),
    *("flow.max_steps=6", "flow.checkpoint_steps=3", "flow.eval_steps=3", "flow.eval_batches=1"),
    *(
        "codec.sequence_length=32",
        "flow.sequence_length=32",
        "codec.batch_size=4",
        "flow.batch_size=4",
    ),
]


def quick(tmp_path, *overrides):
    brought = any(
        o.startswith("init_from=") for o in overrides
    )  # then the model's configuration comes along
    base = [o for o in QUICK if not (brought and o.startswith("model."))]
    data = [f"data.train={ROOT}/sample_data/stories_validation.jsonl", "data.validation=null"]
    return load_train_config("debug", [*base, *data, f"output_dir={tmp_path}/out", *overrides])


OVERFIT = {
    "latents": ({"transformer_config": {"num_hidden_layers": 3}}, 1200),
    "tokens": (
        {
            "prediction_type": "tokens",
            "codec_config": {"encoder_type": "token"},
            "transformer_config": {
                "num_hidden_layers": 3,
                "num_context_layers": 2,
                "block_size": 1,
                "head_attention": False,
                "start_latents": True,
            },
            "timestep_sampling": "uniform",
            "token_stagger": 1.0,
        },
        600,
    ),
}


@pytest.mark.parametrize("kind", [pytest.param("latents", marks=pytest.mark.slow), "tokens"])
def test_one_batch_overfits_end_to_end(tokenizer, stories, kind):
    """Codec, then flow, then sampling from noise with the prompt: more than 99 % of the tokens come
    back."""
    torch.manual_seed(0)
    ids = torch.tensor(tokenizer(stories[0])["input_ids"][:256]).view(4, 64)
    overrides, flow_steps = OVERFIT[kind]
    objectives = {"codec": {}, "flow": {"context_dropout": 0.0, "infill_rate": 0.0}}
    if kind == "tokens":
        objectives["flow"] |= {"turn_share": 0.75, "noise_draws": 4}
    model = TokComModel(tiny_config(vocabulary_size(tokenizer), **overrides))
    for stage, steps, rate in (("codec", 200, 5e-3), ("flow", flow_steps, 4e-3)):
        model.set_stage(stage, **objectives[stage])
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
        model.train()
        for _ in range(steps):
            model(ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if stage == "codec":
            measure_latent_statistics(model, ids.flatten().numpy())
    model.eval()
    assert (model.to_ids(model.encode(ids).latents) == ids).float().mean() > 0.99
    pipe = TokComPipeline(
        model, TokComFlowMatchScheduler.from_model_config(model.config), tokenizer
    )
    pipe.set_progress_bar_config(disable=True)
    context = model.encode(ids[:, :16])
    noise = torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(0))
    positions = (4 + torch.arange(12))[None, :, None].expand(4, -1, -1)
    with torch.no_grad():
        sampled = pipe.sample_latents(TokComTask(noise, context, positions), TokComSampling(16))[1]
    assert (sampled == ids[:, 16:]).float().mean() > 0.99


def test_both_stages_write_a_repository_that_continues_text(tmp_path):
    output = run(quick(tmp_path, "report_to=tensorboard", "num_samples=1"))
    pipe = TokComPipeline.from_pretrained(output)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe("Squinty was", gen_length=8, num_inference_steps=2).texts[0], str)
    std = pipe.model.codec.latent_std
    assert not torch.equal(std, torch.ones_like(std))  # measured after stage 1


def test_documented_metric_names_and_tables_are_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(quick(tmp_path, "report_to=tensorboard", "num_samples=1"))
    tags = set()
    for file in (tmp_path / "out" / "run").rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        tags |= set(events.Tags()["scalars"]) | set(events.Tags()["tensors"])
    wanted = {"vae/batch_loss", "diffusion/batch_ce_loss", "diffusion/batch_mse_loss"}
    for prefix in ("vae", "diffusion"):
        wanted |= {
            f"{prefix}/{n}" for n in ("train_loss", "val_loss", "best_val_loss", "learning_rate")
        }
    tables = ("vae/samples", "diffusion/generated", "diffusion/reconstructed")
    assert wanted <= tags and all(any(t.startswith(name) for t in tags) for name in tables)


def test_checkpoints_rotate_and_the_best_is_kept(tmp_path):
    run(quick(tmp_path, "codec.max_steps=9", "codec.checkpoints_total_limit=2", "stage=codec"))
    names = sorted(p.name for p in (tmp_path / "out" / "run" / "codec").iterdir())
    assert [n for n in names if n.startswith("checkpoint")] == [
        "checkpoint-6",
        "checkpoint-9",
    ] and "best" in names


def launch(output, *extra):
    command = [
        sys.executable,
        str(ROOT / "train_accelerate.py"),
        "--preset",
        "debug",
        *QUICK,
        f"output_dir={output}",
    ]
    data = [f"data.train={ROOT}/sample_data/stories_validation.jsonl", "data.validation=null"]
    steps = ["flow.max_steps=120", "flow.checkpoint_steps=10", "flow.gradient_accumulation_steps=2"]
    steps += ["flow.batch_size=24", *extra]  # 12.5 steps an epoch: the kill comes in a later one
    env = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.Popen(
        [*command, *data, *steps],
        cwd=output.parent,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_killed_and_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(tmp_path, streaming):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    extra = [f"data.streaming={streaming}"]
    if streaming == "true":
        extra += [
            f"data.validation={ROOT}/sample_data/stories_validation.jsonl",
            "flow.max_steps=60",
        ]
    assert launch(whole, *extra).wait(300) == 0
    process = launch(broken, *extra)
    while not list((broken / "run" / "flow").glob("checkpoint-[3-9]0")):
        assert process.poll() is None, "training ended before it could be killed"
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (broken / "model.safetensors").exists()
    assert launch(broken, *extra).wait(300) == 0
    assert same_weights(whole, broken)


SPY = """
import json, os, sys
from tokcom import train_accelerate
from tokcom.modeling_tokcom import TokComModel
forward = TokComModel.forward
def spy(self, input_ids, attention_mask=None, timestep=None):
    if self.training:
        with open(sys.argv[1] + os.environ["RANK"], "a") as file:
            weights = sum(p.double().sum().item() for p in self.parameters())
            file.write(json.dumps([input_ids[:, 0].tolist(), input_ids.sum().item(), weights]) + "\\n")
    return forward(self, input_ids, attention_mask, timestep)
TokComModel.forward = spy
train_accelerate.main(sys.argv[2:])
"""


@pytest.mark.slow
def test_two_processes_see_different_windows_and_keep_one_set_of_weights(tmp_path):
    (tmp_path / "spy.py").write_text(SPY.replace("\\\\", "\\"))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "accelerate_configs" / "cpu_2proc.yaml"), "--main_process_port", "0"]
    command += [str(tmp_path / "spy.py"), str(tmp_path / "seen"), "--preset", "debug", *QUICK]
    command += [f"data.train={ROOT}/sample_data/stories_validation.jsonl", "data.validation=null"]
    command += [
        "stage=codec",
        "codec.batch_size=100",
        "--output_dir",
        str(tmp_path / "out"),
    ]  # 3 steps an epoch
    env = dict(os.environ, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (
        [json.loads(line) for line in open(tmp_path / f"seen{rank}", encoding="utf-8")]
        for rank in "01"
    )
    assert len(first) == len(second) == 6
    for a, b in zip(first, second):
        assert a[:2] != b[:2] and a[2] == b[2]
    assert first[0][2] != first[-1][2]
    epochs = [
        sorted(sum((row[0] for row in rank[k : k + 3]), []))
        for rank in (first, second)
        for k in (0, 3)
    ]
    assert epochs[0] != epochs[1] and epochs[2] != epochs[3]  # new offsets in the second epoch
    assert TokComPipeline.from_pretrained(tmp_path / "out").reconstruct("x").texts


def poison(monkeypatch, is_bad, value: float = float("nan")) -> None:
    """Multiply the training losses that `is_bad(call number)` picks by `value`."""
    forward, calls = TokComModel.forward, []

    def poisoned(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training:
            calls.append(1)
            if is_bad(len(calls)):
                output["loss"] = output.loss * value
        return output

    monkeypatch.setattr(TokComModel, "forward", poisoned)


def test_a_nan_loss_is_left_out_and_counted(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, lambda call: call in (2, 5))
    output = run(quick(tmp_path, "stage=codec"))
    printed = capsys.readouterr().out
    assert "codec step 2: loss is nan; left out (1 so far)" in printed
    assert "codec step 4: loss is nan; left out (2 so far)" in printed
    assert json.loads((output / "run" / "codec" / "summary.json").read_text())["steps"] == 6
    assert all(torch.isfinite(v).all() for v in load_file(output / "model.safetensors").values())


def test_a_nan_loss_is_left_out_where_a_scaler_has_unscaled_the_gradients(
    tmp_path, monkeypatch, capsys
):
    prepare, clip = processes.Accelerator.prepare, processes.Accelerator.clip_grad_norm_

    def clipped(self, *args, **kwargs):  # what accelerate does with mixed_precision=fp16 on a GPU
        self.scaler.unscale_(self._optimizers[-1].optimizer)
        return clip(self, *args, **kwargs)

    def scaled(self, *args, **kwargs):
        self.scaler = self.scaler or torch.amp.GradScaler("cpu")
        return prepare(self, *args, **kwargs)

    monkeypatch.setattr(processes.Accelerator, "prepare", scaled)
    monkeypatch.setattr(processes.Accelerator, "clip_grad_norm_", clipped)
    poison(monkeypatch, lambda call: call == 2)
    output = run(quick(tmp_path, "stage=codec"))
    assert "loss is nan; left out (1 so far)" in capsys.readouterr().out
    assert all(torch.isfinite(v).all() for v in load_file(output / "model.safetensors").values())


def test_loss_that_stays_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    poison(monkeypatch, lambda call: call >= 5)
    with pytest.raises(
        NonFiniteLossError, match=r"step 5; stopped.*checkpoint-3.*learning_rate \(0.003\)"
    ):
        run(quick(tmp_path, "stage=codec", "codec.max_skipped_steps=2"))
    kept = tmp_path / "out" / "run" / "codec"
    assert [p.name for p in kept.glob("checkpoint-*")] == ["checkpoint-3"]
    state = load_file(kept / "checkpoint-3" / "model.safetensors")
    assert all(torch.isfinite(v).all() for v in state.values())
    monkeypatch.undo()
    run(quick(tmp_path, "stage=codec"))  # the same command continues from there


def test_infinite_gradient_stops_before_the_weights_change(tmp_path, monkeypatch):
    forward, calls = TokComModel.forward, []

    def poisoned(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            self.codec.embed_tokens.weight.register_hook(lambda grad: grad * float("inf"))
        return output

    monkeypatch.setattr(TokComModel, "forward", poisoned)
    with pytest.raises(NonFiniteLossError, match="gradient norm is (nan|inf)"):
        run(quick(tmp_path, "stage=codec", "codec.max_skipped_steps=1"))
    assert not list((tmp_path / "out" / "run" / "codec").glob("checkpoint-*"))


def test_a_spike_of_the_gradient_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SPIKES_AFTER", 3)
    poison(monkeypatch, lambda call: call == 5, 1e4)
    run(quick(tmp_path, "stage=codec"))
    assert "is more than 20 times its average; left out (1 so far)" in capsys.readouterr().out


def test_gradient_accumulation_equals_one_large_batch(tmp_path, monkeypatch):
    """Without noise (dropouts off, no posterior) two half batches give the update of one whole
    batch."""
    off = [f"codec.objective.{n}=0.0" for n in ("token_dropout", "latent_dropout", "kl_weight")]
    off += [
        "model.codec_config.variational=false",
        "model.codec_config.latent_channels=64",
        "stage=codec",
    ]
    off += [
        "model.transformer_config.latent_channels=64",
        "codec.max_steps=1",
        "codec.warmup_steps=0",
    ]
    monkeypatch.setattr(PackedDataset, "__getitem__", _unpadded)
    weights = []
    for name, options in (
        ("a", ["codec.batch_size=8"]),
        ("b", ["codec.gradient_accumulation_steps=2"]),
    ):
        (tmp_path / name).mkdir()
        run(quick(tmp_path / name, *off, *options))
        weights.append(load_file(tmp_path / name / "out" / "model.safetensors"))
    for key in weights[0]:
        if "latent_" not in key:
            close = torch.isclose(weights[0][key], weights[1][key], atol=1e-4, rtol=1e-3)
            # Adam's first step is the sign of the gradient, which rounding decides where the
            # gradient is nearly 0
            assert close.float().mean() > 0.99, key


def _unpadded(self, index):
    start = index * self.length
    ids = torch.from_numpy(self.tokens[start : start + self.length].astype(np.int64))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_flow_goes_on_from_the_codec_of_its_directory_and_not_from_none(tmp_path):
    with pytest.raises(ValueError, match="needs a trained codec"):
        run(quick(tmp_path, "stage=flow"))
    state = load_file(run(quick(tmp_path, "stage=codec")) / "model.safetensors")
    codec = {name: value for name, value in state.items() if name.startswith("codec.")}
    both = load_file(run(quick(tmp_path, "stage=flow")) / "model.safetensors")
    assert (
        all(torch.equal(both[name], value) for name, value in codec.items())
        and both["codec.latent_std"].std() > 0
    )


@pytest.mark.parametrize("how", ["init_from", "codec_from"])
def test_flow_starts_from_another_models_codec(tmp_path, how):
    first = run(quick(tmp_path, "stage=codec"))
    options = ["stage=flow", f"{how}={first}", f"output_dir={tmp_path}/second"]
    if how == "codec_from":
        options.append("model.transformer_config.num_hidden_layers=3")
    second = run(quick(tmp_path, *options))
    state, codec = load_file(second / "model.safetensors"), load_file(first / "model.safetensors")
    assert all(
        torch.equal(state[name], value)
        for name, value in codec.items()
        if name.startswith("codec.")
    )
    layers = TokComModel.from_pretrained(second).config.transformer_config.num_hidden_layers
    assert layers == (3 if how == "codec_from" else 1)


def test_a_model_goes_on_under_other_settings_but_not_other_shapes(tmp_path):
    first = run(quick(tmp_path, "stage=codec"))
    options = [
        "stage=flow",
        f"init_from={first}",
        f"output_dir={tmp_path}/second",
        "flow.objective.ce_weight=0.5",
    ]
    second = run(quick(tmp_path, *options, "model.transformer_config.block_size=1"))
    config = TokComModel.from_pretrained(second).config
    assert config.transformer_config.block_size == 1
    options[2] = f"output_dir={tmp_path}/third"
    with pytest.raises(ValueError, match="do not fit.*intermediate|do not fit.*size mismatch"):
        run(quick(tmp_path, *options, "model.transformer_config.intermediate_size=72"))
    for key in ("noise_sdt", "transformer_config.blok_size"):
        with pytest.raises(ValueError, match=f"unknown training key 'model.{key}'"):
            run(quick(tmp_path, *options[:2], f"output_dir={tmp_path}/{key}", f"model.{key}=1"))


def test_an_output_directory_belongs_to_one_model_and_one_text(tmp_path):
    run(quick(tmp_path, "stage=codec"))
    with pytest.raises(ValueError, match="was started with seed=0, now it is 1"):
        run(quick(tmp_path, "stage=codec", "seed=1"))


def test_workers_of_the_suite_compute_with_one_thread_each():
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (1, "1")


def test_too_little_text_for_a_batch_is_named(tmp_path):
    with pytest.raises(
        ValueError, match="windows of 32 tokens, fewer than one batch of 5000.*batch_size"
    ):
        run(quick(tmp_path, "codec.batch_size=5000"))


def test_a_stream_needs_its_own_validation_text(tmp_path):
    with pytest.raises(ValueError, match="hold out"):
        run(quick(tmp_path, "data.streaming=true"))


@pytest.mark.parametrize("name", sorted(p.stem for p in PRESET_DIR.glob("*.yaml")))
def test_training_presets_are_valid(name):
    config = load_train_config(name, [])
    assert config.preset == name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["flow.max_step=3"], "did you mean 'flow.max_steps'"),
        (["lr=3"], "'lr'; --help lists"),
        (["data=x.txt"], "`data` cannot be set"),
        (["flow.max_steps=many"], "flow.max_steps.*int"),
        (["flow.max_steps"], "key=value"),
        (["stage=vae"], "'vae'"),
        (["flow.batch_size=0"], r"flow.batch_size.*\(0\)"),
        (["report_to=paper"], "'paper'"),
        (["flow.eval_steps=0"], r"flow.eval_steps.*\(0\)"),
        (["init_from=x", "codec_from=y"], "remove `codec_from`"),
        (["codec_from=x"], "stage=flow"),
        (["data.train=null"], "data.train"),
        (["codec.max_steps=-3"], r"codec.max_steps` \(-3\).*between 1 and 1099511627776\."),
        (["seed=-1"], r"`seed` \(-1\).*between 0 and 4294967295\."),
        (["flow.cooldown_share=2"], "between 0 and 1\\."),
        (["hub_model_id=bad/name/x"], "hub_model_id.*'bad/name/x'.*user/name"),
        (["push_to_hub=true", "output_dir=my model"], "output_dir.*'my model'.*hub_model_id="),
        (["a.jsonl"], r"'a.jsonl'.*key=value.*data.train=\[a.txt,b.jsonl\]"),
    ],
)
def test_bad_training_keys_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_train_config("debug", overrides)
    with pytest.raises(ValueError, match="nothing.*known presets"):
        load_train_config("nothing", [])


HELP = """
import sys
from tokcom import train_accelerate
try:
    train_accelerate.main(["--help"])
except SystemExit:
    assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def test_help_lists_every_key_and_loads_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    for key, field in known_keys():
        shown = key.replace("codec.", "{codec,flow,head}.")
        if not key.startswith(("flow.", "head.")):
            assert f"  {shown}  [" in done.stdout, key
        assert field.metadata["help"] in done.stdout


def test_a_dictionary_replaces_that_of_the_preset_and_a_section_completes_it():
    config = load_train_config("omni-tiny", ["data.fields={text: caption}", "flow={max_steps: 7}"])
    assert config.data.fields == {"text": "caption"}
    assert (config.flow.max_steps, config.flow.batch_size) == (7, 64)


def test_own_training_text_is_validated_on_itself_unless_told_otherwise(tmp_path):
    assert load_train_config("debug", []).data.validation is not None
    assert load_train_config("debug", ["data.train=x.txt"]).data.validation is None
    assert (
        load_train_config("debug", ["data.train=x.txt", "data.validation=y.txt"]).data.validation
        == "y.txt"
    )


def test_sequence_longer_than_the_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"codec.sequence_length` \(1024\).*256 tokens"):
        run(quick(tmp_path, "codec.sequence_length=1024"))


def test_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    first = run(quick(tmp_path, "stage=codec"))
    other = quick(
        tmp_path, f"init_from={first}", f"tokenizer={ROOT}", f"output_dir={tmp_path}/second"
    )
    with pytest.raises(ValueError, match="gives ids another meaning"):
        run(other)


@pytest.mark.slow
def test_compiled_training_gives_the_same_loss(tmp_path):
    losses = []
    for compiled in ("false", "true"):
        output = run(
            quick(tmp_path / compiled, f"torch_compile={compiled}", "report_to=tensorboard")
        )
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        logs = EventAccumulator(
            str(next((output / "run" / "flow" / "logs").rglob("events*")).parent)
        ).Reload()
        losses.append([event.value for event in logs.Scalars("diffusion/batch_ce_loss")])
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_run_with_cached_latents_writes_them_once_and_starts_windows_at_chunks(
    tmp_path, monkeypatch
):
    seen = []
    forward = TokComModel.forward

    def spy(self, input_ids, latents=None, **kwargs):
        if self.training and self.objective.stage == "flow":
            seen.append(torch.allclose(latents, self.encode(input_ids).latents, atol=1e-5))
        return forward(self, input_ids, latents=latents, **kwargs)

    monkeypatch.setattr(TokComModel, "forward", spy)
    output = run(quick(tmp_path, "cache_latents=true"))
    assert seen and all(seen)
    assert (output / "run" / "latents.f32").stat().st_size % (4 * 16) == 0


def test_text_that_cannot_be_cached_is_an_error(tmp_path):
    held_out = f"data.validation={ROOT}/sample_data/stories_validation.jsonl"
    with pytest.raises(ValueError, match="cache_latents=false"):
        run(quick(tmp_path, "cache_latents=true", "data.streaming=true", held_out))


def test_the_attention_that_was_fastest_is_kept_in_checkpoints_and_not_timed_again(
    tmp_path, monkeypatch
):
    run(quick(tmp_path, "attention=auto", "stage=codec"))
    seconds = {"sdpa": 3.0, "sdpa_float32": 2.0, "eager": 1.0}
    monkeypatch.setattr(
        attention, "time_step", lambda model, batch, name, accelerator: seconds[name]
    )
    monkeypatch.setattr(
        UpdateGuard, "problem", lambda self, *args: stop() if self.progress.step >= 2 else None
    )

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(quick(tmp_path, "attention=auto", "flow.checkpoint_steps=1"))
    monkeypatch.undo()
    monkeypatch.setattr(attention, "time_step", lambda *args: pytest.fail("timed again"))
    run(quick(tmp_path, "attention=auto", "flow.checkpoint_steps=1"))
    newest = max(
        (tmp_path / "out" / "run" / "flow").glob("checkpoint-*"),
        key=lambda p: int(p.name.split("-")[1]),
    )
    assert torch.load(newest / "extra.pt", weights_only=True)["attention"] == "eager"


def test_rows_that_are_filled_up_with_ends_are_shown_within_a_small_window(tokenizer, monkeypatch):
    """Each end would be several tokens if it were read as a text again."""
    model = tiny_model(vocab_size=vocabulary_size(tokenizer))
    pipe = build_pipeline(model.eval(), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    ids = torch.full((2, pipe.max_length), tokenizer.eos_token_id)
    ids[0, :3] = torch.tensor(tokenizer("a pig")["input_ids"])
    tables = {}
    monkeypatch.setattr(
        samples, "log_table", lambda _, name, columns, rows, step: tables.update({name: rows})
    )
    shown = samples.TextSamples(None, "flow", None, count=2)
    shown.log(pipe, [{"input_ids": ids}], 1)
    # the row of nothing but ends is left out
    assert [row[1] for row in tables["diffusion/reconstructed"]] == ["a pig"]
    assert len(tables["diffusion/generated"]) == 2


@pytest.mark.parametrize("override", ["data.train=@texts", "data.train=[a] b", 'output_dir="x'])
def test_an_override_that_is_no_yaml_is_named_with_a_remedy(override):
    with pytest.raises(ValueError, match=re.escape(override) + ".*in quotes"):
        load_train_config("debug", [override])


@pytest.mark.parametrize(
    "name", ["007", "2026_11_30", "no", "1e3", "run #2", "a: b", "ü 😀", "[x]"]
)
def test_a_folder_keeps_its_name_whatever_yaml_makes_of_it(name):
    assert parse_config(None, ["--output_dir", name, "data.train=x"]).output_dir == name
    assert load_train_config("debug", [as_override("output_dir", name)]).output_dir == name
