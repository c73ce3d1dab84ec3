"""Windows: each position but the first scored exactly once, its predecessor in sight, never more
than the context.
"""

import pytest

from perplexity.scoring.windows import Window, chunk_windows, rolling_windows, sliding_windows


@pytest.mark.parametrize("context_length", [2, 3, 8, 17])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 8, 9, 16, 40, 41])
def test_every_position_is_scored_exactly_once(length, context_length):
    for stride in range(1, context_length):
        windows = list(sliding_windows(length, context_length, stride))
        scored = [position for w in windows for position in range(w.first_scored, w.end)]
        assert scored == list(range(1, length))
        for w in windows:
            assert 0 <= w.begin < w.first_scored < w.end <= length
            assert w.end - w.begin <= context_length
        # Every token after the first window sees at least context_length − stride tokens before it.
        assert all(w.first_scored - w.begin >= context_length - stride for w in windows[1:])


def test_known_windows():
    assert list(sliding_windows(10, 4, 2)) == [
        Window(0, 4, 1),
        Window(2, 6, 4),
        Window(4, 8, 6),
        Window(6, 10, 8),
    ]
    assert list(sliding_windows(6, 4, 3))[-1] == Window(3, 6, 4)


@pytest.mark.parametrize(("context_length", "stride"), [(1, 1), (8, 0), (8, 8), (8, 9)])
def test_impossible_windows_are_refused(context_length, stride):
    with pytest.raises(ValueError, match="context_length|stride"):
        list(sliding_windows(20, context_length, stride))


@pytest.mark.parametrize("context_length", [2, 3, 8, 17])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 8, 9, 10, 16, 17, 18, 40, 41])
def test_rolling_windows_score_every_position_exactly_once(length, context_length):
    windows = list(rolling_windows(length, context_length, context_length))
    scored = [position for w in windows for position in range(w.first_scored, w.end)]
    assert scored == list(range(1, length))
    # The model reads [begin, end − 1): never more than the context, and all of it wherever there is
    # that much.
    assert all(w.end - 1 - w.begin == min(context_length, w.end - 1) for w in windows)


@pytest.mark.parametrize("context_length", [4, 5, 8])
@pytest.mark.parametrize("length", [0, 3, 4, 8, 9, 15, 16, 41])
def test_chunk_windows(length, context_length):
    windows = list(chunk_windows(length, context_length, context_length))
    assert [(w.begin, w.end) for w in windows] == [
        (i * context_length, (i + 1) * context_length) for i in range(length // context_length)
    ]
    # llama.cpp: n_ctx − 1 − n_ctx/2 tokens a chunk, from the one after the middle on.
    assert all(w.end - w.first_scored == context_length - 1 - context_length // 2 for w in windows)
