"""Work that a thread does ahead of its use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_thread(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    size: Callable[[Item], int],
    most: int,
) -> Iterator[Result]:
    """Yield ``function`` of each item in order, computed by one thread ahead of the caller.

    Items are drawn in the caller's thread. An error, also one of drawing, is raised at its place:
    after the results of all items before.

    Args:
        function: A function of an item, called in the thread.
        items: The items.
        size: A function of an item.
        most: Further items are drawn while the sizes of those ahead sum to less.

    Example:
        >>> list(in_thread(str.upper, ["a", "bc"], len, 10))
        ['A', 'BC']
    """
    pool = ThreadPoolExecutor(1)
    try:
        ahead: deque[tuple[Future[Result], int]] = deque()
        submitted, held = _submitted(pool, function, items, size), 0
        while True:
            # Two at least: the one that is waited for, and one for the thread meanwhile.
            while held < most or len(ahead) < 2:
                each = next(submitted, None)
                if each is None:
                    break
                ahead.append(each)
                held += each[1]
            if not ahead:
                return
            future, its_size = ahead.popleft()
            held -= its_size
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _submitted(
    pool: ThreadPoolExecutor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    size: Callable[[Item], int],
) -> Iterator[tuple[Future[Result], int]]:
    """Yield the future and the size of each item; the last is an error of drawing, if any."""
    try:
        for item in items:
            yield pool.submit(function, item), size(item)
    except Exception as error:
        failed: Future[Result] = Future()
        failed.set_exception(error)
        yield failed, 0
