"""What `zoo/pixels` and `zoo/digits` are made of: their data, the measures of them, and that every
model of the zoo runs."""

import importlib.util
import io
import json
import random
import subprocess
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from helpers import ROOT
from PIL import Image

from tokcom.evaluation.parts import Parts
from tokcom.evaluation.slots import names_slot, slots_named
from tokcom.training.pipelines import load_pipeline

ZOO = sorted(path.parent for path in (ROOT / "zoo").glob("*/model_index.json"))
MAX_BYTES = 50 * 2**20  # of the whole repository


def script(name: str):
    """A script of `examples/data/` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "data" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(pipe) -> torch.Tensor:
    """Latents that a pipeline makes in the fewest steps."""
    options = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    if pipe.modality == "text":
        return pipe("name[Cotto]", gen_length=8, **options).latents
    if pipe.modality == "several":
        return pipe({"text": "the digit seven"}, num_inference_steps=1, **options).latents
    return pipe("red apple, rising", num_inference_steps=1, **options).latents


@pytest.mark.parametrize("directory", ZOO, ids=lambda path: path.name)
def test_every_model_of_the_zoo_loads_and_makes_something_finite(directory):
    pipe = load_pipeline(directory)
    pipe.set_progress_bar_config(disable=True)
    assert torch.isfinite(make(pipe)).all()


def test_the_repository_stays_small():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert sum(file.stat().st_size for file in files if file.is_file()) <= MAX_BYTES


# ---- data ----


def test_meanings_are_split_and_their_training_copies_say_the_same(tmp_path):
    names = ("Cotto", "The Mill", "Aromi", "Clowns")
    rows = [
        {
            "mr": f"name[{name}], area[{area}], near[The Bakers]",
            "ref": f"{name} is near The Bakers in the {area}.",
        }
        for name in names
        for area in ("riverside", "city centre")
    ]
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "dev.csv")
    options = ["--input", str(tmp_path / "dev.csv"), "--output_dir", str(tmp_path / "e2e")]
    script("e2e").main([*options, "--validation", "1", "--test", "2", "--copies", "6"])
    parts = {}
    for name in ("train", "validation", "test"):
        lines = (tmp_path / "e2e" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        parts[name] = [json.loads(line) for line in lines]
    assert len(parts["validation"]) == 1 and len(parts["test"]) == 2 and len(parts["train"]) > 5
    meanings = {
        name: {frozenset(script("e2e").slots_of(row["prompt"])) for row in rows}
        for name, rows in parts.items()
    }
    assert not (meanings["validation"] | meanings["test"]) & meanings["train"]
    prompts = [row["prompt"] for row in parts["train"]]
    assert slots_named(prompts, [row["answer"] for row in parts["train"]]) == 1
    assert any(prompt.startswith("near") for prompt in prompts)  # slots come in any order


def test_a_swapped_name_is_swapped_in_the_meaning_and_the_sentence_alike():
    e2e = script("e2e")
    names = {"name": ["The Mill", "Cotto"], "near": ["The Mill House", "The Bakers"]}
    slots = [("name", "The Mill"), ("near", "The Mill House")]
    made = set()
    for seed in range(8):
        rng = random.Random(seed)
        meaning, sentence = e2e.vary(slots, "The Mill by The Mill House", names, rng)
        found = dict(e2e.slots_of(meaning))
        assert sentence == f"{found['name']} by {found['near']}"
        made.add(sentence)
    assert len(made) > 1


def test_digits_are_joined_by_what_they_are_and_parts_share_nothing(tmp_path):
    for folder, column in (("pictures", "image"), ("sounds", "audio")):
        (tmp_path / folder).mkdir()
        for part, count in (("train", 100), ("test", 10)):
            rows = []
            for i in range(count):
                buffer = io.BytesIO()
                level = (i + (part == "test") * 100) / 200
                if column == "image":
                    Image.new("L", (32, 32), round(255 * level)).save(buffer, "PNG")
                else:
                    soundfile.write(buffer, np.full(800, level), 8000, format="FLAC")
                rows.append({column: {"bytes": buffer.getvalue(), "path": None}, "digit": i % 10})
            datasets.Dataset.from_list(rows).to_parquet(tmp_path / folder / f"{part}.parquet")
    options = ["--pictures", str(tmp_path / "pictures"), "--sounds", str(tmp_path / "sounds")]
    script("digits").main(
        [*options, "--output_dir", str(tmp_path / "out"), "--train", "200", "--test", "20"]
    )
    seen = {}
    for part in ("train", "validation", "test"):
        file = str(tmp_path / "out" / f"{part}.parquet")
        rows = datasets.Dataset.from_parquet(file, cache_dir=str(tmp_path / "cache"))
        rows = rows.cast_column("audio", datasets.Audio(decode=False))
        seen[part] = set()
        for row in rows:
            samples, _ = soundfile.read(io.BytesIO(row["audio"]["bytes"]))
            assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (28, 28)
            assert row["caption"] == f"the digit {script('digits').WORDS[row['digit']]}"
            seen[part].add(round(float(samples[0]) * 200))
        assert {level % 10 for level in seen[part]} == set(range(10))
    assert not seen["train"] & seen["validation"] and not seen["train"] & seen["test"]
    assert Path(tmp_path / "out" / "train.yaml").read_text().count("weight") == 4


# ---- evaluations ----


@pytest.mark.parametrize(
    ("slot", "value", "sentence", "is_named"),
    [
        ("near", "Café Sicilia", "It is near the CAFE Sicilia.", True),
        ("priceRange", "high", "It has a high customer rating.", False),
        ("priceRange", "high", "An expensive place.", True),
        ("customer rating", "low", "Its prices are low.", False),
        ("customer rating", "5 out of 5", "Customers gave it five stars.", True),
        ("customer rating", "1 out of 5", "It is rated 5 out of 5.", False),
        ("familyFriendly", "no", "It is not a place for families.", True),
        ("familyFriendly", "no", "It is family friendly.", False),
        ("familyFriendly", "yes", "Children are welcome.", True),
        ("familyFriendly", "yes", "It isn't family-friendly.", False),
        ("area", "city centre", "In the center of the city.", True),
        ("food", "English", "It serves British food.", True),
    ],
)
def test_a_slot_is_named_by_its_own_value_alone(slot, value, sentence, is_named):
    assert names_slot(slot, value, sentence) is is_named


def test_a_part_is_measured_once_for_the_same_settings(tmp_path):
    calls = []
    for settings in ({"seed": 0}, {"seed": 0}, {"seed": 1}):
        parts = Parts(tmp_path / "results.json", settings)
        assert parts.measure("one", lambda: calls.append(1) or len(calls)) >= 1
    assert len(calls) == 2
