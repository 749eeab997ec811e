"""Text generators that the benchmarks time: `generate(batch_size, tokens, steps)`, with the
attribute `parameters`."""

from collections.abc import Callable

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedModel

from tokcom.evaluation.autoregressive import llama_config
from tokcom.evaluation.judges import load_language_model
from tokcom.evaluation.published import PublishedTokCom
from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler
from tokcom.training.presets import preset_config

Generate = Callable[[int, int, int | None], None]


def tokcom_generator(
    preset: str,
    device: str = "cpu",
    compiled: bool = False,
    dtype: torch.dtype = torch.float32,
    **overrides,
) -> Generate:
    """A model of a preset with random weights."""
    config = preset_config(preset, **overrides)
    model = TokComModel(config).eval().to(dtype)
    pipe = TokComPipeline(model, TokComFlowMatchScheduler.from_model_config(config)).to(device)
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        pipe.compile()

    def generate(batch_size: int, tokens: int, steps: int | None) -> None:
        # ids, not texts: detokenizing is not the model's time
        pipe.generate(tokens // pipe.chunk_size, batch_size, steps, output_type="seq")

    generate.parameters = sum(p.numel() for p in pipe.model.parameters())
    return generate


def llama_generator(
    preset: str,
    parameters: int,
    vocab_size: int,
    device: str = "cpu",
    compiled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Generate:
    """A Llama with random weights and the width, depth and parameter count of the preset."""
    shape = preset_config(preset).transformer_config
    config = llama_config(vocab_size, shape.hidden_size, shape.num_hidden_layers, parameters, 0)
    return causal_generator(LlamaForCausalLM(config).to(dtype), device, compiled)


def causal_generator(
    model: PreTrainedModel, device: str = "cpu", compiled: bool = False
) -> Generate:
    """Any causal language model with its key/value cache."""
    model = model.eval().to(device)
    # the full length, and nothing of the model's own settings, which others would not share
    model.generation_config = GenerationConfig(eos_token_id=None)
    if compiled:  # needs a cache whose tensors keep their shapes
        model.forward = torch.compile(model.forward)
        model.generation_config.cache_implementation = "static"

    @torch.no_grad()
    def generate(batch_size: int, tokens: int, steps: int | None) -> None:
        ids = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        mask = torch.ones_like(ids)
        model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, do_sample=True, top_k=0, pad_token_id=0
        )

    generate.parameters = sum(p.numel() for p in model.parameters())
    return generate


def load_generators(paths: list[str], tokens: int, device: str) -> dict[str, Generate]:
    """Causal language models, by their paths.

    Raises `ValueError` for one with fewer positions than `tokens`.
    """
    found = {}
    for path in paths:
        model = load_language_model(path)
        most = getattr(model.config, "max_position_embeddings", None)
        if most is not None and most < tokens:
            raise ValueError(
                f"{path} has {most} positions, too few for texts of {tokens} tokens; give smaller "
                "--lengths."
            )
        found[path] = causal_generator(model, device)
    return found


def published_generator(parameters: int, vocab_size: int, device: str = "cpu") -> Generate:
    """The published sampler with as many parameters: all latents at once, no cache, one decoder
    pass at the end."""
    # the widest model of whole heads that fits, whose feed-forward layers then take up the rest
    width = 64
    while _published_size(width + 64, 2 * width, vocab_size) <= parameters:
        width += 64
    # three networks of four layers with three matrices, each one column wider
    wider = (parameters - _published_size(width, width, vocab_size)) // (3 * 4 * 3 * width)
    with torch.device(device):
        model = PublishedTokCom.random(width, width + wider, 4, width // 64, 1, vocab_size)

    @torch.no_grad()
    def generate(batch_size: int, tokens: int, steps: int | None) -> None:
        # noise_std and chunk size of the published model
        noise = 0.05 * torch.randn(batch_size, tokens // 4, width, device=device)
        model.decode(model.euler(noise, steps or 50)).argmax(-1)

    generate.parameters = _published_size(width, width + wider, vocab_size)
    return generate


def _published_size(width: int, intermediate_size: int, vocab_size: int) -> int:
    """Matrix parameters of the published model: three networks of 4 layers, one key/value head of
    64."""
    # query and output; key and value of one head; gate, up and down
    layer = 2 * width * width + 2 * 64 * width + 3 * width * intermediate_size
    # modulation of 4 layers, two of width x 2 width each; time network and output projection
    return vocab_size * width + 12 * layer + 16 * width * width + 9 * width * width
