"""Publishing to a stand-in Hub, and loading from it: by id in five ways, offline, pinned and
private."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT
from hub_server import TOKEN, StandInHub
from test_hub import PRELUDE, digest

from tokcom.cli.main import main as convert
from tokcom.pipeline_base_tokcom import with_section

LOADERS = {
    "AutoModel": "from transformers import AutoModel\nmodel = AutoModel.from_pretrained(ID, trust_remote_code=True)",
    "DiffusionPipeline": "from diffusers import DiffusionPipeline\n"
    "model = DiffusionPipeline.from_pretrained(ID, trust_remote_code=True).model",
    "snapshot": "from diffusers import DiffusionPipeline\nfrom huggingface_hub import snapshot_download\n"
    "folder = snapshot_download(ID)\n"
    "model = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, "
    "trust_remote_code=True).model",
    "TokComPipeline": "from tokcom import TokComPipeline\nmodel = TokComPipeline.from_pretrained(ID).model",
    "verified": "from tokcom import load_pipeline\nmodel = load_pipeline(ID, verify=True).model",
}


@pytest.fixture
def hub():
    server = StandInHub()
    yield server
    server.close()


def python(
    code: str, hub: StandInHub, home, token: str | None = TOKEN, **environment
) -> subprocess.CompletedProcess:
    """Run `code` in a fresh interpreter whose Hub is the stand-in; `home` keeps its cache."""
    env = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_HUB_OFFLINE", "HF_TOKEN")
    }
    env |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    env |= {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **({"HF_TOKEN": token} if token else {}),
        **environment,
    }
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=home, capture_output=True, text=True
    )


def result(done: subprocess.CompletedProcess) -> object:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT ")[-1])


def loaded(name: str, code: str, hub: StandInHub, home, **options) -> list[float]:
    """The digest of the model that `code` of LOADERS loads by its id, in a fresh interpreter."""
    script = (
        f"ID = {name!r}\nimport json{PRELUDE}{code}\nprint('RESULT', json.dumps(digest(model)))"
    )
    return result(python(script, hub, home, **options))


def push(path, call: str, hub: StandInHub, home, **options) -> subprocess.CompletedProcess:
    head = "from tokcom import TokComPipeline\n"
    return python(
        f"{head}pipe = TokComPipeline.from_pretrained({str(path)!r})\nprint({call})",
        hub,
        home,
        **options,
    )


@pytest.mark.slow
def test_a_pushed_pipeline_loads_by_id_in_five_ways_offline_too_and_generates(build, hub, tmp_path):
    pipe = build()
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "run").mkdir()
    (tmp_path / "model" / "run" / "checkpoint.bin").write_bytes(b"secret")
    (tmp_path / "model" / "zoo" / "other").mkdir(parents=True)
    (tmp_path / "model" / "zoo" / "other" / "model.safetensors").write_bytes(b"another model")
    done = push(
        tmp_path / "model",
        "pipe.push_to_hub('tester/tiny', max_shard_size='200KB')",
        hub,
        tmp_path / "push",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = hub.files("tester/tiny")
    assert {"config.json", "model_index.json", "README.md", "pipeline_base_tokcom.py"} <= set(files)
    assert len([name for name in files if name.startswith("model-0")]) > 1
    assert not any(part in name for name in files for part in ("run/", "zoo/", "__pycache__"))
    assert b'path_or_id = "tester/tiny"' in files["README.md"]
    expected = pytest.approx(digest(pipe.model), rel=1e-5)
    for how, code in LOADERS.items():
        assert loaded("tester/tiny", code, hub, tmp_path / "home", token=None) == expected, how
    assert (
        loaded("tester/tiny", LOADERS["AutoModel"], hub, tmp_path / "home", HF_HUB_OFFLINE="1")
        == expected
    )
    snippet = files["README.md"].decode().split("```python\n")[1].split("```")[0]
    done = python(snippet, hub, tmp_path / "home", token=None)
    assert done.returncode == 0 and len(done.stdout.strip()) > 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_pinned_revision_stays_what_it_was(build, hub, tmp_path):
    digests, revisions = [], []
    for seed in range(2):
        pipe = build()
        pipe.model.transformer.proj_out.weight.data.add_(0.1 * seed)
        pipe.save_pretrained(tmp_path / str(seed))
        done = push(tmp_path / str(seed), "pipe.push_to_hub('tester/tiny')", hub, tmp_path / "push")
        assert done.returncode == 0, done.stderr[-3000:]
        digests.append(digest(pipe.model))
        revisions.append(hub.repos["tester/tiny"]["branches"]["main"])
    for revision, expected in zip([*revisions, "main"], [*digests, digests[-1]]):
        code = "from transformers import AutoModel\nmodel = AutoModel.from_pretrained(ID, trust_remote_code=True, "
        code += f"revision={revision!r}, code_revision={revision!r})"
        assert loaded("tester/tiny", code, hub, tmp_path / "home") == pytest.approx(
            expected, rel=1e-5
        )


@pytest.mark.slow
def test_private_repositories_need_the_token_and_refusals_say_what_to_do(build, hub, tmp_path):
    build().save_pretrained(tmp_path / "model")
    pushing = "pipe.push_to_hub('tester/hidden', private=True)"
    for token, message in (("hf_wrong", "missing, expired or wrong"), (None, "hf auth login")):
        done = push(tmp_path / "model", pushing, hub, tmp_path / "home", token=token)
        assert done.returncode and message in done.stderr.splitlines()[-1]
    done = push(tmp_path / "model", "pipe.push_to_hub('a/b/c')", hub, tmp_path / "home")
    assert done.returncode and "'user/name'" in done.stderr.splitlines()[-1]
    assert push(tmp_path / "model", pushing, hub, tmp_path / "home").returncode == 0
    loading = "from transformers import AutoConfig\nAutoConfig.from_pretrained('tester/hidden', trust_remote_code=True)"
    assert python(loading, hub, tmp_path / "a", token=None).returncode
    assert python(loading, hub, tmp_path / "b").returncode == 0


@pytest.mark.slow
def test_a_model_is_pushed_without_its_pipeline(build, hub, tmp_path):
    pipe = build()
    pipe.save_pretrained(tmp_path / "model")
    done = push(
        tmp_path / "model", "pipe.model.push_to_hub('tester/model')", hub, tmp_path / "push"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = loaded("tester/model", LOADERS["AutoModel"], hub, tmp_path / "home")
    assert found == pytest.approx(digest(pipe.model), rel=1e-5)


@pytest.mark.slow
def test_training_pushes_a_card_of_the_run_and_publish_adds_the_evaluation(hub, tmp_path):
    output = tmp_path / "my-model"
    command = [
        "--preset",
        "debug",
        "--push_to_hub",
        "tester/trained",
        "hub_license=mit",
        f"output_dir={output}",
    ]
    command += [
        f"data.train={ROOT}/sample_data/stories_validation.jsonl",
        "report_to=none",
        "num_samples=0",
    ]
    command += [
        f"{stage}.{key}" for stage in ("codec", "flow") for key in ("max_steps=3", "eval_batches=1")
    ]
    code = f"from tokcom import train_accelerate\ntrain_accelerate.main({command!r})"
    done = python(code, hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr[-3000:]
    card = hub.files("tester/trained")["README.md"].decode()
    assert "license: mit" in card and "# trained" in card and "`stories_validation.jsonl`" in card
    assert (
        str(ROOT) not in card
        and "| flow | 3 |" in card
        and "seeds 0 to 2" in card
        and "## Limitations" in card
    )
    assert (
        'path_or_id = "tester/trained"' in card
        and 'path_or_id = "."' in (output / "README.md").read_text()
    )
    assert not any(name.startswith("run") for name in hub.files("tester/trained"))

    (tmp_path / "results.md").write_text("## Continuations\n\n| NLL |\n|---|\n| 4.2 |\n")
    (output / "curve.png").write_bytes(b"\x89PNG")
    with (output / "README.md").open("a") as file:
        file.write("\n![curve](curve.png) ![elsewhere](../../secret.png)\n")
    command = ["publish", str(output), "tester/again", "--evaluation", str(tmp_path), "--private"]
    code = f"from tokcom.cli.main import main\nmain({command!r})"
    done = python(code, hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr[-3000:]
    files = hub.files("tester/again")
    assert (
        hub.repos["tester/again"]["private"]
        and "curve.png" in files
        and not any("secret" in n for n in files)
    )
    assert "## Evaluation\n\n### Continuations" in files["README.md"].decode()


def test_publishing_what_is_no_model_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="holds no model_index.json"):
        convert(["publish", str(tmp_path), "tester/x"])


def test_sections_of_a_card_are_replaced_or_added():
    card = "# T\n\n## A\n\nold\n\n## B\n\nkept\n"
    assert with_section(card, "A", "new") == "# T\n\n## A\n\nnew\n\n## B\n\nkept\n"
    assert with_section(card, "C", "more").endswith("## B\n\nkept\n\n## C\n\nmore\n")
    assert with_section(with_section(card, "B", "x"), "B", "y").count("## B") == 1
