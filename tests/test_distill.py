"""The laws of distribution matching: where its gradient vanishes, where it points, how large it is,
and what it leaves alone."""

import copy
import importlib.util
import os
import subprocess
import sys

import pytest
import test_images as images
import torch
from helpers import ROOT, same_weights
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tokcom.evaluation.students import main as measure_students
from tokcom.modeling_tokcom import TokComModel
from tokcom.processing_tokcom import vocabulary_size
from tokcom.sampling_tokcom import spawn_generators
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler
from tokcom.train_accelerate import main as train
from tokcom.training.data import train_tokenizer
from tokcom.training.denoiser import ModelDenoiser
from tokcom.training.distill import DistillTrainer
from tokcom.training.pipelines import build_pipeline, load_pipeline
from tokcom.training.student_losses import (
    Distiller,
    add_noise,
    denoising_loss,
    draw_times,
    generate,
    integrate,
    matching_gradient,
    matching_loss,
)


def gaussian(mean: float, std: float = 1.0):
    """The exact denoiser of N(mean, std^2)."""

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.view(-1, *[1] * (x.ndim - 1))
        gain = t * std**2 / ((1 - t) ** 2 + t**2 * std**2)
        return mean + gain * (x - t * mean)

    return denoise


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + t[:, None]


def drawn(count: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(count, 4), draw_times(count), torch.randn(count, 4)


def test_there_is_no_gradient_where_both_models_agree():
    samples, t, noise = drawn()
    assert not matching_gradient(samples, t, noise, gaussian(1.0), gaussian(1.0)).any()


def test_samples_move_from_the_fake_mean_to_the_real_one():
    samples, t, noise = drawn()
    gradient = matching_gradient(samples, t, noise, gaussian(2.0), gaussian(0.0))
    assert (gradient < 0).all()  # a step against it goes up, to 2
    assert (matching_gradient(samples, t, noise, gaussian(-2.0), gaussian(0.0)) > 0).all()


def test_the_gradient_is_normalised_for_each_sample_by_its_distance_from_the_real_estimate():
    samples, t, noise = drawn()
    real, fake = gaussian(2.0), gaussian(0.0)
    noisy = add_noise(samples, t, noise)
    difference = fake(noisy, t) - real(noisy, t)
    scale = (samples - real(noisy, t)).abs().mean(1, keepdim=True) + 1e-3
    torch.testing.assert_close(matching_gradient(samples, t, noise, real, fake), difference / scale)


def test_the_loss_has_that_gradient():
    samples = torch.randn(8, 3, requires_grad=True)
    gradient = torch.randn(8, 3)
    matching_loss(samples, gradient).backward()
    torch.testing.assert_close(samples.grad, gradient / 8)


def test_the_best_denoiser_has_the_least_loss():
    torch.manual_seed(0)
    x1, t, noise = 1.5 + 0.5 * torch.randn(4096, 1), draw_times(4096), torch.randn(4096, 1)
    best = denoising_loss(gaussian(1.5, 0.5), x1, t, noise)
    assert best < min(
        denoising_loss(gaussian(m, s), x1, t, noise)
        for m, s in ((1.3, 0.5), (1.5, 0.8), (1.5, 0.3))
    )


def test_euler_recovers_the_gaussian_of_the_teacher():
    torch.manual_seed(0)
    samples = integrate(gaussian(1.5, 0.5), torch.randn(20000, 1), 100)
    assert abs(samples.mean() - 1.5) < 0.02 and abs(samples.std() - 0.5) < 0.02


def test_only_the_last_call_of_a_simulated_student_has_a_gradient():
    student, calls = Linear(), []
    student.register_forward_hook(lambda module, inputs, output: calls.append(output.requires_grad))
    generate(student, torch.randn(2, 3), (0.0, 0.25, 0.5, 0.75), stop=2)
    assert calls == [False, False, True]


def test_five_updates_of_the_fake_for_one_of_the_student_and_none_of_the_teacher():
    torch.manual_seed(0)
    teacher = Linear()
    student, fake = copy.deepcopy(teacher), copy.deepcopy(teacher)
    before = copy.deepcopy(teacher.state_dict())
    optimizers = torch.optim.SGD(student.parameters(), 0.1), torch.optim.SGD(fake.parameters(), 0.1)
    distiller = Distiller(teacher, fake, student, *optimizers, times=(0.0, 0.5))
    for _ in range(3):
        distiller.step((16, 3))
    assert distiller.updates == {"fake": 15, "student": 3}
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert not torch.equal(student.layer.weight, before["layer.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(times=(0.25, 0.5)), "rise from 0"),
        (dict(times=(0.0, 0.5, 0.5)), "rise from 0"),
        (dict(times=(0.0, 1.0)), "below 1"),
        (dict(regression_weight=0.25), "needs `pairs`"),
    ],
)
def test_settings_that_cannot_work_are_named(options, message):
    model = Linear()
    optimizers = (torch.optim.SGD(model.parameters(), 0.1),) * 2
    with pytest.raises(ValueError, match=message):
        Distiller(model, model, model, *optimizers, **options)


def toy():
    spec = importlib.util.spec_from_file_location("distill_2d", ROOT / "examples" / "distill_2d.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_one_step_reaches_all_eight_modes_of_the_plane(seed):
    results = toy().main(["--seed", str(seed)])
    near, modes = results["matching + regression, 1 step"]
    assert results["teacher, 1 step"][0] == 0
    assert near >= 0.6 and modes == 8


# ---- stage=distill ----


PICTURES = str(ROOT / "sample_data/emoji_validation.parquet")
STORIES = str(ROOT / "sample_data/stories_validation.jsonl")
SMALL = [
    "max_steps=2",
    "batch_size=2",
    "num_pairs=4",
    "pair_steps=2",
    "sequence_length=64",
    "checkpoint_steps=1",
]
SMALL += ["learning_rate=1e-2", "fake_learning_rate=1e-2"]


def options(*settings: str) -> list[str]:
    """Overrides of the stage `distill`."""
    return [f"distill.{setting}" for setting in settings]


def student(teacher, output, *settings: str) -> list[str]:
    """The command line that distils a teacher."""
    return [
        "stage=distill",
        f"init_from={teacher}",
        f"output_dir={output}",
        "report_to=none",
        *settings,
    ]


def teacher_of(kind: str, build, directory) -> list[str]:
    """Save a small teacher and return the overrides that distil it."""
    if kind == "images":
        tokenizer = train_tokenizer(["a cat"], 300)
        torch.manual_seed(0)
        net = TokComModel(images.model(vocabulary_size(tokenizer) + 1).config)
        net.config.sampling_guidance_scale = 3.0
        build_pipeline(net, tokenizer).save_pretrained(directory)
    else:
        block_size = {"blocks": 4, "bidirectional": None}[kind]
        build(transformer_config={"block_size": block_size}).save_pretrained(directory)
    source = PICTURES if kind == "images" else STORIES
    return [*options(*SMALL), f"data.train={source}"]


@pytest.mark.parametrize("kind", ["images", "blocks", "bidirectional"])
@pytest.mark.parametrize("method", ["dmd", "regression", "both"])
def test_a_student_of_any_teacher_is_a_model_that_says_how_it_is_sampled(
    kind, method, build, tmp_path
):
    arguments = teacher_of(kind, build, tmp_path / "teacher")
    before = load_file(tmp_path / "teacher/model.safetensors")
    output = tmp_path / "student"
    settings = options(f"method={method}", "num_inference_steps=2", "guidance_scale=1.5")
    train(student(tmp_path / "teacher", output, *arguments, *settings))
    after = load_file(tmp_path / "teacher/model.safetensors")
    found = load_file(output / "model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    moved = {name for name, value in before.items() if not torch.equal(value, found[name])}
    assert moved and not any(name.startswith("codec.") for name in moved)
    pipe = load_pipeline(output)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.stochastic_sampling and pipe.model.config.num_inference_steps == 2
    # it has learnt the guided teacher, and is not guided again
    assert pipe.model.config.sampling_guidance_scale == 1.0
    length = {} if kind == "images" else {"gen_length": 16}
    result = pipe("a cat", **length, generator=torch.Generator().manual_seed(0))
    assert len(result.images if kind == "images" else result.texts) == 1


def test_the_pipeline_samples_a_student_as_distillation_simulates_it(build, monkeypatch):
    pipe = build(transformer_config={"block_size": None})
    pipe.scheduler = TokComFlowMatchScheduler(stochastic_sampling=True)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 8, 16)
    options = {"num_inference_steps": 4, "latents": noise, "output_type": "latent"}
    drawn = pipe.generate(8, generator=torch.Generator().manual_seed(3), **options).latents
    denoiser = ModelDenoiser(pipe.model)
    (source,) = spawn_generators(torch.Generator().manual_seed(3), 1)
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.randn(x.shape, generator=source))
    with torch.no_grad():
        simulated = generate(lambda x, t: denoiser(x, t, {}), noise, (0.0, 0.25, 0.5, 0.75))
    torch.testing.assert_close(drawn, simulated, atol=1e-4, rtol=1e-4)


def test_a_student_of_dialogues_is_given_their_prompts(build):
    model = build(transformer_config={"block_size": None}).model
    denoiser = ModelDenoiser(model.eval())
    ids = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    known = torch.zeros_like(ids)
    known[:, :14] = 1  # three whole chunks, and half of a fourth
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "known_mask": known}
    context = denoiser.context(batch)
    assert context["known"].tolist() == [[True] * 3 + [False] * 5] * 2
    x, t = torch.randn(2, 8, 16), torch.full((2,), 0.3)
    with torch.no_grad():
        first, second = (
            denoiser(noise, t, context) for noise in (x, x + context["known"][..., None])
        )
    torch.testing.assert_close(first, second)  # what is given is not read from the noise
    assert torch.equal(first[:, :3], context["latents"][:, :3])


def test_a_run_that_was_stopped_ends_with_the_same_student(build, tmp_path, monkeypatch):
    teacher = tmp_path / "teacher"
    arguments = teacher_of("images", build, teacher)
    arguments += options("num_inference_steps=2", "max_steps=3")
    train(student(teacher, tmp_path / "once", *arguments))
    update, calls = DistillTrainer._update, []

    def fail_later(self, name, place):
        calls.append(name)
        if len(calls) > 14:  # in the third round
            raise KeyboardInterrupt
        return update(self, name, place)

    twice = student(teacher, tmp_path / "twice", *arguments)
    monkeypatch.setattr(DistillTrainer, "_update", fail_later)
    with pytest.raises(SystemExit, match="130"):  # as shells count an interrupt
        train(twice)
    assert calls[:6] == ["fake"] * 5 + ["student"]
    monkeypatch.undo()
    train(twice)
    assert same_weights(tmp_path / "once", tmp_path / "twice")
    with pytest.raises(SystemExit, match="started with distill.num_inference_steps=2, now it is 1"):
        train([*twice, *options("num_inference_steps=1")])
    calls.clear()
    monkeypatch.setattr(DistillTrainer, "_update", fail_later)
    train([*twice, *options("max_steps=4")])
    assert calls == ["fake"] * 5 + ["student"]  # the fourth


@pytest.mark.slow
def test_two_processes_distil_as_one_that_accumulates(build, tmp_path):
    teacher, one, two = (tmp_path / name for name in ("teacher", "one", "two"))
    arguments = teacher_of("images", build, teacher)
    train(student(teacher, one, *arguments, *options("gradient_accumulation_steps=2")))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "accelerate_configs" / "cpu_2proc.yaml"), "--main_process_port", "0"]
    command += [str(ROOT / "train_accelerate.py"), *student(teacher, two, *arguments)]
    env = dict(os.environ, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(path / "model.safetensors") for path in (one, two))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=1e-5, rtol=1e-4)


def test_teachers_that_cannot_be_distilled_are_refused(build, tmp_path):
    command = student(ROOT, tmp_path / "a", f"data.train={STORIES}")
    with pytest.raises(SystemExit, match="prediction_type='tokens'.*pure noise"):
        train(command)
    with pytest.raises(SystemExit, match="method.*'gan'"):
        train([*command, "distill.method=gan"])
    wrong = (
        "mixed_precision=fp16",
        "data.streaming=true",
        "distill.checkpoint_steps=0",
        "distill.num_pairs=0",
    )
    for setting in (*wrong, "cache_latents=true", "model.ce_weight=0.5"):
        with pytest.raises(SystemExit, match=setting.partition("=")[0].rpartition(".")[2]):
            train([*command, setting])
    build(noise_std=0.5).save_pretrained(tmp_path / "teacher")
    with pytest.raises(SystemExit, match="noise_std.*0.5"):
        train(student(tmp_path / "teacher", tmp_path / "a", f"data.train={STORIES}"))


def test_a_distillation_of_the_earlier_version_is_refused_by_name(tmp_path):
    old = tmp_path / "run" / "distill"
    old.mkdir(parents=True)
    (old / "distill_config.json").write_text("{}")
    with pytest.raises(SystemExit, match="a distillation of version 0.2"):
        train(student(ROOT, tmp_path, f"data.train={STORIES}"))


@pytest.mark.slow
def test_students_of_texts_are_measured_beside_their_teacher(build, tmp_path, tokenizer):
    pipe = build(transformer_config={"block_size": 1, "max_position_embeddings": 64})
    pipe.save_pretrained(tmp_path / "teacher")
    pipe.scheduler = TokComFlowMatchScheduler(stochastic_sampling=True)
    pipe.model.config.num_inference_steps = 2
    pipe.save_pretrained(tmp_path / "student")
    config = LlamaConfig(
        vocab_size=vocabulary_size(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "judge")
    arguments = [
        "--teacher",
        str(tmp_path / "teacher"),
        "--students",
        str(tmp_path / "student"),
        "--data",
        STORIES,
    ]
    arguments += [
        "--judge",
        str(tmp_path / "judge"),
        "--peer",
        str(tmp_path / "judge"),
        "--samples",
        "4",
        "--steps",
    ]
    facts = measure_students(
        [*arguments, "1", "3", "--noise_scales", "1", "0.5", "--output_dir", str(tmp_path)]
    )
    assert [(r["system"], r["evaluations a chunk"]) for r in facts["rows"]] == [
        ("teacher", 1),
        ("teacher", 3),
        ("student", 2),
    ]
    curve = facts["rows"][2][
        "curve"
    ]  # less noise is other text, also where a student draws it anew
    assert curve[0]["nll"] != curve[1]["nll"] and len(facts["latency"]) == 4
    assert (
        "real text" in (tmp_path / "results.md").read_text() and (tmp_path / "steps.png").is_file()
    )
    with pytest.raises(SystemExit, match="use TokComImagePipeline"):
        teacher_of("images", build, tmp_path / "pictures")
        measure_students(
            [
                *arguments[2:],
                "1",
                "--output_dir",
                str(tmp_path),
                "--teacher",
                str(tmp_path / "pictures"),
            ]
        )
