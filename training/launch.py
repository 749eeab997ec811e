"""The processes of a run, and where they would run past each other."""

import os
from datetime import timedelta

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    parse_flag_from_env,
)

from tokcom.training.config import LoopConfig, TrainConfig
from tokcom.training.precision import resolve_precision
from tokcom.training.stopping import TrainingError

# One process reads, tokenizes and caches the data while the others wait, longer than the ten
# minutes of torch's default.
PATIENCE = timedelta(hours=12)


def start_processes() -> PartialState:
    """Find the other processes of this launch; raises `TrainingError` if they do not find each
    other."""
    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=use_cpu, timeout=PATIENCE)
    # what the launcher has promised
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != state.num_processes:
        raise TrainingError(
            f"{world} processes were launched but accelerate formed a group of "
            f"{state.num_processes}, so they would overwrite "
            "each other; on CPU set ACCELERATE_USE_CPU=true (accelerate_configs/cpu_2proc.yaml)."
        )
    return state


def build_accelerator(
    config: TrainConfig, options: LoopConfig, directory: str, handlers: list
) -> Accelerator:
    """The accelerator of one stage, whose checkpoints and logs go to `directory`."""
    # it keeps the precision of the first accelerator of a process, but each run has its own
    AcceleratorState._reset_state()
    # and under FSDP an accelerator renames the launch that the next one has to recognise
    processes = PartialState()
    processes.distributed_type = vars(processes).setdefault(
        "launched_as", processes.distributed_type
    )
    return Accelerator(
        mixed_precision=resolve_precision(config.mixed_precision, processes.device.type),
        # windows left over at the end of an epoch count towards the next step, so a step has one
        # size
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=options.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(directory, logging_dir=f"{directory}/logs"),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
        kwargs_handlers=handlers,
    )
