"""The repository root and every export load as Hub repositories, each in a fresh interpreter,
offline."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, seeded, tiny_pipeline
from transformers import AutoTokenizer

from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_tokcom import TokComPipeline

REMOTE_FILES = {
    "interface_tokcom.py": {
        "collections",
        "difflib",
        "functools",
        "inspect",
        "os",
        "re",
        "torch",
        "transformers",
        "typing",
    },
    "configuration_tokcom.py": {
        "copy",
        "difflib",
        "huggingface_hub",
        "transformers",
        "typing",
        "warnings",
    },
    "configuration_codec_tokcom.py": {"huggingface_hub", "math", "transformers", "typing"},
    "integrity_tokcom.py": {
        "collections",
        "contextlib",
        "hashlib",
        "huggingface_hub",
        "json",
        "logging",
        "os",
        "pathlib",
        "safetensors",
        "torch",
        "transformers",
        "typing",
    },
    "configuration_media_tokcom.py": {"huggingface_hub", "transformers", "typing"},
    "layers_tokcom.py": {"collections", "functools", "math", "torch", "transformers", "typing"},
    "codec_chunk_tokcom.py": {"dataclasses", "difflib", "torch", "transformers", "typing"},
    "codec_color_tokcom.py": {"functools", "torch"},
    "codec_style_tokcom.py": {"collections", "dataclasses", "torch", "transformers"},
    "codec_video_tokcom.py": {"collections", "dataclasses", "torch", "transformers", "typing"},
    "codec_composite_tokcom.py": {"collections", "dataclasses", "torch", "transformers", "typing"},
    "processing_tokcom.py": {
        "PIL",
        "collections",
        "numpy",
        "os",
        "re",
        "safetensors",
        "torch",
        "transformers",
        "typing",
        "warnings",
    },
    "pictures_tokcom.py": {
        "PIL",
        "av",
        "collections",
        "fractions",
        "io",
        "numpy",
        "os",
        "pathlib",
        "pillow_heif",
        "statistics",
        "typing",
    },
    "sounds_tokcom.py": {
        "av",
        "io",
        "librosa",
        "math",
        "numpy",
        "pathlib",
        "scipy",
        "soundfile",
        "torch",
        "transformers",
        "typing",
        "warnings",
        "wave",
    },
    "context_tokcom.py": {
        "collections",
        "dataclasses",
        "functools",
        "torch",
        "transformers",
        "typing",
    },
    "tasks_tokcom.py": {"collections", "dataclasses", "torch", "transformers", "typing"},
    "transformer_tokcom.py": {"dataclasses", "itertools", "torch", "transformers", "typing"},
    "heads_tokcom.py": {"collections", "torch", "typing"},
    "quantization_tokcom.py": {"collections", "dataclasses", "torch", "transformers"},
    "objective_tokcom.py": {"dataclasses", "torch", "transformers", "typing"},
    "modeling_tokcom.py": {
        "collections",
        "functools",
        "inspect",
        "json",
        "os",
        "torch",
        "transformers",
        "typing",
    },
    "modeling_causal_tokcom.py": {"dataclasses", "inspect", "torch", "transformers"},
    "sampling_tokcom.py": {
        "collections",
        "copy",
        "dataclasses",
        "diffusers",
        "functools",
        "inspect",
        "math",
        "random",
        "torch",
        "transformers",
        "warnings",
    },
    "scheduling_tokcom.py": {"dataclasses", "diffusers", "math", "torch"},
    "pipeline_base_tokcom.py": {
        "collections",
        "contextlib",
        "diffusers",
        "huggingface_hub",
        "inspect",
        "json",
        "os",
        "pathlib",
        "re",
        "shutil",
        "tempfile",
        "torch",
        "transformers",
        "typing",
    },
    "pipeline_tokcom.py": {
        "re",
        "PIL",
        "collections",
        "dataclasses",
        "diffusers",
        "numpy",
        "os",
        "torch",
        "transformers",
        "typing",
    },
    "pipeline_media_tokcom.py": {
        "PIL",
        "collections",
        "dataclasses",
        "diffusers",
        "numpy",
        "os",
        "torch",
        "transformers",
        "typing",
    },
}
IMPORT = re.compile(r"^\s*(?:from\s+([\w.]+)\s+import|import\s+([\w.]+))", re.MULTILINE)

LOADERS = {
    "AutoConfig": "from transformers import AutoConfig\n"
    "value = AutoConfig.from_pretrained(PATH, "
    "trust_remote_code=True).transformer_config.hidden_size",
    "AutoModel": "from transformers import AutoModel\n"
    "value = digest(AutoModel.from_pretrained(PATH, trust_remote_code=True))",
    "AutoTokenizer": "from transformers import AutoTokenizer\n"
    "value = AutoTokenizer.from_pretrained(PATH, trust_remote_code=True)('Squinty was "
    "here.')['input_ids']",
    "DiffusionPipeline": "from diffusers import DiffusionPipeline\n"
    "value = digest(DiffusionPipeline.from_pretrained(PATH, trust_remote_code=True).model)",
    "custom_pipeline": "from diffusers import DiffusionPipeline\n"
    "value = digest(DiffusionPipeline.from_pretrained(PATH, custom_pipeline=PATH, "
    "trust_remote_code=True).model)",
    "TokComPipeline": "from tokcom import TokComPipeline\nvalue = digest(TokComPipeline.from_pretrained(PATH).model)",
    "bfloat16": "import torch\nfrom transformers import AutoModel\n"
    "model = AutoModel.from_pretrained(PATH, trust_remote_code=True, dtype=torch.bfloat16)\n"
    "value = [str(model.dtype), model.denoise(torch.zeros(1, 2, C, dtype=model.dtype), "
    "0.5).latents.shape[1]]",
}
PRELUDE = """
def digest(model):
    import torch
    torch.manual_seed(0)
    size = model.config.codec_config.chunk_size
    encoded = model.encode(torch.arange(8 * size)[None])
    denoised = model.denoise(torch.randn(1, 8, encoded.latents.shape[-1]), torch.linspace(0, 1, 8)[None])
    return [x.double().sum().item() for x in (encoded.latents, denoised.latents, model.decode(encoded.latents).logits)]
"""
NO_NETWORK = """
import socket
def refuse(*args):
    raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
"""


def digest(model) -> list[float]:
    scope = {}
    exec(PRELUDE, scope)
    with torch.no_grad():
        return scope["digest"](model)


def fresh(code: str, path, cache) -> object:
    """Run `code` in a new interpreter outside the repository, without network and with empty
    caches."""
    channels = json.loads((path / "config.json").read_text())["codec_config"].get("latent_channels")
    head = f"PATH = {str(path)!r}\nC = {channels}\nimport json{PRELUDE}{NO_NETWORK}"
    script = f"{head}{code}\nprint('RESULT', json.dumps(value))"
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    env |= {
        "HF_HOME": str(cache),
        "HF_MODULES_CACHE": str(cache / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=cache, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT", 1)[1])


@pytest.fixture(scope="module")
def root_copy(tmp_path_factory):
    """What a user downloads: the Hub files of the repository root, and nothing else."""
    path = tmp_path_factory.mktemp("hub") / "TokCom"
    path.mkdir()
    names = [
        *REMOTE_FILES,
        "config.json",
        "model.safetensors",
        "model_index.json",
        "tokenizer.json",
    ]
    for name in [*names, "tokenizer_config.json"]:
        shutil.copy(ROOT / name, path / name)
    shutil.copytree(ROOT / "scheduler", path / "scheduler")
    return path


@pytest.mark.parametrize("how", LOADERS)
def test_root_loads_in_a_fresh_process_that_asks_no_network(how, root_copy, tmp_path):
    torch.set_num_threads(1)
    value = fresh(LOADERS[how], root_copy, tmp_path)
    model = TokComModel.from_pretrained(ROOT)
    if how == "AutoConfig":
        assert value == model.config.transformer_config.hidden_size
    elif how == "AutoTokenizer":
        assert value == AutoTokenizer.from_pretrained(ROOT)("Squinty was here.")["input_ids"]
    elif how == "bfloat16":
        assert value == ["torch.bfloat16", 2]
    else:
        assert value == pytest.approx(digest(model), rel=1e-6)


@pytest.mark.parametrize("how", ["AutoModel", "DiffusionPipeline"])
def test_sharded_export_loads_in_a_fresh_process(how, build, tmp_path):
    pipe = build()
    pipe.save_pretrained(tmp_path / "out", max_shard_size="200KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    torch.set_num_threads(1)
    assert fresh(LOADERS[how], tmp_path / "out", tmp_path) == pytest.approx(
        digest(pipe.model), rel=1e-6
    )


def test_pipeline_saves_and_reloads_everything(build, tmp_path):
    pipe = build()
    pipe.save_pretrained(tmp_path / "a")
    again = TokComPipeline.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    for name in (
        "model.safetensors",
        "model_index.json",
        "tokenizer.json",
        "scheduler/scheduler_config.json",
    ):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    options = dict(gen_length=8, num_inference_steps=2)
    first, second = (
        p("Squinty", generator=torch.Generator().manual_seed(0), **options) for p in (pipe, again)
    )
    assert torch.equal(first.sequences, second.sequences)


def test_the_list_of_remote_files_and_their_imports_is_pinned(build, tmp_path):
    build().save_pretrained(tmp_path / "text")
    other = {"pipeline_media_tokcom.py", "modeling_causal_tokcom.py"}
    assert python_files(tmp_path / "text") == set(REMOTE_FILES) - other
    tiny_pipeline("image").save_pretrained(tmp_path / "image")
    other = {"pipeline_tokcom.py", "modeling_causal_tokcom.py"}
    assert python_files(tmp_path / "image") == set(REMOTE_FILES) - other
    TokComPipeline.from_pretrained(ROOT).save_pretrained(tmp_path / "causal")
    other = {"pipeline_media_tokcom.py"}
    assert python_files(tmp_path / "causal") == set(REMOTE_FILES) - other
    for name, allowed in REMOTE_FILES.items():
        found = {(a or b) for a, b in IMPORT.findall((ROOT / name).read_text())}
        local = {f.removesuffix(".py") for f in REMOTE_FILES}
        outside = {f.split(".")[0] for f in found if not f.startswith(".") and f not in local}
        assert outside <= allowed, f"{name} imports {outside - allowed}"


def python_files(directory) -> set[str]:
    return {file.name for file in directory.glob("*.py")}


def relative_imports(name: str) -> set[str]:
    return set(re.findall(r"^from \.(\w+) import", (ROOT / f"{name}.py").read_text(), re.MULTILINE))


@pytest.mark.parametrize("pipeline", ["pipeline_tokcom", "pipeline_media_tokcom"])
def test_pipelines_name_every_module_that_they_need(pipeline):
    needed = set()
    waiting = [pipeline]
    while waiting:
        new = relative_imports(waiting.pop()) - needed
        needed |= new
        waiting += new
    missing = needed - relative_imports(pipeline)
    assert not missing, f"diffusers would not copy {missing}"


@pytest.mark.parametrize("pipeline", ["pipeline_tokcom", "pipeline_media_tokcom"])
def test_a_pipeline_by_id_asks_the_hub_a_few_hundred_times_at_most(pipeline):
    """diffusers follows every chain of relative imports anew and asks the Hub at each link, so
    chains must be short."""

    @functools.cache
    def links(name: str) -> int:
        return 1 + sum(links(other) for other in relative_imports(name))

    assert links(pipeline) < 280


def test_a_saved_text_model_is_found_by_AutoModelForCausalLM(tmp_path):  # noqa: N802
    TokComPipeline.from_pretrained(ROOT).save_pretrained(tmp_path)
    names = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert names["AutoModelForCausalLM"] == "modeling_causal_tokcom.TokComForCausalLM"
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    assert settings["temperature"] == 0.7 and settings["pad_token_id"] == 4096


@pytest.mark.parametrize(
    "custom", ["", pytest.param(", custom_pipeline=PATH", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("modality", ["image", "video", "several"])
def test_a_model_of_any_modality_loads_as_its_own_pipeline_from_its_own_code(
    modality, custom, tmp_path
):
    pipe = tiny_pipeline(modality)
    pipe.save_pretrained(tmp_path / "out")
    code = f"""from diffusers import DiffusionPipeline
import torch
pipe = DiffusionPipeline.from_pretrained(PATH, trust_remote_code=True{custom})
pipe.set_progress_bar_config(disable=True)
made = pipe(num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="latent").latents
value = [type(pipe).__name__, type(pipe).__module__.split(".")[0], made.double().sum().item()]
"""
    torch.set_num_threads(1)
    made = pipe(num_inference_steps=1, generator=seeded(), output_type="latent").latents
    found = fresh(code, tmp_path / "out", tmp_path)
    assert found[:2] == [type(pipe).__name__, "diffusers_modules"]
    assert found[2] == pytest.approx(made.double().sum().item(), rel=1e-5)


def test_shards_and_one_file_never_lie_side_by_side(build, tmp_path):
    pipe, weight = build(), "transformer.proj_out.weight"
    for size in (None, "200KB", None, "100KB"):
        pipe.model.get_parameter(weight).data.add_(1.0)
        pipe.save_pretrained(tmp_path, max_shard_size=size)
        found = TokComModel.from_pretrained(tmp_path).get_parameter(weight)
        assert torch.equal(found, pipe.model.get_parameter(weight))


def test_a_full_disk_leaves_the_weights_that_were_there(build, tmp_path, monkeypatch):
    pipe = build()
    pipe.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(self, directory, **kwargs):
        (tmp_path / directory / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(TokComModel, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        pipe.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before and not list(
        tmp_path.glob(".saving-*")
    )


def test_weights_outside_the_directory_are_refused(build, tmp_path):
    build().save_pretrained(tmp_path / "model", max_shard_size="200KB")
    index = tmp_path / "model" / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    name = next(iter(found["weight_map"]))
    shutil.copy(tmp_path / "model" / found["weight_map"][name], tmp_path / "elsewhere.safetensors")
    for outside in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors")):
        found["weight_map"][name] = outside
        index.write_text(json.dumps(found))
        with pytest.raises(ValueError, match="not in its directory"):
            TokComModel.from_pretrained(tmp_path / "model")


QUIET = """
import sys
from tokcom.evaluation.judges import load_language_model
from tokcom.training.tokens import load_tokenizer
for path in sys.argv[1:]:
    print(len(load_tokenizer(path)))
try:
    load_language_model(sys.argv[1])
except ValueError as error:
    print("refused" if "trust_remote_code" in str(error) else error)
"""


def test_our_commands_load_tokenizers_without_a_question_or_a_warning():
    zoo = [str(file.parent) for file in (ROOT / "zoo").glob("*/tokenizer.json")]
    command = [sys.executable, "-c", QUIET, str(ROOT), *zoo]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 2 + len(zoo) and lines[-1] == "refused"
    assert "You are using a model of type" not in done.stderr


def test_only_one_place_asks_auto_tokenizer():
    asked = re.compile(
        r"Auto(Tokenizer|ModelForCausalLM)\.from_pretrained\((?!.*trust_remote_code)"
    )
    found = {
        file.name
        for folder in ("cli", "evaluation", "evaluation/studies", "training", "examples", "scripts")
        for file in (ROOT / folder).glob("*.py")
        if asked.search(file.read_text(encoding="utf-8"))
    }
    assert found <= {"sample_corpus.py"}  # whose call has a line of its own for it


def test_models_without_code_name_none():
    for file in (ROOT / "zoo").glob("*/*config.json"):
        assert "auto_map" not in json.loads(file.read_text(encoding="utf-8")), file
