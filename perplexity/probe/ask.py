"""Ask-LLM: a model is asked yes or no about a text, and its probability of yes is the text's score.

Sachdeva et al. 2024, How to Train Data-Efficient LLMs (arXiv:2402.09668). The two answers' negative
log-likelihoods come from the hidden state of the prompt's last position by ``token_statistics``: no
logits.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import checks, models
from ..errors import InputError, check_unicode
from ..scoring.protocols import Positions
from ..scoring.run import ScoringRun
from ..scoring.stream import IGNORED, continuations
from ..statistics import token_statistics
from ..text.documents import Document, check_ids, checked_document
from ..text.tokens import check_tokenizer, text_of
from .prompts import chat_text, encode, following, plain

TEMPLATE = """Text:
{text}

Is the text above fluent, coherent and informative, without repeating itself? Answer yes or no.
Answer:"""
# Of a probe, where it is known what the text was to continue or to answer.
PROBE_TEMPLATE = """Prompt:
{prompt}

Continuation, which may be cut off at its end:
{text}

Does the continuation go on from the prompt fluently, sensibly and truthfully, without repeating itself? Answer yes or no.
Answer:"""
PLACE, PROMPT = "{text}", "{prompt}"
# Tokens that a text loses beyond what is too much, each time: cutting may change how the rest is
# cut into tokens.
SHORTER = 8


@dataclass(frozen=True)
class Answer:
    """``p_yes``, ``p_no``: probabilities of the two tokens among the whole vocabulary; ``first``:
    the model's own first choice.
    """

    id: str
    p_yes: float
    p_no: float
    first: str
    shortened: bool

    @property
    def yes_of_two(self) -> float | None:
        """p_yes / (p_yes + p_no): the answer, were it one of the two; None where neither has any
        probability.
        """
        both = self.p_yes + self.p_no
        return self.p_yes / both if both > 0 else None


def check_template(name: str, template: str) -> None:
    """Raise InputError that begins with ``name`` unless a question has one place for a text."""
    if template.count(PLACE) != 1:
        raise InputError(
            f"{name}: expected {PLACE} in it once, got it {template.count(PLACE)} times"
        )
    if template.count(PROMPT) > 1:
        raise InputError(
            f"{name}: expected {PROMPT} in it once at most, got it {template.count(PROMPT)} times"
        )


class Questioner:
    """A model, its tokenizer and a question; ``ask`` answers it for texts.

    template: holds ``{text}`` once, and may hold ``{prompt}``; where the tokenizer has a chat
    template (``chat`` None) it goes in as a user's message. yes, no: the answers, scored by their
    first tokens; behind a prompt that is no chat and does not end in white space a space comes
    first.
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        template: str = TEMPLATE,
        yes: str = "yes",
        no: str = "no",
        chat: bool | None = None,
        backend: str | None = None,
    ) -> None:
        checks.optional(checks.flag, "chat", chat, "True, False or None")
        for name, text in (("template", template), ("yes", yes), ("no", no)):
            checks.text(name, text)
            check_unicode(name, text)
        check_template("template", template)
        self.network = models.as_language_model(model)
        check_tokenizer(tokenizer)
        self.tokenizer, self.template = tokenizer, template
        self.chat = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
        self.backend = backend
        self.run = ScoringRun([self.network], tokenizer, backend=backend)  # the last ``ask``'s
        self.answers = yes, no
        self.tokens = self._answer(yes, "yes"), self._answer(no, "no")
        if self.tokens[0] == self.tokens[1]:
            raise InputError(
                f"yes, no: expected answers that differ in their first token, got {yes!r} and {no!r}"
            )

    def prompt(self, text: str, before: str = "") -> str:
        """What the model reads before it answers about ``text``, which follows ``before``."""
        put = {PLACE: text, PROMPT: before}
        filled = re.sub("|".join(map(re.escape, put)), lambda place: put[place[0]], self.template)
        return chat_text(self.tokenizer, filled) if self.chat else filled

    def _answer(self, answer: str, name: str) -> int:
        """First token of an answer as it follows the prompt."""
        before = self.prompt("")
        if not self.chat and answer and not (before[-1:].isspace() or answer[0].isspace()):
            answer = " " + answer
        tokens = following(
            self._ids(before), self._ids(before + answer), plain(self.tokenizer, answer)
        )
        if not len(tokens):
            raise InputError(f"{name}: expected an answer of a token or more, got {answer!r}")
        return int(tokens[0])

    def _ids(self, prompt: str) -> np.ndarray:
        """A chat template puts BOS where it belongs."""
        return (plain if self.chat else encode)(self.tokenizer, prompt)

    @property
    def words(self) -> tuple[str, str]:
        """The two answers as they are scored: of a longer one the first token, which may begin
        other words, too.
        """
        yes, no = (text_of(self.tokenizer, [token]) for token in self.tokens)
        return yes, no

    @property
    def notes(self) -> list[str]:
        """What a reader must know of the model's weights and of the last ``ask``'s batches."""
        return [*models.loading_notes(self.network), *self.run.batching.notes]

    def ids(self, text: str, before: str = "") -> tuple[np.ndarray, bool]:
        """The prompt's tokens, and whether something was left out to make it fit the model's
        context: the beginning of ``before``, then the end of ``text``, never the question."""
        limit = self.network.context_length
        ids = self._ids(self.prompt(text, before))
        if not len(ids):
            raise InputError("template: expected a prompt of at least one token, got none")
        if limit is None or len(ids) <= limit:
            return ids, False
        kept = plain(self.tokenizer, text).tolist()
        ahead = plain(self.tokenizer, before).tolist() if PROMPT in self.template else []
        while len(ids) > limit:
            more = len(ids) - limit + SHORTER
            if ahead:
                ahead = ahead[more:]
            elif kept:
                kept = kept[: max(0, len(kept) - more)]
            else:
                raise InputError(
                    f"template: expected one that leaves room for a text, got {len(ids)} tokens of {limit}"
                )
            ids = self._ids(
                self.prompt(text_of(self.tokenizer, kept), text_of(self.tokenizer, ahead))
            )
        return ids, True

    def ask(
        self,
        texts: Iterable[Document | str],
        *,
        prompts: Iterable[str] | None = None,
        batch_size: int | None = None,
        journal: str | Path | None = None,
    ) -> Iterator[Answer]:
        """An ``Answer`` for each text, in order, as they come; ``batch_size`` prompts at a time, by
        default a few thousand tokens.

        prompts: what each text follows, for a template with ``{prompt}``.
        journal: a folder; the same call again goes on where a killed one stopped, to the same bits.
        """
        batch_size = checks.optional(checks.integer, "batch_size", batch_size, least=1)
        checks.several("texts", texts, "them", (Document,))
        checks.optional(checks.several, "prompts", prompts, "texts")
        checks.optional(checks.path, "journal", journal)
        return self._asked(texts, prompts, batch_size, journal)

    def _asked(
        self,
        texts: Iterable[Document | str],
        prompts: Iterable[str] | None,
        batch_size: int | None,
        journal: str | Path | None,
    ) -> Iterator[Answer]:
        self.run = run = ScoringRun(
            [self.network], self.tokenizer, backend=self.backend, batch_size=batch_size
        )
        with run:
            run.keep_in(journal, self._settings() if journal is not None else {})
            scored = run.stream(
                continuations(self._positions(run, texts, prompts)), self._score, fields=3
            )
            for item in scored:
                nll_yes, nll_no, first = item.values[:, 0].tolist()
                if math.isnan(nll_yes) or math.isnan(nll_no):
                    raise InputError(
                        f"model: expected probabilities, got NaN for text {item.positions.document.id}"
                    )
                document = item.positions.document
                token = text_of(self.tokenizer, [int(first)])
                shortened = bool(item.positions.skipped["shortened"])
                yield Answer(document.id, math.exp(-nll_yes), math.exp(-nll_no), token, shortened)

    def _settings(self) -> dict:
        return {
            "model": models.fingerprint(self.network),
            "template": self.prompt(PLACE),
            "answers": list(self.tokens),
        }

    def _positions(
        self, run: ScoringRun, texts: Iterable[Document | str], prompts: Iterable[str] | None
    ) -> Iterator[tuple[Positions, int]]:
        for index, (text, before) in enumerate(_paired(texts, prompts)):
            document = checked_document(index, text)
            if document.ids is not None:
                document = replace(document, text=self._decoded(document), ids=None)
            run.read(index, before + document.text)
            ids, shortened = self.ids(document.text, before)
            check_ids(
                document,
                np.append(ids, self.tokens),
                run.vocabulary,
                "the model's vocabulary",
                self.tokenizer,
            )
            if len(ids) > 1:
                run.verify(ids, self.network.context_length)
            # The answer's place is scored; what stands there is not read.
            positions = Positions(document, np.append(ids, self.tokens[0]), 0)
            positions.skipped["shortened"] = int(shortened)
            yield positions, len(ids)

    def _decoded(self, document: Document) -> str:
        ids = np.asarray(document.ids)
        check_ids(document, ids, len(self.tokenizer), "the tokenizer's entries")
        return text_of(self.tokenizer, ids, skip_special_tokens=True)

    @torch.no_grad()
    def _score(self, input_ids: Tensor, target: Tensor) -> Tensor:
        """[3, rows]: NLL of yes, NLL of no, the model's own first choice."""
        hidden = self.network.hidden_states(input_ids)[target != IGNORED]  # [rows, D]
        answers = torch.tensor(self.tokens, device=hidden.device).repeat(len(hidden))
        head = self.network.head
        with torch.autocast(hidden.device.type, enabled=False):
            found = token_statistics(
                hidden.repeat_interleave(2, 0),
                head.weight,
                answers,
                **head.arguments(),
                backend=self.run.backend,
            )
        nll = found.nll.view(-1, 2)
        return torch.stack([nll[:, 0], nll[:, 1], found.predicted.view(-1, 2)[:, 0].float()])


def _paired(
    texts: Iterable[Document | str],
    prompts: Iterable[str] | None,
) -> Iterator[tuple[Document | str, str]]:
    """Yield each text with its prompt ("" without ``prompts``); InputError where one is alone."""
    if prompts is None:
        yield from ((text, "") for text in texts)
        return
    for index, (text, before) in enumerate(zip_longest(texts, prompts)):
        if text is None or before is None:
            name = "prompts" if before is None else "texts"
            raise InputError(f"{name}: expected one prompt for each text, got none at {index}")
        checks.text(f"prompts[{index}]", before)
        yield text, before


class Tally:
    """Sums over answers to a question, eight bytes a text."""

    def __init__(self, judge: Questioner) -> None:
        self.answers = judge.words
        self.p_yes, self.p_no, self.two, self.both, self.shortened = array("d"), 0.0, 0.0, 0, 0
        self.first: Counter = Counter()

    def __len__(self) -> int:
        return len(self.p_yes)

    def add(self, answer: Answer) -> None:
        self.p_yes.append(answer.p_yes)
        self.p_no += answer.p_no
        if answer.yes_of_two is not None:
            self.two, self.both = self.two + answer.yes_of_two, self.both + 1
        self.first[answer.first] += 1
        self.shortened += answer.shortened

    def summary(self) -> dict | None:
        """answers: the two tokens that are scored. Means over texts: p_yes, p_no, yes_of_two (where
        it is one), answered (p_yes + p_no); percentiles of p_yes; the most common first choices.
        None without a text."""
        count = len(self)
        if not count:
            return None
        p_yes = np.array(self.p_yes)
        return {
            "texts": count,
            "answers": list(self.answers),
            "p_yes": float(p_yes.mean()),
            "p_no": self.p_no / count,
            "answered": float(p_yes.mean()) + self.p_no / count,
            "yes_of_two": self.two / self.both if self.both else None,
            "percentiles": {str(at): float(np.percentile(p_yes, at)) for at in (10, 50, 90)},
            "first_choices": dict(self.first.most_common(3)),
            "shortened": self.shortened,
        }
