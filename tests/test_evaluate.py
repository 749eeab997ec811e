import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import demo
from evaluate_tokcom import NOISE_LEVELS, TIMESTEPS, main, reconstruction_accuracy, unigram_entropy
from tests.conftest import ROOT


def test_unigram_entropy_of_uniform_tokens_is_log_v():
    assert unigram_entropy(np.arange(50)) == pytest.approx(math.log(50))
    assert unigram_entropy(np.zeros(50)) == 0.0


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
    # an id survives noise of s standard deviations with probability P(|N(0, s)| < 0.5) = erf(0.5 / (s sqrt 2))
    for level in NOISE_LEVELS[1:]:
        survives = math.erf(0.5 / level / math.sqrt(2))
        assert results[f"token_accuracy_noise_{level}"] == pytest.approx(survives, abs=0.03)
        assert results[f"chunk_accuracy_noise_{level}"] == pytest.approx(survives**2, abs=0.04)
    assert results["token_accuracy_shuffled_latents"] < 0.05


def test_command_writes_every_measure(build, tmp_path, capsys):
    build().save_pretrained(tmp_path / "model")
    data = str(ROOT / "sample_data" / "stories_validation.jsonl")
    arguments = ["--checkpoint", str(tmp_path / "model"), "--data", data, "--max_tokens", "2048", "--device", "cpu"]
    main([*arguments, "--output_file", str(tmp_path / "results.json")])
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(f"denoiser_ce_t_{t}" in results for t in TIMESTEPS)
    assert results["tokens"] == 2048 and 0 < results["unigram_entropy"] < math.log(321)
    assert "| token_accuracy_noise_0.5 |" in capsys.readouterr().out


def test_demo_shows_every_mode_of_the_shipped_model(capsys):
    demo.main()
    printed = capsys.readouterr().out
    modes = ("conditional", "generate", "reconstruct", "denoise_reconstruct", "encode", "infill")
    assert all(f"\n{mode} " in printed for mode in modes)
    assert "The family of four was " in printed
    assert demo.TEXT in printed.split("\nreconstruct ")[1].split("\n")[0]  # the shipped codec is exact on it
