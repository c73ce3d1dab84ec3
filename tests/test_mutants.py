"""Mutation testing itself: the operators, the draw, the probes. No mutant is run here."""

import ast
import itertools

import pytest

pytest.importorskip("resource")  # there is none on Windows
import mutants
from equivalent_mutants import EQUIVALENT

SOURCES = mutants.mutated_sources()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("if a < b: pass", {"if a <= b: pass", "if not (a < b): pass"}),
        ("if a == b: pass", {"if a != b: pass"}),
        ("if a is not None: pass", {"if a is None: pass"}),
        ("x = a not in b", {"x = a in b"}),
        ("x = (a) <= (b)", {"x = (a) < (b)"}),
        ("x = a and b or c", {"x = a or b or c", "x = a and b and c"}),
        ("x = not a", {"x = (a)"}),
        ("x = ~a", {"x = (a)"}),
        ("x = -a", {"x = (a)"}),
        ("x = a // b", {"x = a * b"}),
        ("x -= a", {"x += a"}),
        ("x = -100", {"x = -101", "x = -99"}),
        ("x = 0", {"x = 1"}),
        ("x = 0.25", {"x = 0.5"}),
        ("x = 0.0", {"x = 1.0"}),
        ("x = True", {"x = False"}),
        ("x = a.sum(-1)", {"x = a.sum(0)"}),
        ("x = f(a, dim=1)", {"x = f(a, dim=0)"}),
        ("x = a.amax()", {"x = a.amin()"}),
        ("f(a)", {"pass"}),
        ("x = where(a, b, c)", {"x = where(((a) == 0), b, c)"}),
        ("x.masked_fill_(a, b)", {"pass", "x.masked_fill_(~(a), b)"}),
        ("x = load(p, mask=a)", {"x = load(p, mask=(a) == 0)"}),
        ("x = a[b:]", {"x = a[(b) + 1:]", "x = a[b:-1]"}),
        ("x = a[:b]", {"x = a[1:b]", "x = a[:(b) - 1]"}),
        ("x = range(a, b)", {"x = range(a, b - 1)"}),
        ("x = [a for a in b if c]", {"x = [a for a in b if not (c)]"}),
        ("x = '·' + a * b", {"x = '·' + a / b"}),  # positions count bytes
    ],
)
def test_the_operators(line, expected):
    source = line.encode()
    assert {
        mutation.apply(source).decode() for mutation in mutants.mutations("m.py", source)
    } == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""1 < 2"""',
        "from a import b",
        "x: Literal[1]",
        "def f(a: Literal[1]) -> Literal[2]: return a",
        "raise ValueError(1 + 1)",
        'x = f"{a + 1}"',
        "@f(1)\ndef g(): return a",
        "class A:\n    def __repr__(self): return a + 1",
        "if TYPE_CHECKING:\n    x = 1",
        "__all__ = [1]",
        "x = field(repr=False)",
        "# a < 1",
    ],
)
def test_what_is_never_mutated(source):
    assert mutants.mutations("m.py", source.encode()) == []


def test_every_edit_of_the_product_parses_and_changes_it():
    for mutation in itertools.islice(mutants.draw(3, SOURCES), 60):
        source = SOURCES[mutation.file]
        changed = mutation.apply(source)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), mutation
        before, after = mutation.shown(source)
        assert before != after


def test_a_seed_draws_the_same_mutants_and_another_seed_others():
    first, again, other = (
        list(itertools.islice(mutants.draw(seed, SOURCES), 40)) for seed in (1, 1, 2)
    )
    assert first == again
    assert len({(mutation.file, mutation.statement) for mutation in first}) == 40
    assert len(set(first) & set(other)) < 5


def test_an_edit_elsewhere_moves_no_draw():
    source = b"def f(a):\n    return a + 1\n\n\ndef g(a):\n    return a - 1\n"
    moved = b"# a comment\nx = y\n" + source
    drawn = [list(mutants.draw(5, {"m.py": text})) for text in (source, moved)]
    assert [(m.operator, m.text, m.line + 2) for m in drawn[0]] == [
        (m.operator, m.text, m.line) for m in drawn[1]
    ]


def test_probes_number_the_statements_that_run(monkeypatch):
    source = b'''"""A docstring."""
from __future__ import annotations

def f(a):
    """Another."""
    if a:
        return 1
    elif a is None:
        return 2
    for b in (1,):
        a = b
    return a
'''
    hits = set()
    monkeypatch.setitem(mutants.sys.modules, "_mutants_probe", type("probe", (), {"hits": hits}))
    module = {}
    exec(compile(mutants.with_probes(source, 1000), "m.py", "exec"), module)
    assert module["__doc__"] == "A docstring." and module["f"].__doc__ == "Another."
    assert module["f"](None) == 2 and hits == {1006, 1008, 1009}
    hits.clear()
    assert module["f"](0) == 1 and hits == {1006, 1008, 1010, 1011, 1012}


def test_tests_take_turns():
    """One case of each function, then more: they notice much the same. Slow tests come last."""
    seconds = {
        "tests/evaluation/test_a.py::f[1]": 1.0,
        "tests/evaluation/test_a.py::f[2]": 2.0,
        "tests/evaluation/test_a.py::g": 5.0,
        "tests/evaluation/test_a.py::slow": 60.0,
        "tests/test_b.py::h": 0.1,
        "tests/test_b.py::i": 0.1,
    }
    record = mutants.Record(
        {name: {"seconds": value, "hits": {}} for name, value in seconds.items()}
    )
    order = mutants.order_tests(
        set(seconds) - {"tests/test_b.py::i"}, record, "perplexity/evaluation/a.py"
    )
    assert [name.split("::")[1] for name in order] == ["f[1]", "g", "h", "f[2]", "slow", "i"]


def test_every_explanation_is_of_a_mutant_that_can_be_drawn():
    """An explanation whose line has changed is no longer true of anything."""
    offered = {
        (file, *mutation.shown(SOURCES[file]))
        for file in {entry[0] for entry in EQUIVALENT}
        for mutation in mutants.Finder(file, SOURCES[file]).found
    }
    for *entry, reason in EQUIVALENT:
        assert tuple(entry) in offered, entry
        assert len(reason) > 20, entry
