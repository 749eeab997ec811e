"""Nothing wrong is loaded in silence: damaged files, weights that do not fit, numbers that mean
nothing."""

import json
import sys

import pytest
import torch
from helpers import ROOT, build_model, tiny_pipeline
from safetensors.torch import load_file, save_file

from tokcom.cli.errors import report_errors
from tokcom.integrity_tokcom import CHECKSUMS, check_checksums, released_files, write_checksums
from tokcom.modeling_tokcom import TokComModel
from tokcom.training.pipelines import load_pipeline
from tokcom.training.stopping import TrainingError

sys.path.insert(0, str(ROOT / "tests" / "harness"))
import mutations


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "models"
    mutations.save_models(path)
    return path


def run(saved, work, picked) -> list[tuple[str, str, str]]:
    """The mutations that were not refused in one clear sentence, or that a hash does not see."""
    found = [(m.name, *mutations.outcome(m, saved, work)) for m in picked]
    return [entry for entry in found if entry[1] not in ("clear", "hash")]


def test_a_spoiled_model_is_refused_in_one_sentence_that_names_what_is_wrong(saved, tmp_path):
    assert run(saved, tmp_path, mutations.chosen(saved, 360)[::12]) == []


@pytest.mark.slow
def test_three_hundred_and_sixty_spoiled_models_are_refused(saved, tmp_path):
    picked = mutations.chosen(saved, 360)
    assert len(picked) == 360
    assert run(saved, tmp_path, picked) == []


def test_the_released_model_is_the_one_its_checksums_say():
    """After a change on purpose: tokcom verify . --write."""
    assert check_checksums(ROOT) == len(released_files(ROOT))
    names = json.loads((ROOT / CHECKSUMS).read_text())
    assert "model.safetensors" in names and "modeling_tokcom.py" not in names


def test_verify_refuses_a_model_whose_numbers_are_merely_others(tmp_path):
    tiny_pipeline("video").save_pretrained(tmp_path)
    load_pipeline(tmp_path, verify=True)
    tensors = load_file(tmp_path / "model.safetensors")
    next(iter(tensors.values())).add_(0.01)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_pipeline(tmp_path)
    for load in (load_pipeline, TokComModel.from_pretrained):
        with pytest.raises(ValueError, match="not the released file: model.safetensors"):
            load(tmp_path, verify=True)
    write_checksums(tmp_path)
    load_pipeline(tmp_path, verify=True)


def test_verify_needs_checksums_and_every_way_of_saving_writes_them(tmp_path):
    build_model().save_pretrained(tmp_path)
    TokComModel.from_pretrained(tmp_path, verify=True)
    (tmp_path / CHECKSUMS).unlink()
    with pytest.raises(FileNotFoundError, match="--write"):
        TokComModel.from_pretrained(tmp_path, verify=True)


def test_files_that_are_no_part_of_a_model_may_lie_beside_it(tmp_path):
    tiny_pipeline("video").save_pretrained(tmp_path)
    (tmp_path / "predictions.json").write_text("[1, 2]")
    load_pipeline(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="config.json must hold an object"):
        load_pipeline(tmp_path)


def test_predictions_that_are_not_finite_end_sampling_instead_of_becoming_text():
    from tokcom.training.pipelines import build_pipeline

    model = build_model()
    pipe = build_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        model.transformer.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="became NaN or infinite"):
        pipe.generate(4)
    media = tiny_pipeline("image")
    with torch.no_grad():
        media.model.transformer.norm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="became NaN or infinite"):
        media()


def test_every_entry_point_ends_in_one_sentence_and_shows_tracebacks_when_asked():
    @report_errors()
    def inner():
        raise TrainingError("the disk is full; free some space.")

    with pytest.raises(SystemExit, match="^error: the disk is full; free some space.$"):
        inner()
    with pytest.raises(TrainingError), report_errors(debug=True):
        inner()
    with pytest.raises(SystemExit):
        inner()


def test_the_files_of_a_pipeline_hash_the_code_that_runs_it(saved):
    names = json.loads((saved / "turns" / CHECKSUMS).read_text())
    assert {"modeling_tokcom.py", "config.json", "tokenizer.json"} <= set(names)
    assert check_checksums(saved / "turns") == len(names)
