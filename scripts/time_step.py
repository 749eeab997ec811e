"""Time training steps of a text preset in two checkouts, on one thread, and print the ratio.

    git worktree add ../before v0.1
    python scripts/time_step.py ../before . --new_options attention=eager

Steps are those of the flow stage at real size: forward, backward and optimizer on random ids, in
bfloat16 where the processor is fast at it, with the objective of the tree's own training preset.
Each round starts a process in each tree. The ratio is that of the medians of all steps.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from compare_trees import run

STEPS = """
import json, sys, time, torch
try:
    from tokcom.configuration_tokcom import TokComConfig
    from tokcom.modeling_tokcom import TokComModel
    from tokcom.training.optimizer import build_optimizer
    from tokcom.training.precision import half_precision
except ImportError:
    from configuration_tokcom import TokComConfig
    from modeling_tokcom import TokComModel
    from training.optimizer import build_optimizer
    from training.precision import half_precision
try:
    from tokcom.training.presets import preset_config
except ImportError:  # before version 0.2.1 presets were in the configuration
    preset_config = TokComConfig.from_preset
try:
    from tokcom.training.config import load_train_config
    objective = load_train_config({preset!r}, []).flow.objective
except (ImportError, AttributeError):  # then the model's configuration has all of it
    objective = {{}}
torch.set_num_threads(1)
options = json.loads({options!r})
torch.manual_seed(0)
model = TokComModel(preset_config({preset!r}, 4096, **options.get("model", {{}})))
model.set_stage("flow", **{{**objective, **options.get("objective", {{}})}})
model.train()
if "attention" in options:
    model.set_attn_implementation(options["attention"])
if options.get("compile"):
    for part in model.objective.compilable_parts(model):
        part.compile()
optimizer = build_optimizer(model, 3e-3, 1.2e-2, 0.01)
ids = torch.randint(0, 4096, ({rows}, {length}))
seconds = []
for step in range({steps} + 2):
    torch.manual_seed(step)
    began = time.perf_counter()
    with half_precision("cpu"):
        loss = model(input_ids=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    seconds.append(time.perf_counter() - began)
print(json.dumps({{"seconds": seconds[2:], "loss": loss.item()}}))
"""


def parse_options(pairs: list[str]) -> dict:
    """`attention=eager objective.turn_share=1.0` as nested options."""
    options: dict = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            # numbers and truth values; what is no JSON is a word such as the name of an attention
            value = json.loads(value)
        except json.JSONDecodeError:
            pass
        target = options
        *parents, leaf = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[leaf] = value
    return options


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, help="checkout of the earlier commit")
    parser.add_argument("new", type=Path, help="checkout to compare with it")
    parser.add_argument("--preset", default="tiny", help="model preset (default: %(default)s)")
    parser.add_argument(
        "--rows", type=int, default=16, help="rows of a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--length", type=int, default=512, help="tokens of a row (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=5, help="timed steps per round (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--old_options",
        nargs="*",
        default=[],
        help="attention=NAME, compile=true, model.FIELD=VALUE, objective.FIELD=VALUE in the old tree",
    )
    parser.add_argument("--new_options", nargs="*", default=[], help="the same in the new tree")
    args = parser.parse_args()
    trees = {
        "old": (args.old.resolve(), args.old_options),
        "new": (args.new.resolve(), args.new_options),
    }
    seconds: dict[str, list[float]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory() as links:
        # trees take turns, so that a machine that slows down does not slow one alone
        for _ in range(args.rounds):
            for name, (tree, options) in trees.items():
                shape = {
                    "preset": args.preset,
                    "rows": args.rows,
                    "length": args.length,
                    "steps": args.steps,
                }
                code = STEPS.format(options=json.dumps(parse_options(options)), **shape)
                # lines before it may be warnings
                last_line = run(code, tree, Path(links)).splitlines()[-1]
                seconds[name] += json.loads(last_line)["seconds"]
    # other work only ever slows a step down, and a median ignores the slowest
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name}: {median:.3f} s, {args.rows * args.length / median:,.0f} tokens/s")
    print(f"ratio: {medians['old'] / medians['new']:.2f}")


if __name__ == "__main__":
    main()
