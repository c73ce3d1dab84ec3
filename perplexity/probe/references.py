"""Measures of generated texts against references: BLEU, chrF, ROUGE and cosines of embeddings.

BLEU and chrF are sacrebleu's, ROUGE is rouge-score's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from ..errors import InputError, theirs
from ..text.words import UNSPACED

ROUGE = ("rouge1", "rouge2", "rougeL")


def overlap(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict:
    """Compute BLEU, chrF and ROUGE of texts against their references.

    sacrebleu's tokenizer is "zh" for Chinese, "char" for other scripts without spaces, else "13a".

    Args:
        texts: The generated texts.
        references: One or more references of each text.

    Returns:
        texts: their number; bleu, chrf: of the corpus, 0 to 100; bleu_signature, chrf_signature:
        sacrebleu's; rouge1, rouge2, rougeL: mean F1 over texts, 0 to 1, or None where most letters
        of the references are not ASCII, which is all that rouge-score reads.

    Raises:
        InputError: sacrebleu or rouge-score is not installed.

    Example:
        >>> scores = overlap(["the cat sat"], [["the cat sat", "a cat sat"]])
        >>> scores["chrf"], scores["rougeL"]
        (100.0, 1.0)
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise InputError(f"references: needs {error.name}; install fused-perplexity[probe]")
    # One stream a place among the references: None where a text has fewer.
    streams = [list(stream) for stream in zip_longest(*references)]
    letters = [letter for of in references for text in of for letter in text if letter.isalpha()]
    bleu, chrf = BLEU(tokenize=_cut_by(letters)), CHRF()
    measures: dict[str, Any] = {"texts": len(texts)}
    for name, metric in (("bleu", bleu), ("chrf", chrf)):
        measures[name] = metric.corpus_score(list(texts), streams).score
        measures[f"{name}_signature"] = str(metric.get_signature())
    if sum(letter.isascii() for letter in letters) < 0.5 * len(letters):
        return measures | dict.fromkeys(ROUGE)
    rouge = RougeScorer(list(ROUGE), use_stemmer=False)
    scores = [rouge.score_multi(list(of), text) for text, of in zip(texts, references, strict=True)]
    return measures | {
        name: sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE
    }


def _cut_by(letters: Sequence[str]) -> str:
    """Return the name of sacrebleu's tokenizer for a text of such letters."""
    unspaced = [letter for letter in letters if UNSPACED.match(letter)]
    if len(unspaced) < 0.3 * len(letters):
        return "13a"
    return "zh" if all("\u3400" <= letter <= "\u9fff" for letter in unspaced) else "char"


class Embeddings:
    """Sentence embeddings by a sentence-transformers model on disk.

    Args:
        folder: Folder of the model.

    Raises:
        InputError: sentence-transformers is not installed, or the folder holds no model of it.
    """

    def __init__(self, folder: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise InputError(f"embeddings: needs {error.name}; install fused-perplexity[coherence]")
        with theirs(f"embeddings: expected a sentence-transformers folder, got {folder}"):
            self.model = SentenceTransformer(str(folder), local_files_only=True)
        self.folder = str(folder)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return the embeddings of texts, [texts, D], each of length 1."""
        with theirs(
            f"embeddings: expected a model that encodes the texts, got {self.folder}, which fails"
        ):
            return self.model.encode(
                list(texts), normalize_embeddings=True, show_progress_bar=False
            )

    def coherence(
        self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict:
        """Return the mean cosines of texts with their prompts and with their nearest references.

        Pairs with a blank prompt or a blank text are left out.

        Returns:
            embeddings: the folder; texts: the number of pairs; with_prompt, with_reference: mean
            cosines, −1 to 1, None where there is no pair or no reference.
        """
        kept = [
            at
            for at, pair in enumerate(zip(prompts, texts, strict=True))
            if pair[0].strip() and pair[1].strip()
        ]
        means: dict = {
            "embeddings": self.folder,
            "texts": len(kept),
            "with_prompt": None,
            "with_reference": None,
        }
        if not kept:
            return means
        prompts, texts = ([of[at] for at in kept] for of in (prompts, texts))
        references = [references[at] for at in kept]
        of_texts = self.encode(texts)
        means["with_prompt"] = float((of_texts * self.encode(prompts)).sum(-1).mean())
        paired = [(place, text) for place, of in enumerate(references) for text in of]
        if paired:
            nearest: dict[int, float] = {}
            for (place, _), other in zip(
                paired, self.encode([text for _, text in paired]), strict=True
            ):
                nearest[place] = max(nearest.get(place, -1.0), float(of_texts[place] @ other))
            means["with_reference"] = sum(nearest.values()) / len(nearest)
        return means
