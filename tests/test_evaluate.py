import argparse
import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, tiny_config, tiny_model
from transformers import LlamaForCausalLM

from tokcom.cli.evaluate import earlier_results, load_judges, load_systems, read_peers
from tokcom.cli.main import call
from tokcom.cli.options import EVALUATION_SECTIONS as SECTIONS
from tokcom.evaluation import autoregressive, compression, metrics
from tokcom.evaluation.ablation import ROWS, row_overrides
from tokcom.evaluation.answers import main as answers_main
from tokcom.evaluation.autoregressive import llama_config
from tokcom.evaluation.flops import count_flops, training_flops_per_token
from tokcom.evaluation.heads import EXPERIMENTS
from tokcom.evaluation.heads import main as heads_main
from tokcom.evaluation.judges import TokenJudge, logits_of_text
from tokcom.evaluation.protocol import (
    Study,
    at_entropy,
    control_texts,
    held_out_windows,
    likelihood,
)
from tokcom.evaluation.reconstruction import (
    NOISE_LEVELS,
    TIMESTEPS,
    rarest_ids,
    reconstruction_accuracy,
)
from tokcom.evaluation.reference import compare, read_predictions, reference_metrics
from tokcom.evaluation.samplers import AutoregressiveSampler, TokComSampler
from tokcom.modeling_tokcom import TokComModel
from tokcom.processing_tokcom import vocabulary_size
from tokcom.sampling_tokcom import TokComSampling
from tokcom.tasks_tokcom import TokComTask
from tokcom.training.build import build_model, derived_config
from tokcom.training.config import load_train_config
from tokcom.training.data import train_tokenizer
from tokcom.training.presets import preset_config

RECIPE = preset_config("tiny", 4096)
WORDS = np.random.default_rng(0)


def test_entropy_of_uniform_tokens_is_log_v():
    assert metrics.unigram_entropy(np.arange(50)) == pytest.approx(math.log(50))
    assert metrics.unigram_entropy(np.zeros(50)) == 0.0
    assert metrics.sample_entropy(np.stack([np.arange(50), np.zeros(50)])) == pytest.approx(
        math.log(50) / 2
    )


def test_ngram_keys_are_equal_exactly_when_the_ngrams_are():
    ids = WORDS.integers(0, 3, (4, 300))
    for n in (1, 2, 4):
        keys = metrics.ngram_keys(ids, n)
        grams = np.lib.stride_tricks.sliding_window_view(ids, n, axis=1)
        assert keys.shape == grams.shape[:2]
        assert len(np.unique(keys)) == len({tuple(g) for row in grams for g in row.tolist()})


def test_diversity_of_constant_and_of_distinct_samples():
    constant, distinct = np.zeros((4, 20), int), np.arange(80).reshape(4, 20)
    assert (
        metrics.distinct_n(constant, 2) == pytest.approx(1 / 76)
        and metrics.distinct_n(distinct, 2) == 1
    )
    assert (
        metrics.repetition(constant) == pytest.approx(16 / 17) and metrics.repetition(distinct) == 0
    )
    assert metrics.self_bleu(constant) == pytest.approx(1) and metrics.self_bleu(distinct) < 0.05


def test_rows_are_chosen_from_all_of_a_text_in_its_order():
    windows = np.arange(1000)[:, None]
    assert (
        metrics.spread(windows, 100)[[0, 99], 0].tolist() == [0, 999]
        and len(metrics.spread(windows[:7], 100)) == 7
    )
    alike = np.concatenate(
        (np.zeros((50, 20), int), np.arange(20 * 950).reshape(950, 20))
    )  # one document repeats itself
    assert metrics.self_bleu(alike, 50) < 0.2


def test_memorised_text_is_found():
    train = WORDS.integers(0, 1000, 5000)
    ngrams = metrics.TrainingNgrams(train)
    fresh = WORDS.integers(1000, 2000, (2, 64))
    stolen = fresh.copy()
    stolen[0, 10:30] = train[100:120]
    assert ngrams.overlap(fresh) == 0 and ngrams.longest(fresh) == 0
    assert ngrams.overlap(stolen) == pytest.approx(13 / (2 * 57)) and ngrams.longest(stolen) == 20
    assert ngrams.chunks_seen(train[None, :64], 4) == (1.0, 1.0)
    seen = (
        train[: 64 * 4].reshape(-1, 4)[::2].reshape(1, -1)
    )  # whole chunks, from places that are not neighbours
    on_grid, off_grid = ngrams.chunks_seen(seen, 4)
    assert on_grid == 1.0 and off_grid < 0.1


def test_brier_is_maximal_for_certain_truth_and_unbiased():
    real = WORDS.integers(0, 50, (500, 4))
    perfect = metrics.brier_lm(real, real, real)
    assert perfect["brier_lm"] == pytest.approx(100)
    wrong = metrics.brier_lm(real + 50, real + 50, real)
    assert wrong["brier_1"] == -100 and wrong["brier_lm"] == 0
    coins = WORDS.integers(0, 2, (3, 100_000, 1)).repeat(4, axis=-1)
    assert metrics.brier_lm(*coins)["brier_1"] == pytest.approx(
        50, abs=1
    )  # 2 p(y) - sum p^2 = 1 - 1/2


def test_nll_at_an_entropy_is_interpolated_within_a_sweep():
    values = [
        ("t 1", 3.0, 7.0),
        ("t 2", 1.0, 5.0),
        ("t 3", 2.5, 9.0),
        ("p 1", 2.0, 1.0),
        ("p 2", 4.0, 2.0),
    ]
    points = [{"setting": s, "entropy": e, "nll": n} for s, e, n in values]
    assert at_entropy(points[:3], 2.0) == pytest.approx(5 + 4 * (2 / 3))
    assert (
        at_entropy(points[:3], 2.75) == pytest.approx(8.0) and at_entropy(points[:3], 4.0) is None
    )
    assert at_entropy(points, 2.75) == pytest.approx(1.375)  # the better of two sweeps


def test_bootstrap_interval_has_the_width_of_the_standard_error():
    low, high = metrics.bootstrap_interval(np.random.default_rng(0).normal(3, 1, 2500))
    assert low < 3.0 < high and high - low == pytest.approx(2 * 1.96 / 50, rel=0.15)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(97, 64, 2, None, 0)).eval()


def test_operations_are_those_of_the_matrix_products():
    model, length = llama(), 32
    config = model.config
    layer = (
        4 * config.hidden_size**2
        + 3 * config.hidden_size * config.intermediate_size
        + 2 * length * 64
    )
    forward = 2 * (
        2 * layer + config.vocab_size * config.hidden_size
    )  # per token; a multiply-add is two
    ids = torch.zeros(2, length, dtype=torch.long)
    with torch.no_grad():
        counted = count_flops(lambda: model(ids)) / ids.numel()
    assert counted == pytest.approx(forward, rel=0.01)
    assert training_flops_per_token(model, ids) == pytest.approx(3 * forward, rel=0.03)


def test_counting_operations_changes_no_gradient_and_no_random_state():
    model, ids = llama(), torch.zeros(1, 16, dtype=torch.long)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    training_flops_per_token(model, ids)
    assert torch.equal(torch.rand(3), expected) and all(p.grad is None for p in model.parameters())


def test_the_counted_objective_is_the_trained_one(tmp_path, monkeypatch):
    """A budget of operations must count the noise draws that the run takes."""
    from tokcom.evaluation import ablation

    counted = []

    def per_step(model, *shape):
        counted.append(model.objective)
        return 1e9

    def stop(config):
        counted.append(config.flow.objective)
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation, "training_flops_per_step", per_step)
    monkeypatch.setattr(ablation, "trained_codec", lambda *_: tmp_path)
    monkeypatch.setattr(ablation, "build_model", lambda *_: TokComModel(preset_config("tiny", 320)))
    monkeypatch.setattr(ablation, "run", stop)
    args = argparse.Namespace(row="recipe", train="a", validation="b", checkpoint=str(ROOT), seed=0)
    args.work_dir, args.init_from, args.training_flops = str(tmp_path), None, 1e10
    with pytest.raises(KeyboardInterrupt):
        ablation.train_row(args)
    objective, settings = counted
    assert settings["noise_draws"] == 4
    for name, value in settings.items():
        assert getattr(objective, name) == value, name


def test_noise_draws_are_counted():
    ids = torch.zeros(1, 32, dtype=torch.long)

    def cost(noise_draws: int = 1, **overrides) -> float:
        model = tiny_model(objective={"ce_weight": 0.0, "noise_draws": noise_draws}, **overrides)
        return training_flops_per_token(model, ids)

    plain = cost()
    split = {"num_context_layers": 1}
    one, three = (cost(transformer_config=split, noise_draws=m) for m in (1, 3))
    assert plain > one and three > one


def test_peer_has_the_number_of_parameters_asked_for():
    model = LlamaForCausalLM(llama_config(97, 128, 3, 900_000, 0))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(900_000, rel=0.002)
    with pytest.raises(ValueError, match="hidden_size"):
        llama_config(97, 512, 3, 900_000, 0)


def test_judge_gives_the_language_models_own_loss(tmp_path, tokenizer):
    model = llama()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = WORDS.integers(0, 97, (3, 12))
    nll = TokenJudge(str(tmp_path), tokenizer).nll(ids)
    tensor = torch.from_numpy(ids)
    assert np.isnan(nll[:, 0]).all()
    assert np.nanmean(nll) == pytest.approx(model(tensor, labels=tensor).loss.item(), rel=0.01)
    conditional = TokenJudge(str(tmp_path), tokenizer).nll(ids[:, 4:], ids[:, :4])
    np.testing.assert_allclose(conditional, nll[:, 4:], rtol=0.02)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["zebra"])
    with pytest.raises(ValueError, match=f"{tmp_path.name} has another tokenizer"):
        TokenJudge(str(tmp_path), other)


def test_samplers_continue_prompts_of_any_length_reproducibly(build):
    pipe = build(transformer_config={"block_size": 1})
    prompts = WORDS.integers(0, 300, (3, 7))
    samplers = (
        TokComSampler(pipe, num_inference_steps=2, batch_size=2),
        AutoregressiveSampler(llama(), 0),
    )
    for sampler in samplers:
        rows = prompts % 97
        first, again, other = (sampler.sample(rows, 10, seed) for seed in (0, 0, 1))
        assert (
            first.shape == (3, 10)
            and np.array_equal(first, again)
            and not np.array_equal(first, other)
        )
        assert sampler.sample(None, 6, 0, count=5).shape == (5, 6)


@pytest.mark.parametrize("name", ROWS["rows"])
def test_every_ablation_row_is_a_model(name):
    row = ROWS["rows"][name]
    if "codec" not in row:
        config = load_train_config(row["preset"], row_overrides(row))
        model = build_model(config, train_tokenizer(["a"], 4096))
        model.set_stage("flow", **config.flow.objective)
        assert model.config.codec_config.model_type == "tokcom_color_codec"
        return
    codec = load_train_config("tiny", [*ROWS["codec_common"], *ROWS["codecs"][row["codec"]]])
    donor = preset_config("tiny", 4096, **codec.model)
    config = load_train_config("tiny", [*row_overrides(row), "codec_from=x"])
    derived = derived_config(config, donor)
    assert derived.codec_config.to_dict() == donor.codec_config.to_dict()
    with torch.device("meta"):
        TokComModel(derived).set_stage("flow", **config.flow.objective)
    window = derived.transformer_config.max_position_embeddings * derived.codec_config.chunk_size
    assert config.flow.sequence_length <= window
    recipe = load_train_config("tiny", [*row_overrides(ROWS["rows"]["recipe"]), "codec_from=x"])
    other_model = derived.to_dict() != derived_config(recipe, RECIPE).to_dict()
    assert other_model or config.flow != recipe.flow or name == "recipe"


def test_the_weights_of_a_peer_are_averaged_as_those_of_a_model_are(tokenizer, tmp_path):
    tokens = np.arange(400) % 50
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "sequence_length": 16, "batch_size": 2}
    raw, averaged = (
        autoregressive.train(
            tokens, tokenizer, tmp_path / str(share), **shape, max_steps=2, ema_half_life=share
        )
        for share in (0.0, 1.0)
    )
    torch.manual_seed(0)
    first = LlamaForCausalLM(raw.config)
    last = raw.lm_head.weight - first.lm_head.weight
    moved = averaged.lm_head.weight - first.lm_head.weight
    # behind the weights themselves, on their way
    assert 0 < moved.norm() < last.norm()
    found = LlamaForCausalLM.from_pretrained(tmp_path / "1.0")
    assert torch.equal(found.lm_head.weight, averaged.lm_head.weight)


def test_controls_have_the_statistics_their_names_say():
    train, held_out = np.arange(4000), np.arange(4000, 8000)
    study = Study(train, held_out, str, None, {}, chunk_size=4)
    controls = control_texts(study, 32, 10, seed=0)
    real = controls["real text"]
    assert (np.diff(real) == 1).all() and real.min() >= 4000
    assert np.array_equal(np.sort(controls["shuffled tokens"]), real)
    chunks = controls["random training chunks"].reshape(10, -1, 4)
    assert (np.diff(chunks) == 1).all() and chunks.max() < 4000
    assert (controls["repeated phrase"][:, 8:] == controls["repeated phrase"][:, :-8]).all()


class _LookupCodec:
    """A lossless codec of two tokens per chunk whose latents are the ids."""

    config = SimpleNamespace(chunk_size=2)

    def encode(self, ids):
        return SimpleNamespace(latents=ids.view(len(ids), -1, 2).float())

    def to_ids(self, latents):
        return latents.round().long().flatten(1)


def test_reconstruction_accuracy_counts_tokens_and_whole_chunks():
    batches = [torch.arange(4000).view(2, -1)]
    results = reconstruction_accuracy(_LookupCodec(), batches, seed=0)
    assert results["token_accuracy_noise_0.0"] == results["chunk_accuracy_noise_0.0"] == 1.0
    # an id survives noise of s standard deviations with probability P(|N(0, s)| < 0.5) = erf(0.5 /
    # (s sqrt 2))
    for level in NOISE_LEVELS[1:]:
        survives = math.erf(0.5 / level / math.sqrt(2))
        assert results[f"token_accuracy_noise_{level}"] == pytest.approx(survives, abs=0.03)
        assert results[f"chunk_accuracy_noise_{level}"] == pytest.approx(survives**2, abs=0.04)
    assert results["token_accuracy_shuffled_latents"] < 0.05


@pytest.mark.parametrize(
    ("peers", "message"),
    [
        (["folder"], "NAME=DIRECTORY"),
        (["=folder"], "NAME=DIRECTORY"),
        (["TokCom=a"], "'TokCom' is taken"),
        (["a=b", "a=c"], "'a' is taken"),
    ],
)
def test_a_peer_without_a_name_of_its_own_is_refused(peers, message):
    with pytest.raises(ValueError, match=message):
        read_peers(peers)
    assert read_peers(["a=b=c", "d=e"]) == {"a": "b=c", "d": "e"}


def test_judges_and_peers_of_another_tokenizer_are_refused(build, tmp_path):
    pipe = build()
    other = copy.deepcopy(pipe.tokenizer)
    other.add_tokens(["elsewhere"])
    other.save_pretrained(tmp_path / "judge")
    (tmp_path / "judge" / "config.json").write_text("{}")
    judge = SimpleNamespace(judge=[], output_dir=str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="judge has another tokenizer.*--output_dir"):
        load_judges(judge, pipe.tokenizer, np.zeros(0))
    options = dict.fromkeys(("steps", "guidance_scale", "noise_scale", "temperature", "top_p"))
    peer = SimpleNamespace(peer=[f"it={tmp_path / 'judge'}"], device="cpu", **options)
    with pytest.raises(ValueError, match="judge has another tokenizer"):
        load_systems(peer, pipe)


def test_a_judge_of_another_text_is_not_taken_up(build, tmp_path):
    tokenizer = build().tokenizer
    tokenizer.save_pretrained(tmp_path / "judge")
    (tmp_path / "judge" / "config.json").write_text("{}")
    (tmp_path / "judge" / "text.sha256").write_text("of another text")
    settings = SimpleNamespace(judge=[], output_dir=str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="or training text.*--output_dir"):
        load_judges(settings, tokenizer, np.zeros(4))


def test_a_text_beyond_the_positions_of_a_model_is_read_in_windows():
    model = llama()
    ids = WORDS.integers(0, 97, 20).tolist()
    whole = logits_of_text(model, ids)
    model.config.max_position_embeddings = 8
    parts = logits_of_text(model, ids)
    assert parts.shape == whole.shape
    torch.testing.assert_close(parts[:8], whole[:8])
    for start in range(8, 20, 4):
        window = model(torch.tensor([ids[start - 4 : start + 4]])).logits[0]
        torch.testing.assert_close(parts[start : start + 4], window[4:])


def test_sections_of_earlier_runs_are_kept_and_those_of_other_models_put_aside(tmp_path):
    file = tmp_path / "results.json"
    about = {"weights": "a", "data": "d", "seed": 0, "command": "new"}
    old = {"about": about | {"command": "old"}, "latency": {"ms": 1}}
    file.write_text(json.dumps(old))
    assert earlier_results(file, about) == {
        "latency": {"ms": 1},
        "earlier": {"latency": old["about"]},
    }
    assert earlier_results(file, about | {"weights": "b"}) == {}
    (aside,) = tmp_path.glob("results-*.json")
    assert json.loads(aside.read_text()) == old and not file.exists()


def test_files_of_predictions_may_be_patterns_and_hold_an_equals_sign(tmp_path):
    folder = tmp_path / "lr=1"
    folder.mkdir()
    for name in ("b-1.json", "b-2.json"):
        (folder / name).write_text(json.dumps([{"id": 0, "reference": "a", "prediction": "a"}]))
    assert "| b-1 | 1 |" in compare([str(folder / "b-1.json")])
    assert "| base | 2 |" in compare([f"base={folder}/b-*.json"])
    with pytest.raises(FileNotFoundError, match="nothing"):
        compare([f"base={folder}/nothing.json"])


def test_held_out_text_that_is_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="7 tokens, but a window has 8"):
        held_out_windows(np.arange(7), 8, 4)


def test_likelihoods_are_measured_within_the_window_of_the_model(build):
    pipe = build()
    sizes = []
    study = SimpleNamespace(windows=lambda length, count: sizes.append(length) or ids[:, :length])
    ids = WORDS.integers(0, 300, (2, 512))
    likelihood(study, {"TokCom": TokComSampler(pipe, 4)})
    assert sizes == [min(512, pipe.max_length)]


def test_rarest_ids_are_the_least_frequent():
    assert set(rarest_ids(np.repeat(np.arange(20), np.arange(20) + 1), 0.1)) == {0, 1}


@pytest.mark.slow
def test_command_writes_every_measure_beside_its_controls(build, tmp_path, capsys):
    pipe = build()
    pipe.save_pretrained(tmp_path / "model")
    peer = LlamaForCausalLM(
        llama_config(vocabulary_size(pipe.tokenizer), 64, 1, None, pipe.tokenizer.eos_token_id)
    )
    for name in ("judge", "peer"):
        peer.save_pretrained(tmp_path / name)
        pipe.tokenizer.save_pretrained(tmp_path / name)
    data = str(ROOT / "sample_data" / "stories_validation.jsonl")
    sizes = "--max_tokens 2048 --samples 8 --seeds 2 --length 16 --steps 2 --device cpu".split()
    judge = ["--judge", str(tmp_path / "judge"), "--peer", f"AR={tmp_path / 'peer'}"]
    arguments = [
        "--checkpoint",
        str(tmp_path / "model"),
        "--data",
        data,
        "--train_data",
        data,
        *sizes,
        *judge,
    ]
    call("evaluate", *arguments, "--output_dir", str(tmp_path / "out"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(SECTIONS) <= set(results)
    assert all(f"denoiser_ce_t_{t}" in results["reconstruction"] for t in TIMESTEPS)
    for section in ("unconditional", "continuation"):
        rows = results[section]
        assert (
            set(rows) == {*control_names(), "TokCom", "AR"}
            and "nll_std_over_seeds" in rows["TokCom"]
        )
        assert all(len(row["nll_by_place"]) == 4 for row in rows.values())
    assert (
        results["memorisation"]["real text"]["overlap_8"] == 1.0
    )  # here the held-out text is the training text
    printed = capsys.readouterr().out
    assert "| token_accuracy_noise_0.5 |" in printed and "| random training chunks |" in printed
    pictures = {"frontier.png", "ce_of_t.png", "accuracy_of_noise.png", "nll_by_place.png"}
    assert pictures <= {file.name for file in (tmp_path / "out").iterdir()}


def control_names() -> tuple[str, ...]:
    return ("real text", "shuffled tokens", "random training chunks", "repeated phrase")


def test_reference_metrics_of_perfect_partial_and_wrong_predictions(tmp_path, capsys):
    texts = ["the little rabbit lived in a big wood", "she was very fond of radishes and lettuce"]
    perfect = reference_metrics(texts, [[t] for t in texts])
    assert perfect["BLEU-4"] == pytest.approx(1) and perfect["ROUGE-L"] == pytest.approx(1)
    assert perfect["METEOR (no synonyms)"] > 0.99
    wrong = reference_metrics(["one two three four", "five six seven eight"], [[t] for t in texts])
    assert max(wrong.values()) < 0.05
    stems = reference_metrics(["rabbits living"], [["rabbit live"]])
    assert stems["METEOR (no synonyms)"] > 0.5 and stems["BLEU-4"] < 0.1
    either = reference_metrics(texts, [["nothing like it", texts[0]], [texts[1]]])
    assert either["BLEU-4"] == pytest.approx(1) and either["ROUGE-L"] == pytest.approx(1)
    with pytest.raises(ValueError, match="2 predictions"):
        reference_metrics(texts, [["one"]])
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"prediction": texts[0], "reference": texts[0]}) + "\n"
    )
    (tmp_path / "q.json").write_text(
        json.dumps([{"id": 0, "prediction": "A goat", "reference": "Two goats!"}])
    )
    call(
        "evaluate",
        f"one={tmp_path / 'p.jsonl'}",
        f"one={tmp_path / 'q.json'}",
        str(tmp_path / "q.json"),
    )
    one, other = (line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:4])
    assert one[:3] == ["| one", "2", "0.5000 ± 0.7071"] and other[:3] == ["| q", "1", "0.0000"]
    (tmp_path / "q.json").write_text(json.dumps([{"prediction": "A goat"}]))
    with pytest.raises(ValueError, match="record 0"):
        read_predictions(tmp_path / "q.json")


def test_exact_match_ignores_case_articles_and_punctuation():
    assert reference_metrics(["The goat!"], [["a goat"]])["exact match"] == 1
    assert reference_metrics(["goats"], [["a goat", "some goats"]])["exact match"] == 0


def test_guidance_zero_answers_without_the_question(build, tmp_path, capsys):
    build(transformer_config={"block_size": None}).save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"Who was {name}?", "answer": "a pig"} for name in ("Squinty", "Don")]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [
        "--guidance",
        "0",
        "2",
        "--gen_length",
        "8",
        "--steps",
        "2",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    answers_main(
        ["--checkpoint", str(tmp_path / "model"), "--data", str(tmp_path / "qa.jsonl"), *options]
    )
    assert "guidance 2" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "predictions_0.json").read_text())
    assert [row["reference"] for row in found] == ["a pig", "a pig"] and found[1][
        "prompt"
    ] == "Who was Don?"
    rows = [{**row, "prompt": row["prompt"].replace("Who", "How")} for row in rows]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers_main(
        ["--checkpoint", str(tmp_path / "model"), "--data", str(tmp_path / "qa.jsonl"), *options]
    )
    again = json.loads((tmp_path / "out" / "predictions_0.json").read_text())
    assert [row["prediction"] for row in found] == [row["prediction"] for row in again]


@pytest.mark.slow
def test_the_head_experiments_are_one_command(build, tmp_path, capsys):
    build().save_pretrained(tmp_path / "backbone")
    rows = [
        json.dumps(
            {"text": f"Squinty was a little pig, number {i}, who ran home to his pen again."}
        )
        for i in range(60)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:50]))
    (tmp_path / "held_out.jsonl").write_text("\n".join(rows[50:]))
    options = [
        "--checkpoint",
        str(tmp_path / "backbone"),
        "--train",
        str(tmp_path / "train.jsonl"),
        "--seeds",
        "0",
        "1",
    ]
    options += [
        "--max_steps",
        "1",
        "--samples",
        "3",
        "--words",
        "4",
        "--work_dir",
        str(tmp_path / "out"),
    ]
    heads_main([*options, "--validation", str(tmp_path / "held_out.jsonl")])
    printed = capsys.readouterr().out
    assert all(f"| {name} | 2 |" in printed for name in ["no head", *EXPERIMENTS])
    found = json.loads((tmp_path / "out" / "A+B-1" / "predictions.json").read_text())
    assert len(found) == 3 and found[0]["reference"] == "Squinty was a little"
    with pytest.raises(SystemExit, match="50 documents .* are training documents"):
        heads_main([*options, "--validation", str(tmp_path / "train.jsonl")])


def test_what_is_decoded_depends_on_latents_alone(build):
    pipe = build(latent_head="mlp", latent_refiner="mlp")
    noisy = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    texts = []
    for text in ("Squinty was a pig.", "Don was a dog"):
        pipe.encode(text)  # whatever the reference is
        with torch.no_grad():
            task = TokComTask(noisy, sigma_start=0.5)
            latents, _ = pipe.sample_latents(task, TokComSampling(2), decode=False)
            texts.append(pipe.decode(latents).texts)
    assert texts[0] == texts[1]


def test_rate_and_distortion_of_a_codec(build, tmp_path):
    model = build(codec_config={"quantizer": "vq", "num_codes": 64, "num_quantizers": 2}).model
    ids = torch.randint(0, 300, (1, 64))
    model.codec.train().training_loss(ids)
    facts = compression.measure(model.eval(), ids, tmp_path / "codes.png")
    assert (
        facts["bits per token"] == 3.0
        and facts["same from codes"]
        and (tmp_path / "codes.png").is_file()
    )
    assert 0 < facts["entropy, bits per token"] <= 3.0 and 0 <= facts["token accuracy"] <= 1
    plain, *packed = compression.lossless("the little pig " * 100, 300)
    assert plain["bits per token"] == 40.0 and all(row["bits per token"] < 5 for row in packed)


def test_costs_of_many_layers_follow_from_few():
    """Operations exactly; saved activations to 2 %, since some tensors share their storage."""
    from tokcom.evaluation.flops import training_flops_per_token
    from tokcom.evaluation.scaling import (
        COUNTED_WINDOWS,
        count,
        memory,
        parameters,
        saved_bytes,
    )

    shapes = [
        {
            "num_hidden_layers": 5,
            "num_context_layers": 3,
            "head_attention": False,
            "block_size": 1,
        },
        {"num_hidden_layers": 4, "block_size": 2},
    ]
    for transformer in shapes:
        config = tiny_config(transformer_config=transformer)
        objective = {"noise_draws": 3}
        found, model = count(config, 64, objective), TokComModel(config).train()
        model.set_stage("flow", **objective)
        torch.manual_seed(0)  # as `count` draws them
        ids = torch.randint(0, config.codec_config.vocab_size - 1, (COUNTED_WINDOWS, 64))
        assert found["flops"] == pytest.approx(training_flops_per_token(model, ids), rel=1e-9)
        assert found["saved"] == pytest.approx(saved_bytes(model, ids) / ids.numel(), rel=0.02)
        assert found == count(config, 64, objective)  # what is drawn does not differ between calls
        assert found["checkpointed"] < found["saved"]
        trained, frozen = parameters(config)
        assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert memory(trained, frozen, 0, 4, True, True) * 4 == memory(
            trained, frozen, 0, 4, False, True
        )


def test_rates_become_a_table_and_a_picture(tmp_path):
    rows = [
        {
            "row": "a",
            "K": 4,
            "bits per token": 2.5,
            "token accuracy": 0.3,
            "entropy, bits per token": 2.0,
            "steps": 1,
        }
    ]
    rows.append({"row": "none", "K": 4, "bits per token": None, "token accuracy": 0.9, "steps": 1})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = [
        "--table",
        str(tmp_path / "t.md"),
        "--picture",
        str(tmp_path / "t.png"),
        "--work_dir",
        str(tmp_path),
    ]
    compression.main(options)
    assert (
        "| a | 4 | 2.500 |" in (tmp_path / "t.md").read_text()
        and (tmp_path / "t.png").stat().st_size > 1000
    )
