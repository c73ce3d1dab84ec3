"""Ask-LLM: a model is asked yes or no about a text, and its probability of yes is the text's score.

Source: Sachdeva et al. 2024, How to Train Data-Efficient LLMs (arXiv:2402.09668). The negative
log-likelihoods of the two answers are computed from the hidden state of the prompt's last position
by ``token_statistics``, without logits in memory.
"""

from __future__ import annotations

import functools
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
from ..inputs import choose_backend
from ..scoring.batching import Batching
from ..scoring.protocols import Positions
from ..scoring.run import ScoringRun
from ..scoring.stream import IGNORED, continuations
from ..statistics import token_statistics
from ..text.documents import Document, check_ids, checked_document
from ..text.tokenizers import as_tokenizer
from ..text.tokens import text_of
from .prompts import chat_text, encode, following, plain

TEMPLATE = """Text:
{text}

Is the text above fluent, coherent and informative, without repeating itself? Answer yes or no.
Answer:"""
# The question of a probe, where the text's prompt is known.
PROBE_TEMPLATE = """Prompt:
{prompt}

Continuation, which may be cut off at its end:
{text}

Does the continuation go on from the prompt fluently, sensibly and truthfully, \
without repeating itself? Answer yes or no.
Answer:"""
PLACE, PROMPT = "{text}", "{prompt}"
# Tokens that a long text loses each time beyond its excess: the shorter text may be tokenised into
# more tokens than were kept.
SHORTER = 8


@dataclass(frozen=True)
class Answer:
    """Answer of a judge about one text.

    Attributes:
        id: The text's id; the position of a plain string among the texts.
        p_yes: Probability of the token of yes, among the whole vocabulary.
        p_no: Probability of the token of no, likewise.
        first: The token that the judge holds most probable, as text.
        shortened: Whether a part of the text or its prompt did not fit into the judge's context.

    Example:
        >>> Answer("a", p_yes=0.375, p_no=0.125, first=" yes", shortened=False).yes_of_two
        0.75
    """

    id: str
    p_yes: float
    p_no: float
    first: str
    shortened: bool

    @property
    def yes_of_two(self) -> float | None:
        """Return p_yes / (p_yes + p_no); None where both probabilities are 0."""
        both = self.p_yes + self.p_no
        return self.p_yes / both if both > 0 else None


def check_template(name: str, template: str) -> None:
    """Check that a question has one place for a text, and at most one for a prompt.

    Args:
        name: Name of the argument or option, for the message.
        template: The question.

    Raises:
        InputError: The template holds ``{text}`` not once, or ``{prompt}`` more than once.

    Example:
        >>> check_template("template", "Is this good?")
        Traceback (most recent call last):
        perplexity.errors.InputError: template: expected {text} in it once, got it 0 times
    """
    if template.count(PLACE) != 1:
        raise InputError(
            f"{name}: expected {PLACE} in it once, got it {template.count(PLACE)} times"
        )
    if template.count(PROMPT) > 1:
        raise InputError(
            f"{name}: expected {PROMPT} in it once at most, got it {template.count(PROMPT)} times"
        )


class Questioner:
    """Judge of texts: a model that answers yes or no to one question.

    Each answer is scored by its first token. It is preceded by a space, unless the question is a
    chat message or ends in white space.

    Args:
        model: A transformers causal model, or another ``LanguageModel``.
        tokenizer: The model's tokenizer, any that ``evaluate`` takes.
        template: The question. It holds ``{text}`` once, and may hold ``{prompt}`` once.
        yes: The answer whose probability is the score, "yes" by default.
        no: The other answer, "no" by default. Its first token has to differ.
        chat: Whether the question is a user's message in the tokenizer's chat template; None (the
            default): where the tokenizer has one.
        backend: "triton" or "torch"; None chooses by the model's device.

    Raises:
        InputError: An argument cannot be used; the message names it.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> words = {word: id for id, word in enumerate("yes no a cat good? <unk>".split())}
        >>> tokens = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        >>> tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>")
        >>> sizes = dict(vocab_size=6, n_embd=8, n_layer=1, n_head=1, n_positions=16)
        >>> config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> judge = Questioner(model, tokenizer, template="{text} good?")
        >>> [(answer.id, 0 < answer.p_yes < 1) for answer in judge.ask(["a cat", "a a cat"])]
        [('0', True), ('1', True)]
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
        self.tokenizer, self.template = as_tokenizer(tokenizer), template
        self.chat = bool(getattr(self.tokenizer, "chat_template", None)) if chat is None else chat
        choose_backend(backend, self.network.head.weight)  # raises for one that cannot run
        self.backend = backend
        self._batching: Batching | None = None  # of the last ``ask``
        self.answers = yes, no
        self.tokens = self._answer(yes, "yes"), self._answer(no, "no")
        if self.tokens[0] == self.tokens[1]:
            raise InputError(
                "yes, no: expected answers that differ in their first token, "
                f"got {yes!r} and {no!r}"
            )

    def prompt(self, text: str, before: str = "") -> str:
        """Return the question about a text, as the model reads it.

        Args:
            text: Takes the place of ``{text}``.
            before: The prompt of the text; takes the place of ``{prompt}``.
        """
        values = {PLACE: text, PROMPT: before}
        places = "|".join(map(re.escape, values))
        filled = re.sub(places, lambda place: values[place[0]], self.template)
        return chat_text(self.tokenizer, filled) if self.chat else filled

    def _answer(self, answer: str, name: str) -> int:
        """Return the first token of an answer where it follows the question."""
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
        """Return a question's tokens, behind BOS unless the chat template writes BOS itself."""
        return (plain if self.chat else encode)(self.tokenizer, prompt)

    @property
    def words(self) -> tuple[str, str]:
        """Return the texts of the two tokens that are scored: the first token of each answer."""
        yes, no = (text_of(self.tokenizer, [token]) for token in self.tokens)
        return yes, no

    @property
    def notes(self) -> list[str]:
        """Return the notes on the model's weights, and on the batches of the last ``ask``."""
        batches = [] if self._batching is None else self._batching.notes
        return [*models.loading_notes(self.network), *batches]

    def ids(self, text: str, before: str = "") -> tuple[np.ndarray, bool]:
        """Return the tokens of the question about a text, and whether a part was left out.

        A question longer than the model's context loses the beginning of ``before`` first, then the
        end of ``text``, and never its own words.

        Args:
            text: The text.
            before: The prompt of the text.

        Returns:
            Token ids [n], and whether the text or its prompt is shortened.

        Raises:
            InputError: The question has no tokens, or leaves no room for a text.
        """
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
                    f"template: expected one that leaves room for a text, "
                    f"got {len(ids)} tokens of {limit}"
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
        """Ask the question about each text, and yield the answers in the order of the texts.

        Args:
            texts: Strings, or ``Document``s with ids of their own.
            prompts: The prompt of each text, for a template with ``{prompt}``.
            batch_size: Questions at a time; None: a few thousand tokens.
            journal: A folder; the same call resumes a killed one there, with bitwise equal results.

        Returns:
            An iterator over one ``Answer`` a text. Texts are read as the iterator advances.

        Raises:
            InputError: An argument or a text cannot be used, or the model gives NaN.
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
        run = ScoringRun(
            [self.network], self.tokenizer, backend=self.backend, batch_size=batch_size
        )
        self._batching = run.batching
        score = functools.partial(self._score, run.backend)
        with run:
            run.keep_in(journal, self._settings() if journal is not None else {})
            scored = run.stream(
                continuations(self._positions(run, texts, prompts)), score, fields=3
            )
            for item in scored:
                nll_yes, nll_no, first = item.values[:, 0].tolist()
                document = item.positions.document
                if math.isnan(nll_yes) or math.isnan(nll_no):
                    raise InputError(
                        f"model: expected probabilities, got NaN for text {document.id}"
                    )
                token = text_of(self.tokenizer, [int(first)])
                shortened = bool(item.positions.skipped["shortened"])
                yield Answer(document.id, math.exp(-nll_yes), math.exp(-nll_no), token, shortened)

    def _settings(self) -> dict:
        """Return what an answer depends on: a journal resumes only where these settings agree."""
        return {
            "model": models.fingerprint(self.network),
            "template": self.prompt(PLACE),
            "answers": list(self.tokens),
        }

    def _positions(
        self, run: ScoringRun, texts: Iterable[Document | str], prompts: Iterable[str] | None
    ) -> Iterator[tuple[Positions, int]]:
        """Yield the tokens of each question with the place of its answer."""
        for index, (text, before) in enumerate(_paired(texts, prompts)):
            document = checked_document(index, text)
            if document.messages is not None:
                document = replace(document, text=document.plain_text)
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
            # The place of the answer is scored, whatever token stands there.
            positions = Positions(document, np.append(ids, self.tokens[0]), 0)
            positions.skipped["shortened"] = int(shortened)
            yield positions, len(ids)

    def _decoded(self, document: Document) -> str:
        ids = np.asarray(document.ids)
        check_ids(document, ids, len(self.tokenizer), "the tokenizer's entries")
        return text_of(self.tokenizer, ids, skip_special_tokens=True)

    @torch.no_grad()
    def _score(self, backend: str, input_ids: Tensor, target: Tensor) -> Tensor:
        """Return NLL of yes, NLL of no (nats) and the most probable token, [3, rows]."""
        hidden = self.network.hidden_states(input_ids)[target != IGNORED]  # [rows, D]
        answers = torch.tensor(self.tokens, device=hidden.device).repeat(len(hidden))
        head = self.network.head
        with torch.autocast(hidden.device.type, enabled=False):
            statistics = token_statistics(
                hidden.repeat_interleave(2, 0),
                head.weight,
                answers,
                **head.arguments(),
                backend=backend,
            )
        nll, first = statistics.nll.view(-1, 2), statistics.predicted.view(-1, 2)[:, 0]
        return torch.stack([nll[:, 0], nll[:, 1], first.float()])


def _paired(
    texts: Iterable[Document | str],
    prompts: Iterable[str] | None,
) -> Iterator[tuple[Document | str, str]]:
    """Yield each text with its prompt, or with "" where there are no prompts.

    Raises:
        InputError: There are more texts than prompts, or more prompts than texts.
    """
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
    """Accumulator of a judge's answers, in eight bytes a text."""

    def __init__(self, judge: Questioner) -> None:
        self.answers = judge.words
        self.p_yes, self.p_no, self.two, self.both, self.shortened = array("d"), 0.0, 0.0, 0, 0
        self.first: Counter = Counter()

    def __len__(self) -> int:
        return len(self.p_yes)

    def add(self, answer: Answer) -> None:
        """Add an answer to the sums."""
        self.p_yes.append(answer.p_yes)
        self.p_no += answer.p_no
        if answer.yes_of_two is not None:
            self.two, self.both = self.two + answer.yes_of_two, self.both + 1
        self.first[answer.first] += 1
        self.shortened += answer.shortened

    def summary(self) -> dict | None:
        """Return the means over all answers; None where there is no answer.

        Returns:
            texts: number of answers; answers: the two tokens that are scored; p_yes, p_no, answered
            (p_yes + p_no) and yes_of_two (where it is defined): means; percentiles: of p_yes;
            first_choices: the most common first choices; shortened: number of shortened questions.
        """
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
