"""Fine-tune the shipped model on your text with a LoRA adapter of PEFT: `pip install peft`.

    python examples/fine_tune_lora.py --train my_texts.jsonl --validation held_out.jsonl --output
    adapter

Prints the loss on held-out text before and after, the time, the memory and the size of the adapter,
then writes a text with the adapter merged into the model. Each line of the files is
`{"text": ...}`.
"""

import argparse
import resource
import time
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

ROOT = Path(__file__).resolve().parents[1]


def read(file: str, tokenizer, length: int):
    """The texts of a file as windows of at most `length` ids."""
    texts = load_dataset("json", data_files=file, split="train")

    def windows(rows: dict) -> dict:
        # `</s>` in a text is text
        ids = tokenizer(rows["text"], split_special_tokens=True)["input_ids"]
        return {
            "input_ids": [row[i : i + length] for row in ids for i in range(0, len(row), length)]
        }

    return texts.map(windows, batched=True, remove_columns=texts.column_names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT), help="model directory or Hub id")
    parser.add_argument("--train", required=True, help="JSON lines with a field `text`")
    parser.add_argument("--validation", required=True, help="the same, held out")
    parser.add_argument("--output", default="adapter", help="folder of the adapter")
    parser.add_argument("--max_steps", type=int, default=200, help="optimizer steps of 16 windows")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--prompt", default="Once upon a time", help="what the last text continues")
    args = parser.parse_args()

    # the model's own code, which is in its directory
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=args.rank)
    trainer = Trainer(
        get_peft_model(model, config),
        TrainingArguments(
            args.output,
            max_steps=args.max_steps,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=16,
            logging_steps=20,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=read(args.train, tokenizer, 256),
        eval_dataset=read(args.validation, tokenizer, 256),
        # pads windows and copies ids to labels
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    # an adapter begins as zero, so this is the loss of the model itself
    before = trainer.evaluate()["eval_loss"]
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    after = trainer.evaluate()["eval_loss"]
    trainer.model.save_pretrained(args.output)
    size = (Path(args.output) / "adapter_model.safetensors").stat().st_size / 1e6
    # ru_maxrss is in KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"held-out loss {before:.3f} -> {after:.3f} nats per token in {seconds:.0f} s")
    print(f"peak memory {peak:.1f} GB, adapter {size:.1f} MB")

    # adds the adapter's products to the matrices: no layer remains that costs time
    merged = trainer.model.merge_and_unload().eval()
    prompt = tokenizer(args.prompt, return_tensors="pt")
    print(tokenizer.decode(merged.generate(**prompt, max_new_tokens=80, seed=0)[0]))


if __name__ == "__main__":
    main()
