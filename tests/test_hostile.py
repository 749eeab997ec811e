"""Data, configurations and inputs that are broken or hostile are refused by name."""

import json
import re
import time

import numpy as np
import pytest
import torch
from helpers import ROOT, seeded
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_training import quick

from tokcom.configuration_codec_tokcom import TokComChunkCodecConfig
from tokcom.configuration_tokcom import TokComConfig, TokComTransformerConfig
from tokcom.modeling_tokcom import TokComModel
from tokcom.processing_tokcom import vocabulary_size
from tokcom.train_accelerate import run
from tokcom.training.data import read_patiently
from tokcom.training.presets import preset_config, preset_names

TEXT = ROOT / "sample_data" / "stories_validation.jsonl"


# ---- data ----


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "broken', r"record 3 \(line 4\) is no JSON"),
        (b"\xff\xfe\x00", r"record 3 \(line 4\): byte 0"),
        (b'{"text": 7}', "record 3|has no text"),
        (b'{"text": null}', "record 3|has no text"),
        (b"[1, 2]", r"record 3 \(line 4\) is the list"),
    ],
)
def test_corrupt_records_are_named(tmp_path, line, message):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        run(quick(tmp_path, f"data.train={file}"))


class Flaky:
    """A stream that fails before record `at`, `times` times."""

    def __init__(self, at: int, times: int, error: Exception):
        self.at, self.left, self.error = at, times, error

    def __iter__(self):
        for index in range(6):
            if index == self.at and self.left:
                self.left -= 1
                raise self.error
            yield {"text": str(index)}


def test_a_failing_source_is_opened_again_where_it_failed_and_named():
    with pytest.warns(UserWarning, match="shard-7 failed at record 3 .*again in 0.001 s"):
        read = list(read_patiently(Flaky(3, 4, OSError("reset")), "shard-7", wait=0.001))
    assert [row["text"] for row in read] == list("012345")
    with (
        pytest.warns(UserWarning),
        pytest.raises(ConnectionError, match="shard-7 failed 6 times in a row at record 3"),
    ):
        list(read_patiently(Flaky(3, 9, OSError("reset")), "shard-7", wait=0.001))
    with pytest.raises(ValueError, match="shard-7: record 2 cannot be read"):
        list(read_patiently(Flaky(2, 1, ValueError("bad json")), "shard-7"))


def test_a_slow_source_is_named(monkeypatch):
    monkeypatch.setattr("tokcom.training.data.SLOW", 0.01)

    def slow():
        for index in range(2):
            time.sleep(0.05 * index)
            yield {"text": str(index)}

    with pytest.warns(UserWarning, match="shard-7 took .* for record 1"):
        assert len(list(read_patiently(slow(), "shard-7"))) == 2


def test_processes_and_workers_read_disjoint_parts_of_a_stream(tmp_path, tokenizer):
    from datasets import load_dataset

    from tokcom.training.data import StreamingPackedDataset, WindowShape

    files = []
    for part in range(3):
        lines = [
            json.dumps({"text": f"<{part}-{i}> " + "word " * (10 + 40 * part)}) for i in range(20)
        ]
        files.append(tmp_path / f"{part}.jsonl")
        files[-1].write_text("\n".join(lines))
    stream = load_dataset("json", data_files=[str(f) for f in files], split="train", streaming=True)
    shape = "text", WindowShape(32, 4, pads_left=True), 0, 10, "stream"
    parts = []
    for rank in range(2):
        data = StreamingPackedDataset(stream, tokenizer, *shape, rank, 2)
        loader = torch.utils.data.DataLoader(data, None, num_workers=2)
        parts.append([tokenizer.decode(item["input_ids"]) for item in loader])
    whole = [
        tokenizer.decode(item["input_ids"])
        for item in StreamingPackedDataset(stream, tokenizer, *shape)
    ]
    found = [set(re.findall(r"<\d-\d+>", " ".join(p))) for p in parts]
    assert found[0] and found[1] and not found[0] & found[1]
    assert len(whole) >= len(parts[0]) + len(parts[1]) >= 0.8 * len(whole)


# ---- hostile configurations and inputs ----

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 9),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=8),
    st.lists(st.integers(-3, 3), max_size=3),
    st.sampled_from(
        [
            "tokens",
            "latents",
            "vq",
            "fsq",
            "mlp",
            "none",
            "token",
            "chunk",
            "attention",
            "head",
            "bits",
        ]
    ),
)
FIELDS = {
    "codec_config": sorted(TokComChunkCodecConfig.__annotations__),
    "transformer_config": sorted(TokComTransformerConfig.__annotations__),
    "": sorted(set(TokComConfig.__annotations__) - {"codec_config", "transformer_config"}),
}
OVERRIDE = st.sampled_from(sorted(FIELDS)).flatmap(
    lambda part: st.tuples(st.just(part), st.sampled_from(FIELDS[part]), VALUES)
)
REFUSALS = (ValueError, TypeError, StrictDataclassError)


@pytest.mark.slow
@settings(
    max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(st.sampled_from(sorted(preset_names())), st.lists(OVERRIDE, min_size=1, max_size=4))
def test_a_thousand_random_configurations_are_built_or_refused_before_anything_is_allocated(
    preset, overrides
):
    fields: dict = {}
    for part, name, value in overrides:
        (fields.setdefault(part, {}) if part else fields)[name] = value
    try:
        config = preset_config(preset, **fields)
    except REFUSALS as error:
        assert str(error)
        return
    again = TokComConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict() or "nan" in str(config.to_dict()).lower()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"transformer_config": {"hidden_size": 2**40}}, "`hidden_size` .* must be at most"),
        ({"transformer_config": {"num_hidden_layers": 10**9}}, "parameters"),
        ({"codec_config": {"vocab_size": 10**15}}, "`vocab_size` .* must be at most"),
        ({"codec_config": {"embedding_size": 2**50}}, "`embedding_size` .* must be at most"),
        (
            {"codec_config": {"quantizer": "vq", "num_codes": 10**14}},
            "`num_codes` .* between 0 and",
        ),
        (
            {
                "token_embedding_size": 10**14,
                "prediction_type": "tokens",
                "codec_config": {"encoder_type": "token"},
            },
            "`token_embedding_size` .* must be at most",
        ),
        (
            {"latent_head": "vq", "latent_head_codes": 10**14},
            "`latent_head_codes` .* must be at most",
        ),
    ],
)
def test_a_petabyte_is_refused(fields, said):
    with pytest.raises(REFUSALS, match=said):
        preset_config("debug", **fields)


TEXTS = st.text(st.characters(codec=None, exclude_categories=[]), max_size=60)
ANYTHING = st.one_of(
    TEXTS, st.none(), st.integers(), st.lists(TEXTS, max_size=2), st.binary(max_size=4)
)


@pytest.fixture(scope="module")
def small_pipe(tokenizer):
    from helpers import tiny_config

    from tokcom.pipeline_tokcom import TokComPipeline
    from tokcom.scheduling_tokcom import TokComFlowMatchScheduler

    torch.manual_seed(0)
    model = TokComModel(
        tiny_config(vocabulary_size(tokenizer), transformer_config={"num_hidden_layers": 1})
    ).eval()
    pipe = TokComPipeline(
        model, TokComFlowMatchScheduler.from_model_config(model.config), tokenizer
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALLS = st.sampled_from(["call", "stream", "infill", "encode", "reconstruct", "renoise"])
NUMBERS = st.one_of(st.integers(-3, 12), st.floats(allow_nan=True, allow_infinity=True, width=16))


@settings(
    max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(CALLS, ANYTHING, NUMBERS)
def test_a_thousand_random_prompts_give_text_or_an_explanation(small_pipe, call, text, number):
    length = int(number) if np.isfinite(number) and abs(number) < 20 else 4
    options = {"num_inference_steps": 1, "generator": seeded()}
    methods = {
        "call": lambda: small_pipe(text, gen_length=length, **options),
        "stream": lambda: list(small_pipe.stream(text, gen_length=length, **options)),
        "infill": lambda: small_pipe.infill(f"{text}____", gap_length=length, **options),
        "encode": lambda: small_pipe.encode(text),
        "reconstruct": lambda: small_pipe.reconstruct(text),
        "renoise": lambda: small_pipe.denoise_reconstruct(text, number, **options),
    }
    try:
        assert methods[call]() is not None
    except ValueError as error:
        assert str(error)
