"""Generated texts beside what should have been said: BLEU and chrF by sacrebleu, ROUGE by
rouge-score, embeddings on request.
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
    """BLEU and chrF (0 to 100, of the corpus, with sacrebleu's signatures) and ROUGE F1 (0 to 1,
    mean over texts) of ``texts`` against one or more references each.

    Chinese is cut as sacrebleu's "zh" does, other scripts without spaces by "char". ROUGE is None
    where most letters of the references are not ASCII: rouge-score reads no others.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise InputError(f"references: needs {error.name}; install fused-perplexity[probe]")
    streams = [list(stream) for stream in zip_longest(*references)]  # None where a text has fewer
    letters = [letter for of in references for text in of for letter in text if letter.isalpha()]
    bleu, chrf = BLEU(tokenize=_cut_by(letters)), CHRF()
    found: dict[str, Any] = {"texts": len(texts)}
    for name, metric in (("bleu", bleu), ("chrf", chrf)):
        found[name] = metric.corpus_score(list(texts), streams).score
        found[f"{name}_signature"] = str(metric.get_signature())
    if sum(letter.isascii() for letter in letters) < 0.5 * len(letters):
        return found | dict.fromkeys(ROUGE)
    rouge = RougeScorer(list(ROUGE), use_stemmer=False)
    scores = [rouge.score_multi(list(of), text) for text, of in zip(texts, references, strict=True)]
    return found | {
        name: sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE
    }


def _cut_by(letters: Sequence[str]) -> str:
    """sacrebleu's tokenizer for a text of such letters."""
    unspaced = [letter for letter in letters if UNSPACED.match(letter)]
    if len(unspaced) < 0.3 * len(letters):
        return "13a"
    return "zh" if all("\u3400" <= letter <= "\u9fff" for letter in unspaced) else "char"


class Embeddings:
    """A sentence-transformers model on disk; InputError where ``folder`` is none."""

    def __init__(self, folder: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise InputError(f"embeddings: needs {error.name}; install fused-perplexity[coherence]")
        with theirs(f"embeddings: expected a sentence-transformers folder, got {folder}"):
            self.model = SentenceTransformer(str(folder), local_files_only=True)
        self.folder = str(folder)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """[texts, D] of length 1."""
        with theirs(
            f"embeddings: expected a model that encodes the texts, got {self.folder}, which fails"
        ):
            return self.model.encode(
                list(texts), normalize_embeddings=True, show_progress_bar=False
            )

    def coherence(
        self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict:
        """Mean cosine of each text with its prompt and with its nearest reference; blank prompts
        and texts are left out.
        """
        kept = [
            at
            for at, pair in enumerate(zip(prompts, texts, strict=True))
            if pair[0].strip() and pair[1].strip()
        ]
        found: dict = {
            "embeddings": self.folder,
            "texts": len(kept),
            "with_prompt": None,
            "with_reference": None,
        }
        if not kept:
            return found
        prompts, texts = ([of[at] for at in kept] for of in (prompts, texts))
        references = [references[at] for at in kept]
        of_texts = self.encode(texts)
        found["with_prompt"] = float((of_texts * self.encode(prompts)).sum(-1).mean())
        paired = [(place, text) for place, of in enumerate(references) for text in of]
        if paired:
            nearest: dict[int, float] = {}
            for (place, _), other in zip(
                paired, self.encode([text for _, text in paired]), strict=True
            ):
                nearest[place] = max(nearest.get(place, -1.0), float(of_texts[place] @ other))
            found["with_reference"] = sum(nearest.values()) / len(nearest)
        return found
