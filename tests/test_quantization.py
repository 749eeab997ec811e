"""The laws of the quantisers: exact nearest codes, straight-through gradient, no dead codes, ids
<-> latents."""

import multiprocessing
import os

import pytest
import torch

from tokcom.quantization_tokcom import (
    FiniteScalarQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
    code_statistics,
    kmeans,
    nearest_codes,
)


def clusters(count: int = 256, per_cluster: int = 20, channels: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(count, 1, channels, generator=generator)
    return (centres + 0.1 * torch.randn(count, per_cluster, channels, generator=generator)).flatten(
        0, 1
    )


def quantizers() -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return [
        VectorQuantizer(64, 4),
        ResidualQuantizer(16, 4, 3),
        FiniteScalarQuantizer((5, 5, 4, 3)),
    ]


def test_nearest_codes_are_those_of_all_distances():
    vectors, codebook = torch.randn(9000, 8), torch.randn(100, 8)
    codes = nearest_codes(vectors, codebook)
    distances = (vectors[:, None].double() - codebook.double()).square().sum(-1)  # (9000, 100)
    found = distances.gather(1, codes[:, None])[:, 0]
    torch.testing.assert_close(found, distances.amin(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("quantizer", quantizers(), ids=lambda q: type(q).__name__)
def test_codes_give_the_quantised_latents_and_back(quantizer):
    latents = torch.randn(2, 30, 4)
    quantizer.train()(latents)
    output = quantizer.eval()(latents)
    assert output.codes.shape == (2, 30, 3 if isinstance(quantizer, ResidualQuantizer) else 1)
    torch.testing.assert_close(quantizer.decode(output.codes), output.latents)
    assert 0 <= output.codes.min() and output.codes.max() < quantizer.num_codes
    if isinstance(quantizer, VectorQuantizer):
        assert torch.equal(quantizer(output.latents).codes, output.codes)


@pytest.mark.parametrize("quantizer", quantizers()[:2], ids=lambda q: type(q).__name__)
def test_the_gradient_passes_straight_through(quantizer):
    latents = torch.randn(5, 4, requires_grad=True)
    weights = torch.randn(5, 4)
    (quantizer.eval()(latents).latents * weights).sum().backward()
    torch.testing.assert_close(latents.grad, weights)
    assert not list(quantizer.parameters())  # nothing for an optimizer


def test_scalar_levels_have_a_gradient_and_all_codes_exist():
    quantizer, latents = FiniteScalarQuantizer((3, 4)), torch.randn(4000, 2, requires_grad=True)
    output = quantizer(latents)
    output.latents.sum().backward()
    assert (latents.grad > 0).all()
    assert code_statistics(output.codes, quantizer.num_codes)["usage"] == 1.0
    every = torch.arange(12)[:, None]
    again = quantizer(torch.atanh(quantizer.decode(every).clamp(-0.999, 0.999))).codes
    assert torch.equal(again, every)


def test_clustered_data_uses_the_whole_codebook():
    data, quantizer = clusters(), VectorQuantizer(256, 8, decay=0.9, dead_threshold=0.25).train()
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        quantizer(data[torch.randperm(len(data), generator=generator)[:2048]])
    facts = code_statistics(quantizer.eval()(data).codes, 256)
    assert facts["usage"] >= 0.95 and facts["dead_codes"] <= 12
    assert quantizer.codebook.norm(dim=-1).max() < 2 * data.norm(dim=-1).max()


def test_statistics_of_known_codes():
    facts = code_statistics(torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), 8)
    assert facts == {"usage": 0.5, "entropy_bits": 2.0, "perplexity": 4.0, "dead_codes": 4}


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_kmeans_over_batches_finds_the_clusters(metric):
    data = clusters(32, 50)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    centres = kmeans(list(data[order].split(300)), 32, metric=metric)
    assert torch.isfinite(centres).all()
    vectors = torch.nn.functional.normalize(data, dim=-1) if metric == "cosine" else data
    error = (vectors - centres[nearest_codes(vectors, centres)]).norm(dim=-1)
    assert (
        error < 0.7 * (0.2 if metric == "cosine" else 1)
    ).float().mean() > 0.85  # Lloyd's algorithm may merge a few
    assert code_statistics(nearest_codes(vectors, centres), 32)["usage"] == 1.0


def test_kmeans_counts_weights_and_survives_empty_clusters():
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    mean = kmeans([points], 1, weights=[torch.tensor([1.0, 3.0])])
    torch.testing.assert_close(mean, torch.tensor([[0.75, 0.0]]))
    doubled = kmeans([torch.zeros(5, 2), torch.ones(1, 2)], 2)
    assert sorted(doubled[:, 0].tolist()) == [0.0, 1.0]
    with pytest.raises(ValueError, match="2 vectors"):
        kmeans([points], 3)


def _train_on_half(rank: int, port: int, results) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": "2",
    }
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(rank)
    quantizer = VectorQuantizer(32, 8, dead_threshold=0.25).train()
    for part in clusters(40, 40)[rank::2].split(200):
        quantizer(part)
    quantizer._update(clusters()[: 50 * rank])  # of which the first process has nothing
    quantizer._update(clusters()[:0])  # and here none
    results[rank] = quantizer.codebook.tolist()
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_same_codebook_even_if_one_has_no_inputs():
    from torch.distributed.elastic.utils.distributed import get_free_port

    context, port = multiprocessing.get_context("spawn"), get_free_port()
    with context.Manager() as manager:
        results = manager.dict()
        workers = [
            context.Process(target=_train_on_half, args=(rank, port, results)) for rank in range(2)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
        assert results[0] == results[1] and len(results) == 2
