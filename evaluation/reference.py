"""Reference metrics of predictions in a file: BLEU-4, ROUGE-L and METEOR.

    python -m evaluation.reference predictions.jsonl

Each line is `{"prediction": "...", "references": ["...", ...]}`, or `"reference": "..."` for one. METEOR needs no
WordNet here: it matches exact words and stems, and is labelled so.
"""

import argparse
import json

import numpy as np
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU


class NoSynonyms:
    """Stands in for WordNet, which is a download: no word has a synonym."""

    def synsets(self, word: str) -> list:
        return []


def reference_metrics(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """Corpus BLEU-4 and mean ROUGE-L F1 and METEOR, all in [0, 1]; several references per prediction are allowed.

    Raises `ValueError` when the lists differ in length or a prediction has no reference.
    """
    if len(predictions) != len(references) or not all(references):
        raise ValueError(
            f"{len(predictions)} predictions need as many non-empty lists of references, got {len(references)}."
        )
    most = max(map(len, references))
    columns = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    rouge, stemmer = RougeScorer(["rougeL"], use_stemmer=True), PorterStemmer()
    meteor = [
        meteor_score([r.split() for r in row], text.split(), stemmer=stemmer, wordnet=NoSynonyms())
        for text, row in zip(predictions, references)
    ]
    best = [rouge.score_multi(row, text)["rougeL"].fmeasure for text, row in zip(predictions, references)]
    return {
        "BLEU-4": BLEU().corpus_score(predictions, columns).score / 100,
        "ROUGE-L": float(np.mean(best)),
        "METEOR (no synonyms)": float(np.mean(meteor)),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="JSON lines of predictions and references")
    args = parser.parse_args(argv)
    with open(args.file) as file:
        rows = [json.loads(line) for line in file if line.strip()]
    references = [row["references"] if "references" in row else [row["reference"]] for row in rows]
    for name, value in reference_metrics([row["prediction"] for row in rows], references).items():
        print(f"{name}: {value:.4f}")


if __name__ == "__main__":
    main()
