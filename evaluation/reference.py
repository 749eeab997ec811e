"""Compare predictions with references: exact match, BLEU-4, ROUGE-L and METEOR.

    tokcom evaluate predictions.json  # {"id", "reference", "prediction"} records
    tokcom evaluate 'baseline=b-*.json' 'refiner=r-*.json'  # a row per name: mean and spread

A file holds a JSON list or JSON lines; `"references": [...]` gives several. METEOR here matches
exact words and stems without WordNet, and is labelled so.
"""

import glob
import json
import re
from pathlib import Path

import numpy as np
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from tokcom.evaluation.report import table


class NoSynonyms:
    """Replaces WordNet, which would be a download: no word has a synonym."""

    def synsets(self, word: str) -> list:
        return []


def normalize_answer(text: str) -> str:
    """Lower case without punctuation, articles and extra spaces, as in SQuAD (Rajpurkar et al.
    2016)."""
    text = re.sub(r"[^\w\s]", "", text.lower())
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def reference_metrics(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """Share of exact matches, corpus BLEU-4, mean ROUGE-L F1 and METEOR, all in [0, 1].

    A prediction may have several references. Raises `ValueError` if the lists differ in length or a
    prediction has no reference.
    """
    if len(predictions) != len(references) or not all(references):
        raise ValueError(
            f"{len(predictions)} predictions need as many non-empty lists of references, got "
            f"{len(references)}."
        )
    most = max(map(len, references))
    # sacrebleu wants the i-th references of all texts together, None where there are fewer
    columns = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    stemmer = PorterStemmer()
    meteor = [
        meteor_score([r.split() for r in row], text.split(), stemmer=stemmer, wordnet=NoSynonyms())
        for text, row in zip(predictions, references)
    ]
    best = [
        # of several references the best
        rouge.score_multi(row, text)["rougeL"].fmeasure
        for text, row in zip(predictions, references)
    ]
    pairs = [
        (normalize_answer(text), map(normalize_answer, row))
        for text, row in zip(predictions, references)
    ]
    return {
        "exact match": float(np.mean([text in row for text, row in pairs])),
        # counts of the whole corpus, not a mean over sentences, of which short ones have no 4-gram
        "BLEU-4": BLEU().corpus_score(predictions, columns).score / 100,
        "ROUGE-L": float(np.mean(best)),
        "METEOR (no synonyms)": float(np.mean(meteor)),
    }


def read_predictions(file: str | Path) -> dict[str, float]:
    """`reference_metrics` of a file of records. Raises `ValueError` for an incomplete record."""
    text = Path(file).read_text(encoding="utf-8")
    # a list is one JSON document, JSON lines are many
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    for i, row in enumerate(rows):
        if "prediction" not in row or not ("reference" in row or row.get("references")):
            raise ValueError(
                f"record {i} of {file} needs 'prediction' and 'reference' or 'references', has "
                f"{sorted(row)}."
            )
    references = [row["references"] if "references" in row else [row["reference"]] for row in rows]
    return reference_metrics([row["prediction"] for row in rows], references)


def compare(files: list[str]) -> str:
    """A Markdown table of means and standard deviations, one row per name.

    `files` are given as `NAME=FILE` or `FILE`; FILE may be a pattern.
    """
    found: dict[str, list[dict[str, float]]] = {}
    for item in files:
        # a path may hold a = itself
        name, _, pattern = ("", "", item) if Path(item).is_file() else item.partition("=")
        name, pattern = (name, pattern) if pattern else ("", item)
        # files of one name, such as seeds, are one row; what matches nothing is named by reading it
        for file in sorted(glob.glob(pattern)) or [pattern]:
            found.setdefault(name or Path(file).stem, []).append(read_predictions(file))
    rows = []
    for name, runs in found.items():
        values = {key: [run[key] for run in runs] for key in runs[0]}
        # ddof=1: the spread of seeds in general, estimated from these few
        spread = [
            f"{np.mean(v):.4f}" + (f" ± {np.std(v, ddof=1):.4f}" if len(v) > 1 else "")
            for v in values.values()
        ]
        rows.append([name, len(runs), *spread])
    return table(["", "files", *values], rows)
