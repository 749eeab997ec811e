"""Laws of the study of other ways of training."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tokcom.evaluation.studies.training_variants import DECAY, VARIANTS, cut_text
from tokcom.layers_tokcom import TokComMLP
from tokcom.training import stage


def trained(variant: str, steps: int = 4) -> nn.Module:
    """A small network after some updates, made as `training/stage.py` makes them."""
    torch.manual_seed(0)
    model = TokComMLP(8, 16)
    with VARIANTS[variant].training():
        optimizer = stage.build_optimizer(model, 1e-2, 1e-2, 0.0)
        schedule = stage.build_schedule(optimizer, 10, 2, 0.5)
        optimizer = Accelerator(cpu=True).prepare(optimizer)
        for _ in range(steps):
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model


def test_cautious_decay_shrinks_weights_and_only_those_that_shrink_anyway():
    plain = trained("recipe", steps=2)
    cautious = trained("cautious_decay", steps=2)
    # the first update has a rate of 0; in the second both differ by the decay alone
    start = trained("recipe", steps=1)
    rate = 5e-3
    for name, value in start.named_parameters():
        old = value.detach()
        new = dict(plain.named_parameters())[name].detach()
        shrinks = (new - old) * old < 0
        assert 0 < shrinks.sum() < shrinks.numel()
        found = dict(cautious.named_parameters())[name].detach()
        torch.testing.assert_close(found, new - rate * DECAY * old * shrinks)


def test_dropout_acts_in_training_alone():
    model = TokComMLP(8, 16)
    x = torch.randn(64, 8)
    with VARIANTS["dropout"].training():
        dropped = (model.train()(x) == 0).float().mean()
        assert 0.05 < dropped < 0.15
        kept = model.eval()(x)
    torch.testing.assert_close(kept, model(x))


def test_a_linear_cooldown_falls_as_a_line():
    with VARIANTS["linear_cooldown"].training():
        optimizer = torch.optim.SGD(TokComMLP(2, 2).parameters(), lr=1.0)
        schedule = stage.build_schedule(optimizer, 10, 2, 0.5)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[5:] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "soap"])
def test_every_variant_trains_and_ends_with_its_context(variant):
    before = stage.build_optimizer, stage.build_schedule, TokComMLP.forward
    model = trained(variant)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert before == (stage.build_optimizer, stage.build_schedule, TokComMLP.forward)


def test_text_is_cut_to_its_first_documents(tmp_path):
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "all.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", "c"]}), file)
    cut = pyarrow.parquet.read_table(cut_text(str(file), 2, tmp_path))
    assert cut.column("text").to_pylist() == ["a", "b"]
