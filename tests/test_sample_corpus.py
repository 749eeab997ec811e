"""A corpus sampled from a causal language model: what is kept, and that a stop loses nothing."""

import json
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokcom.cli import sample_corpus
from tokcom.cli.main import call, parse
from tokcom.training.config import DataConfig
from tokcom.training.data import load_documents
from tokcom.training.files import is_saved_dataset


def sample(arguments: list[str]) -> dict[str, int]:
    """Run the command; gives its counts."""
    return call("sample-corpus", *arguments)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A random Llama over nine words, whose texts often end."""
    folder = tmp_path_factory.mktemp("teacher")
    words = ["<s>", "</s>", "<unk>", "a", "fox", "ran", "up", "the", "hill"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(words), **sizes, **heads, **ends)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def options(teacher):
    """Arguments of a small run into a folder; more of them win over the first."""

    def build(folder: Path, *more: str) -> list[str]:
        small = ["--batch_size", "8", "--max_new_tokens", "12", "--texts_per_file", "7"]
        small += ["--num_texts", "30", "--min_p", "0", "--seed", "3"]
        return ["--model", teacher, "--output", str(folder), *small, *more]

    return build


def files(folder: Path) -> dict[str, list[str]]:
    """The texts of each parquet file of a corpus."""
    """The texts of each file, those for validation first."""
    found = [*folder.glob("*.parquet"), *sorted(folder.glob("train/*.parquet"))]
    return {file.name: sample_corpus.read_texts(file) for file in found}


def texts(folder: Path) -> list[str]:
    return [text for part in files(folder).values() for text in part]


def same_but_date(folder: Path) -> dict:
    found = json.loads((folder / "provenance.json").read_text())
    found.pop("date")
    return found


@pytest.mark.parametrize("first", ["1", "9", "20"])
def test_resuming_gives_the_files_of_an_uninterrupted_run(options, tmp_path, first):
    more = ["--validation", "5"]
    whole = sample(options(tmp_path / "whole", *more))
    sample(options(tmp_path / "parts", *more, "--num_texts", first))
    parts = sample(options(tmp_path / "parts", *more))
    assert whole == parts
    assert files(tmp_path / "whole") == files(tmp_path / "parts")
    assert same_but_date(tmp_path / "whole") == same_but_date(tmp_path / "parts")


def test_a_crash_between_the_texts_and_the_state_loses_only_that_batch(options, tmp_path):
    sample(options(tmp_path / "whole"))
    sample(options(tmp_path / "parts", "--num_texts", "9"))
    state = (tmp_path / "parts" / "state.json").read_text()
    sample(options(tmp_path / "parts", "--num_texts", "20"))
    (tmp_path / "parts" / "state.json").write_text(state)
    sample(options(tmp_path / "parts"))
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_a_run_that_is_told_to_stop_ends_before_its_next_batch(options, tmp_path):
    stop = threading.Event()
    stop.set()
    assert sample_corpus.run(parse("sample-corpus", options(tmp_path)), stop)["sampled"] == 0


def test_only_ended_texts_are_kept(options, tmp_path):
    counts = sample(options(tmp_path, "--max_new_tokens", "4"))
    assert counts["not_ended"] > 0
    assert all(len(text.split()) < 4 for text in texts(tmp_path))
    left_out = counts["not_ended"] + counts["too_short"] + counts["duplicates"]
    assert counts["sampled"] == counts["kept"] + left_out


def test_short_texts_are_left_out_and_counted(options, tmp_path):
    counts = sample(options(tmp_path, "--min_characters", "10"))
    assert counts["too_short"] > 0
    assert min(map(len, texts(tmp_path))) >= 10


def test_duplicates_are_dropped_and_counted(options, tmp_path):
    counts = sample(options(tmp_path))
    found = texts(tmp_path)
    assert counts["duplicates"] > 0
    assert len(set(found)) == len(found) == counts["kept"]
    assert counts["characters"] == sum(map(len, found))


def test_excluded_texts_do_not_come_again(options, tmp_path):
    sample(options(tmp_path / "first"))
    known = texts(tmp_path / "first")
    pq.write_table(pa.table({"text": known}), tmp_path / "known.parquet")
    more = ["--exclude", str(tmp_path / "known.parquet")]
    sample(options(tmp_path / "second", *more))
    assert not set(known) & set(texts(tmp_path / "second"))


def test_validation_holds_the_first_texts_and_shards_are_full(options, tmp_path):
    sample(options(tmp_path / "plain"))
    sample(options(tmp_path / "split", "--validation", "5"))
    split = files(tmp_path / "split")
    assert split.pop("validation.parquet") == texts(tmp_path / "plain")[:5]
    assert all(len(part) == 7 for part in list(split.values())[:-1])


def test_training_reads_all_of_a_corpus_but_its_validation_part(options, tmp_path):
    sample(options(tmp_path / "corpus", "--validation", "5"))
    held_out, *parts = files(tmp_path / "corpus").values()
    read = {
        name: load_documents(str(tmp_path / "corpus" / name), DataConfig(), "train")["text"]
        for name in ("train", "validation.parquet")
    }
    assert sorted(read["train"]) == sorted(text for part in parts for text in part)
    assert list(read["validation.parquet"]) == held_out and len(held_out) == 5
    # a state.json does not make a folder one that datasets has saved
    assert not is_saved_dataset(tmp_path / "corpus")


def test_a_prompt_begins_every_text(options, tmp_path):
    sample(options(tmp_path, "--prompt", "the fox"))
    assert all(text.startswith("the fox") for text in texts(tmp_path))


def test_a_changed_setting_is_refused_by_name(options, tmp_path):
    sample(options(tmp_path, "--num_texts", "1"))
    with pytest.raises(SystemExit, match="temperature 1.0, not 0.5"):
        sample(options(tmp_path, "--temperature", "0.5"))


def test_texts_that_no_run_has_written_are_not_overwritten(options, tmp_path):
    sample(options(tmp_path, "--num_texts", "1"))
    before = texts(tmp_path)
    (tmp_path / "state.json").unlink()
    with pytest.raises(SystemExit, match="part-00000.parquet, but no state.json.*--output"):
        sample(options(tmp_path, "--num_texts", "1"))
    assert texts(tmp_path) == before


def test_every_file_says_where_it_comes_from(options, tmp_path):
    sample(options(tmp_path))
    whole = json.loads((tmp_path / "provenance.json").read_text())
    assert set(whole["settings"]["sha256"]) == {"model.safetensors"}
    last = sorted(tmp_path.glob("train/part-*.parquet"))[-1]
    assert json.loads(pq.read_schema(last).metadata[b"provenance"]) == whole


def test_a_model_whose_texts_are_never_kept_is_an_error(options, tmp_path):
    with pytest.raises(SystemExit, match="--min_characters 1000"):
        sample(options(tmp_path, "--min_characters", "1000"))


def test_more_tokens_than_positions_are_refused(options, tmp_path):
    with pytest.raises(SystemExit, match="give at most 31"):
        sample(options(tmp_path, "--max_new_tokens", "32"))


def test_min_p_keeps_only_tokens_within_the_share_of_the_likeliest():
    logits = torch.tensor([0.5, 0.3, 0.14, 0.06]).log().expand(2000, 4)
    tokens = sample_corpus.draw(logits, 1.0, 0, 0.25, torch.Generator().manual_seed(0))
    assert set(tokens.flatten().tolist()) == {0, 1, 2}
    share = (tokens == 0).float().mean().item()
    assert share == pytest.approx(0.5 / 0.94, abs=0.04)


def test_top_k_keeps_only_so_many_tokens():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(500, 4)
    tokens = sample_corpus.draw(logits, 1.0, 2, 0.0, torch.Generator().manual_seed(0))
    assert set(tokens.flatten().tolist()) == {2, 3}


@torch.inference_mode()
def test_the_cache_in_place_gives_the_logits_of_the_growing_one(options, teacher, tmp_path):
    asked = sample_corpus.Teacher(parse("sample-corpus", options(tmp_path)))
    tokens = torch.randint(9, (4, 6), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([0, 2, 3])
    found = []
    for cache in (asked._cache(), DynamicCache(config=asked.model.config)):
        asked.model(tokens[:, :4], past_key_values=cache)
        cache.batch_select_indices(rows)
        asked.model(tokens[rows, 4:5], past_key_values=cache)
        found.append(asked.model(tokens[rows, 5:6], past_key_values=cache).logits)
    assert torch.allclose(*found, atol=1e-6)


def test_attention_of_one_token_is_that_of_sdpa(monkeypatch):
    # Without the compiler, which a machine of tests may lack.
    monkeypatch.setattr(sample_corpus, "_attend", sample_corpus._attend._torchdynamo_orig_callable)
    query, keys, values = (torch.randn(3, heads, n, 8) for heads, n in ((4, 1), (2, 5), (2, 5)))
    found, _ = sample_corpus.single_token_attention(None, query, keys, values, None)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    wanted = sdpa(query, keys, values, enable_gqa=True)
    assert torch.allclose(found, wanted.transpose(1, 2), atol=1e-6)
