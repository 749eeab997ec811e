"""Other people's tools on the shipped model, each in a fresh process, as remote code without the
package installed."""

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


GENERATE = """
import contextlib, io, threading
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers import TextDiffusionStreamer, TextIteratorStreamer, TextStreamer
config = AutoConfig.from_pretrained({model!r}, trust_remote_code=True)
assert (config.vocab_size, config.max_position_embeddings) == (4097, 512)
assert config.hidden_size and config.num_hidden_layers
tokenizer = AutoTokenizer.from_pretrained({model!r}, trust_remote_code=True)
assert tokenizer.pad_token == "<pad>" and tokenizer.pad_token_id == 4096
model = AutoModelForCausalLM.from_pretrained({model!r}, trust_remote_code=True)
prompt = tokenizer("Once upon a time", return_tensors="pt")
size = prompt.input_ids.shape[1]
def generate(**options):
    return model.generate(**{**prompt, "max_new_tokens": 12, "seed": 0, **options})
greedy = generate(do_sample=False)
def is_greedy(**options):
    return torch.equal(greedy, generate(**options))
"""
ARGUMENTS = {
    "max_new_tokens": "generate(max_new_tokens=7).shape[1] == size + 7",
    "max_length": "model.generate(**prompt, max_length=20, seed=0).shape[1] == 20",
    "do_sample": "is_greedy(do_sample=False, seed=5)",
    "temperature": "is_greedy(do_sample=True, temperature=0) and is_greedy(temperature=0.0)",
    "top_k": "is_greedy(do_sample=True, top_k=1)",
    "top_p": "is_greedy(do_sample=True, top_p=1e-6)",
    "num_return_sequences": "len({tuple(row) for row in generate(num_return_sequences=3).tolist()}) == 3",
    "seed": "torch.equal(generate(seed=3), generate(seed=3)) and not is_greedy(seed=4)",
    "use_cache": "is_greedy(do_sample=False, use_cache=False)",
    "num_beams": "generate(num_beams=3).shape[1] == size + 12",
    "penalties": "not is_greedy(do_sample=False, repetition_penalty=3.0, no_repeat_ngram_size=2)",
    "eos_token_id": "generate(do_sample=False, eos_token_id=int(greedy[0, size + 4])).shape[1] <= size + 5",
}
REFUSED = {
    "assistant_model": "model",
    "prompt_lookup_num_tokens": "3",
    "penalty_alpha": "0.6",
    "num_beam_groups": "2",
    "force_words_ids": "[[5]]",
    "guidance_scale": "1.5",
    "cache_implementation": "'static'",
    "prefill_chunk_size": "2",
    "token_healing": "True",
    "output_attentions": "True",
    "inputs_embeds": "torch.zeros(1, 2, 8)",
    "gen_length": "3",
}


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


def test_generate_takes_every_argument_that_tools_pass_on_a_copy(alone):
    checks = [f"assert {code}, {name!r}" for name, code in ARGUMENTS.items()]
    alone(
        GENERATE
        + "\n".join(checks)
        + """
ends = generate(do_sample=False, max_new_tokens=60, stop_strings=["."], tokenizer=tokenizer)
assert tokenizer.decode(ends[0]).endswith(".")
class Stop(StoppingCriteria):
    def __call__(self, ids, scores, **kwargs):
        return torch.full((len(ids),), ids.shape[1] >= size + 5)
assert generate(stopping_criteria=StoppingCriteriaList([Stop()])).shape[1] == size + 5
several = tokenizer(
    ["Once upon a time", "The dog"], return_tensors="pt", padding=True, padding_side="left"
)
eos = int(greedy[0, size + 3])
rows = model.generate(
    **several, max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=4096
)
assert rows[0].tolist()[:size + 4] == greedy[0, :size + 4].tolist()
assert set(rows[0, size + 4:].tolist()) <= {4096}
"""
    )


def test_streamers_show_the_text_and_its_drafts_on_a_copy(alone):
    alone(
        GENERATE
        + """
shown = io.StringIO()
with contextlib.redirect_stdout(shown):
    generate(do_sample=False, streamer=TextStreamer(tokenizer))
assert shown.getvalue().strip() == tokenizer.decode(greedy[0]).strip()
drafts = io.StringIO()
with contextlib.redirect_stdout(drafts):
    generate(do_sample=False, streamer=TextDiffusionStreamer(tokenizer))
assert "\\033[33m" in drafts.getvalue()
pieces = TextIteratorStreamer(tokenizer, skip_prompt=True)
thread = threading.Thread(target=lambda: generate(do_sample=False, streamer=pieces))
thread.start()
assert "".join(pieces).strip() == tokenizer.decode(greedy[0, size:]).strip()
thread.join()
"""
    )


def test_what_generate_cannot_do_is_refused_by_name_on_a_copy(alone):
    calls = [f"({name!r}, lambda: generate({name}={value}))" for name, value in REFUSED.items()]
    alone(
        GENERATE
        + f"calls = [{', '.join(calls)}]"
        + """
calls.append(("max_new_tokens", lambda: generate(max_new_tokens=1000)))
calls.append(("resized", lambda: model.resize_token_embeddings(5000)))
for name, call in calls:
    try:
        call()
    except ValueError as error:
        assert name in str(error), (name, str(error))
    else:
        raise AssertionError(name)
assert model.get_input_embeddings().weight.shape[0] == 4097
"""
    )


def test_the_pipeline_of_transformers_takes_device_map_dtype_and_several_texts(alone):
    alone("""
import torch
from transformers import AutoModelForCausalLM, pipeline
writer = pipeline(
    "text-generation", model={model!r}, trust_remote_code=True, device_map="auto", dtype="bfloat16"
)
assert writer.model.dtype == torch.bfloat16
texts = writer(["Once", "The dog"], batch_size=2, max_new_tokens=4, return_full_text=False)
assert len(texts) == 2 and all(row[0]["generated_text"] for row in texts)
model = AutoModelForCausalLM.from_pretrained(
    {model!r}, trust_remote_code=True, device_map="cpu", dtype=torch.float16
)
assert model.dtype == torch.float16
""")


def test_the_trainer_of_transformers_trains_evaluates_and_keeps_the_best(alone):
    alone(PREPARE + TRAIN + "train(model)")


def test_a_plain_loop_trains(alone):
    alone(
        PREPARE
        + """
import torch
rows = [tokenizer(row["text"], truncation=True, max_length=61)["input_ids"] for row in data]
batch = tokenizer.pad({"input_ids": rows[:8]}, return_tensors="pt")
labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
losses = []
for _ in range(5):
    loss = model(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0] - 0.1, losses
"""
    )


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
        "task: choice\noutput_type: multiple_choice\ndoc_to_choice: '{{choices}}'\ndoc_to_target: "
        "'{{answer}}'\n" + common + "metric_list: [{metric: acc}]\n"
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
