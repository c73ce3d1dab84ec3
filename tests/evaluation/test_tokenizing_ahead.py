"""Tokenising in a thread ahead of the model: the same documents, in order, and errors in place."""

import threading

import numpy as np
import pytest
from tiny_models import TEXTS

from perplexity.errors import InputError
from perplexity.evaluation import Document
from perplexity.scoring.ahead import in_thread
from perplexity.scoring.protocols import choose_protocol
from perplexity.scoring.reading import TOKENIZED_AT_ONCE, _tokenized


@pytest.mark.parametrize("special_text", ["tokens", "text"])
def test_documents_are_equal_with_and_without_a_thread(tokenizer, special_text):
    protocol = choose_protocol(
        "sliding",
        tokenizer,
        limit=64,
        context_length=None,
        stride=None,
        bos="auto",
        score_special=None,
        special_text=special_text,
    )
    given = [f"{TEXTS[i % 3]} <s> {i}" for i in range(3 * TOKENIZED_AT_ONCE + 5)]
    given[70] = Document("ids", "", ids=np.array([0, 5, 6, 7]))
    here, there = (
        list(_tokenized(tokenizer, given, protocol, "auto", elsewhere))
        for elsewhere in (False, True)
    )
    assert len(here) == len(given)
    for (document, ids, spans), (other, other_ids, other_spans) in zip(here, there, strict=True):
        assert document.text == other.text and document.id == other.id
        np.testing.assert_array_equal(ids, other_ids)
        np.testing.assert_array_equal(spans.ends, other_spans.ends)


def test_the_thread_works_while_a_result_is_used():
    """A thread that waits for the caller would stop this test."""
    second = threading.Event()

    def work(item):
        if item == 1:
            second.set()
        return item, threading.current_thread() is threading.main_thread()

    results = in_thread(work, range(3), lambda item: 10, most=1)
    assert next(results) == (0, False)
    assert second.wait(60)
    assert list(results) == [(1, False), (2, False)]


def test_an_error_comes_at_its_place_and_drawing_is_bounded():
    drawn = []

    def items():
        for item in range(10):
            drawn.append((item, threading.current_thread() is threading.main_thread()))
            if item == 8:
                raise InputError("row 8: broken")
            yield item

    results = in_thread(lambda item: item, items(), lambda item: 1, most=4)
    assert next(results) == 0
    assert drawn == [(item, True) for item in range(4)]
    got = [0]
    with pytest.raises(InputError, match="row 8"):
        got.extend(results)
    assert got == list(range(8))

    failing = in_thread(lambda item: 1 // (item - 2), range(5), lambda item: 1, most=4)
    assert [next(failing), next(failing)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(failing)


def test_a_stream_that_is_left_early_leaves_no_thread():
    before = threading.active_count()
    results = in_thread(lambda item: item, range(100), lambda item: 1, most=50)
    next(results)
    results.close()
    assert threading.active_count() == before
