"""Other people's tools on the shipped model, each in a fresh process, as remote code without the package installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from tokcom.modeling_causal_tokcom import TokComForCausalLM

pytestmark = pytest.mark.slow

# the package that is installed in place must not help
ALONE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path = [path for path in sys.path if path != {root!r}]
try:
    import tokcom
except ImportError:
    pass
else:
    sys.exit("the package tokcom is importable")
"""
PREPARE = """
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments
model = AutoModelForCausalLM.from_pretrained({model!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({model!r}, trust_remote_code=True)
data = load_dataset("json", data_files={data!r}, split="train").select(range(24))
"""
TRAIN = """
tokens = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=64), remove_columns=["text"])
settings = TrainingArguments(
    "out", max_steps=6, eval_steps=3, save_steps=3, eval_strategy="steps", load_best_model_at_end=True,
    learning_rate=1e-3, report_to=[], use_cpu=True, per_device_train_batch_size=8, logging_steps=1,
)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
def train(model):
    trainer = Trainer(model, settings, train_dataset=tokens, eval_dataset=tokens, data_collator=collator)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before - 0.05, (before, after)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """The shipped model as a user downloads it."""
    directory = tmp_path_factory.mktemp("hub") / "stories"
    TokComForCausalLM.from_pretrained(ROOT).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (directory / name).write_bytes((ROOT / name).read_bytes())
    return directory


@pytest.fixture
def alone(repository, tmp_path):
    """Run code in a fresh process in an empty folder; returns what it prints."""

    def run(code: str) -> str:
        names = {
            "root": str(ROOT),
            "model": str(repository),
            "data": str(ROOT / "sample_data/stories_train.jsonl"),
        }
        code = (ALONE + code).replace("{root!r}", repr(names["root"]))
        code = code.replace("{model!r}", repr(names["model"])).replace(
            "{data!r}", repr(names["data"])
        )
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def test_the_call_that_the_hub_prints_writes_a_text(alone):
    text = alone("""
from transformers import pipeline
writer = pipeline("text-generation", model={model!r}, trust_remote_code=True)
print(writer("Once upon a time", max_new_tokens=20)[0]["generated_text"])
""")
    assert text.startswith("Once upon a time") and len(text) > 50


def test_the_trainer_of_transformers_trains_evaluates_and_keeps_the_best(alone):
    alone(PREPARE + TRAIN + "train(model)")


def test_a_lora_adapter_is_trained_saved_merged_and_writes(alone):
    pytest.importorskip("peft")
    text = alone(
        PREPARE
        + TRAIN
        + """
from peft import LoraConfig, PeftModel, get_peft_model
adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8))
train(adapted)
adapted.save_pretrained("adapter")
again = AutoModelForCausalLM.from_pretrained({model!r}, trust_remote_code=True)
merged = PeftModel.from_pretrained(again, "adapter").merge_and_unload()
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(merged.generate(**prompt, max_new_tokens=10)[0]))
"""
    )
    assert text.splitlines()[-1].startswith("Once upon a time")


def test_the_sft_trainer_of_trl_trains(alone):
    pytest.importorskip("trl")
    alone(
        PREPARE
        + """
from trl import SFTConfig, SFTTrainer
settings = SFTConfig("out", max_steps=3, max_length=64, report_to=[], use_cpu=True, per_device_train_batch_size=4)
trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer)
loss = trainer.train().training_loss
assert loss == loss
"""
    )


def test_the_evaluation_harness_scores_choices_and_perplexity(repository, tmp_path):
    pytest.importorskip("lm_eval")
    rows = [
        ("Once upon a time, there was a little girl named", [" Lily.", " table."]),
        ("The dog was happy. He wagged his", [" tail.", " sky."]),
        ("She was sad and started to", [" cry.", " spoon."]),
    ]
    lines = [json.dumps({"text": text, "choices": choices, "answer": 0}) for text, choices in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{validation: {tmp_path / 'rows.jsonl'}}}}}\n"
    common += "validation_split: validation\ndoc_to_text: '{{text}}'\n"
    (tmp_path / "choice.yaml").write_text(
        "task: choice\noutput_type: multiple_choice\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
        + common
        + "metric_list: [{metric: acc}]\n"
    )
    (tmp_path / "perplexity.yaml").write_text(
        "task: perplexity\noutput_type: loglikelihood_rolling\ndoc_to_target: '{{text}}'\n"
        + common.replace("'{{text}}'", "''")
        + "metric_list: [{metric: bits_per_byte}]\n"
    )
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--device",
        "cpu",
        "--output_path",
        "results.json",
    ]
    command += ["--model_args", f"pretrained={repository},trust_remote_code=True,dtype=float32"]
    command += ["--tasks", "choice,perplexity", "--include_path", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next(tmp_path.glob("results*.json")).read_text())["results"]
    assert results["choice"]["acc,none"] == 1.0
    assert 0 < results["perplexity"]["bits_per_byte,none"] < 5
