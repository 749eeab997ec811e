"""Train TokCom: a codec (tokens <-> latents), then a transformer (noise -> latents), or one stage
of these.

    accelerate launch train_accelerate.py --preset debug
    accelerate launch --config_file accelerate_configs/multi_gpu_ddp.yaml train_accelerate.py \\
        --preset base data.train=my_texts/ data.validation=held_out.jsonl output_dir=my-model \\
        flow.max_steps=50000
    accelerate launch train_accelerate.py stage=distill init_from=my-model output_dir=student \\
        data.train=my_texts/

A preset is a YAML file in presets/; every key below can be overridden as `dotted.key=value`. A run
that was stopped, even by SIGKILL, continues from its newest checkpoint when the same command is
given again and ends with the same weights. `output_dir` ends as a Hub repository: AutoModel,
DiffusionPipeline and TokComPipeline load it.

This file is the recipe; what it calls is in training/: config.py (settings), corpora.py (data),
build.py (models), trainer.py (the loop), stage.py and distill.py (what a stage minimises),
directory.py (what is written where), card.py.
"""

from pathlib import Path

from tokcom.cli.errors import report_errors
from tokcom.training.command import parse_config
from tokcom.training.config import TrainConfig


def run(config: TrainConfig) -> Path:
    """Run the stages that `config.stage` asks for; returns `output_dir`, a Hub repository."""
    # torch takes seconds to import: --help and mistakes in the command are answered before
    from accelerate.utils import set_seed

    from tokcom.training.build import has_trainable_codec, model_of_stage
    from tokcom.training.card import publish
    from tokcom.training.checks import check_sizes
    from tokcom.training.corpora import read_data
    from tokcom.training.digest import check_unchanged
    from tokcom.training.directory import RunDirectory
    from tokcom.training.distill import DistillTrainer
    from tokcom.training.launch import start_processes
    from tokcom.training.plan import check_plan
    from tokcom.training.sharding import part_of
    from tokcom.training.stage import StageTrainer
    from tokcom.training.tracking import check_tracker

    check_tracker(config.report_to)
    processes = start_processes()
    part = part_of(processes)
    with RunDirectory(config, processes.is_main_process) as directory:
        with processes.main_process_first():  # it trains the tokenizer and fills caches
            unfinished = [stage for stage in config.stages if not directory.is_finished(stage)]
            check_plan(config, directory, unfinished)
            corpus = read_data(config)
            directory.keep_tokenizer(corpus.tokenizer)
            if processes.is_main_process:
                check_unchanged(config, corpus, directory)
        # after the data: reading them must not change what a seed means
        set_seed(config.seed)
        for stage in config.stages:
            if stage not in unfinished:
                if processes.is_main_process:
                    print(f"stage {stage} is already finished in {directory.final(stage)}")
                continue
            if stage == "distill":
                trainer = DistillTrainer(config, corpus)
            else:
                model = model_of_stage(config, stage, corpus, directory, part)
                # once for all stages, before hours are spent on the first
                if stage == unfinished[0]:
                    check_sizes(config, model, corpus, unfinished, processes)
                # some codecs have no parameters, such as that of pixels
                if config.stage == "all" and stage == "codec" and not has_trainable_codec(model):
                    continue
                trainer = StageTrainer(config, stage, model, corpus)
            directory.begin()
            trainer.train()
            trainer.export(directory.final(stage))  # which marks the stage as finished
        if processes.is_main_process:
            publish(config, directory, processes.device, has_weights=part is None)
        processes.wait_for_everyone()
    processes.destroy_process_group()
    return directory.root


@report_errors()
def main(argv: list[str] | None = None) -> None:
    """Train as the command line says; mistakes end in one sentence, and so does a stop by a
    signal."""
    config = parse_config(__doc__, argv)
    from tokcom.training.stopping import TrainingStopped

    try:
        run(config)
    except TrainingStopped as stopped:
        print(stopped)


if __name__ == "__main__":
    main()
