"""Mutation testing: ``make mutants SEED=n`` changes the product and runs the tests that may notice.

A seed draws statements that the tests run, and one edit for each (the operators are `Finder`'s).
Each edit is applied to a copy of the tree. The tests that run the statement are run there until one
fails. An edit that no test notices is a missing test, or it changes nothing that can be observed:
`equivalent_mutants.py` then says why.

Mutated are `kernels/`, the losses with their arguments, statistics and metric,
`perplexity/evaluation`, `perplexity/monitor` and `perplexity/data_checks`. Never mutated are
docstrings, annotations, decorators, imports, `raise` statements and f-strings (texts of errors),
`__repr__`, and `OFF_THE_CPU`, files that only a GPU or a compiler can test.

A copy of the tree with a probe before every statement records which tests run it. A probe costs a
`set.add`; a tracer would double the time of the interpreted kernels, about half of the tests. The
record takes as long as the tests themselves. It is kept in `build/mutants/`: a test file's share is
valid for as long as that file, the tests' helpers and the sources stay the same. Only tests of the
mutated packages are recorded: an edit that only another package's tests would notice lives.

All times are processor time, children included: wall time means little on shared cores.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "mutants"

MUTATED = (
    "kernels/**/*.py",
    *(
        f"perplexity/{name}.py"
        for name in (
            "losses",
            "nn",
            "statistics",
            "metric",
            "inputs",
            "checks",
            "tensor_checks",
            "nats",
            "calibration",
            "fingerprints",
        )
    ),
    *(
        f"perplexity/{name}/**/*.py"
        for name in ("text", "models", "scoring", "evaluation", "monitor", "data_checks")
    ),
)
# Their tests need a GPU or a compiler: a mutant of them would live here whatever the tests say.
OFF_THE_CPU = ("kernels/compile_check.py", "kernels/compile_cost.py")
TESTS = (
    "test_*.py",
    "kernels/test_*.py",
    *(f"{name}/test_*.py" for name in ("evaluation", "monitor", "data_checks")),
)
OTHER_TESTS = ("test_demo.py", "test_readme.py", "test_training_curve.py", "test_mutants.py")
LEFT_OUT = (
    # A hash of the device code changes with every mutant. Compiled kernels cannot hold probes.
    "kernels/test_compile_check.py::test_the_committed_table_is_of_this_device_code",
    "kernels/test_compile_check.py::test_a_covering_set_compiles_for_every_target",
    "kernels/test_compile_cost.py::test_no_kernel_costs_more_than_its_committed_row",
    # Half a minute each, more than a mutant's share; others run the same statements.
    "evaluation/test_cost.py::test_peak_memory",
    "evaluation/test_distributed.py::test_ranks_give_the_single_process_numbers[3]",
    "evaluation/test_journal.py::test_killed_at_fifty_drawn_places",
    "test_cli.py::test_everything_at_once",
    "test_parallel.py::test_a_sharded_vocabulary_equals_one_process[3-triton]",
)
COPIED = (
    "kernels",
    "perplexity",
    "tests",
    "docs",
    "examples",
    "bench",
    "README.md",
    "pyproject.toml",
)

SECONDS_IN_ALL = 1800.0
FIRST_SECONDS = 25.0  # of tests for every mutant; those that still live share the rest
SLOW_SECONDS = 8.0  # of a test that is run after all others
LEAST_SECONDS = 8.0  # to start Python, torch and pytest
MOST_MEMORY = 12 << 30  # bytes of a mutant that allocates without end


# ---- the operators


@dataclass(frozen=True)
class Mutation:
    """One edit: the bytes [start, end) of a file become ``text``."""

    file: str
    line: int  # where the edit begins
    statement: int  # the line whose probe says that the edited code ran
    operator: str
    start: int
    end: int
    text: str

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]

    def shown(self, source: bytes) -> tuple[str, str]:
        """Return the edited line before and after, without its indentation."""
        first = source.rfind(b"\n", 0, self.start) + 1
        last = source.find(b"\n", self.end)
        before = source[first:last].decode()
        after = self.apply(source)[
            first : last + len(self.text.encode()) - (self.end - self.start)
        ].decode()
        return " ".join(before.split()), " ".join(after.split())


COMPARISONS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
ARITHMETIC = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
OPPOSITES = (
    "min max, minimum maximum, amin amax, argmin argmax, all any, floor ceil, zeros ones, "
    "startswith endswith"
)
SWAPPED_CALLS = {
    name: other
    for pair in map(str.split, OPPOSITES.split(","))
    for name, other in (pair, pair[::-1])
}
REDUCTIONS = {
    "sum",
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "argmax",
    "argmin",
    "all",
    "any",
    "cumsum",
    "logsumexp",
}
AXES = {0: 1, 1: 0, 2: 1, -1: 0, -2: -1}


class Finder(ast.NodeVisitor):
    """The edits that the operators offer in one file."""

    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source, self.found = file, source, []
        self.lines = [0]
        for line in source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.statement = 0
        self.done: set[ast.AST] = set()  # nodes that an operator of their own has dealt with
        self.visit(ast.parse(source))

    def start(self, node: ast.AST) -> int:
        return self.lines[node.lineno - 1] + node.col_offset

    def end(self, node: ast.AST) -> int:
        return self.lines[node.end_lineno - 1] + node.end_col_offset

    def code(self, node: ast.AST) -> str:
        return self.source[self.start(node) : self.end(node)].decode()

    def add(self, operator: str, start: int, end: int, text: str) -> None:
        line = self.source.count(b"\n", 0, start) + 1
        self.found.append(Mutation(self.file, line, self.statement, operator, start, end, text))

    def replace(self, operator: str, node: ast.AST, text: str) -> None:
        self.add(operator, self.start(node), self.end(node), text)

    def between(self, operator: str, left: ast.AST, right: ast.AST, old: str, new: str) -> None:
        """Replace the token between two operands."""
        start, end = self.end(left), self.start(right)
        word = r"\b" if old[0].isalpha() else ""
        pattern = word + re.escape(old).replace(r"\ ", r"\s+") + word
        gap = re.sub(rb"#[^\n]*", lambda comment: b" " * len(comment[0]), self.source[start:end])
        if match := re.search(pattern.encode(), gap):
            self.add(operator, start + match.start(), start + match.end(), new)

    # What is never mutated.

    def visit(self, node: ast.AST) -> None:
        if isinstance(
            node, ast.Import | ast.ImportFrom | ast.Raise | ast.JoinedStr | ast.Assert | ast.Delete
        ):
            return
        if isinstance(node, ast.stmt):
            self.statement = node.lineno
        super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name == "__repr__":
            return
        first = (
            node.body[1]
            if ast.get_docstring(node) is not None and len(node.body) > 1
            else node.body[0]
        )
        self.statement = first.lineno  # a default is what the function's own statements see
        for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        if not any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            self.generic_visit(node)

    # The operators.

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, kind, right in zip(operands, node.ops, operands[1:], strict=False):
            self.between("comparison", left, right, *COMPARISONS[type(kind)])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        pair = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between("and/or", left, right, *pair)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        texts = any(
            isinstance(side, ast.JoinedStr)
            or (isinstance(side, ast.Constant) and isinstance(side.value, str))
            for side in (node.left, node.right)
        )
        if type(node.op) in ARITHMETIC and not texts:
            self.between("arithmetic", node.left, node.right, *ARITHMETIC[type(node.op)])
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in ARITHMETIC:
            old, new = (f"{token}=" for token in ARITHMETIC[type(node.op)])
            self.between("arithmetic", node.target, node.value, old, new)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self.replace("condition", node, f"({self.code(node.operand)})")
        elif isinstance(node.op, ast.Invert):
            self.replace("mask", node, f"({self.code(node.operand)})")
        elif isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            self.replace("arithmetic", node, f"({self.code(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if node in self.done:
            return
        if isinstance(value, bool):
            self.replace("flag", node, str(not value))
        elif isinstance(value, int):
            self.replace("constant", node, str(value + 1))
            if value > 0:
                self.replace("constant", node, str(value - 1))
        elif isinstance(value, float):
            self.replace("constant", node, repr(2 * value) if value else "1.0")

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self.replace("dropped call", node, "pass")
        self.generic_visit(node)

    def negate(self, test: ast.expr) -> None:
        one = isinstance(test, ast.Compare) and len(test.ops) == 1
        if one and type(test.ops[0]) in (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn):
            return  # the comparison's own operator does that
        if not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)):
            self.replace("condition", test, f"not ({self.code(test)})")

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in self.code(node.test) or "__name__" in self.code(node.test):
            return
        self.negate(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        if not isinstance(node.test, ast.Constant):
            self.negate(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.negate(test)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = (
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        )
        if name in SWAPPED_CALLS:
            end = self.end(node.func)
            self.add("extreme", end - len(name), end, SWAPPED_CALLS[name])
        if name == "range" and node.args:
            stop = node.args[min(1, len(node.args) - 1)]
            self.replace("bound", stop, f"{self.code(stop)} - 1")
        if name == "where" and len(node.args) == 3:
            self.replace("mask", node.args[0], f"(({self.code(node.args[0])}) == 0)")
        if name.startswith("masked_fill") and node.args:
            self.replace("mask", node.args[0], f"~({self.code(node.args[0])})")
        axes = [keyword.value for keyword in node.keywords if keyword.arg in ("dim", "axis")]
        if name in REDUCTIONS and isinstance(node.func, ast.Attribute) and len(node.args) == 1:
            axes.append(node.args[0])
        for axis in axes:
            self.axis(axis)
        for keyword in node.keywords:
            if keyword.arg == "repr":  # of a dataclass's field: as `__repr__`
                self.done.add(keyword.value)
            if keyword.arg == "mask" and not isinstance(keyword.value, ast.Constant):
                self.replace("mask", keyword.value, f"({self.code(keyword.value)}) == 0")
        self.generic_visit(node)

    def axis(self, node: ast.expr) -> None:
        try:
            value = ast.literal_eval(node)
        except ValueError:
            return
        if type(value) is int and value in AXES:
            self.replace("axis", node, str(AXES[value]))
            self.done.update(ast.walk(node))

    def visit_Slice(self, node: ast.Slice) -> None:
        if node.lower is None and node.upper is not None:
            self.add("bound", self.start(node), self.start(node), "1")
        elif node.upper is None and node.lower is not None and node.step is None:
            self.add("bound", self.end(node), self.end(node), "-1")
        for bound, change in ((node.lower, "+ 1"), (node.upper, "- 1")):
            if bound is not None and not isinstance(bound, ast.Constant):
                self.replace("bound", bound, f"({self.code(bound)}) {change}")
        self.generic_visit(node)


def mutations(file: str, source: bytes) -> list[Mutation]:
    """Return every edit that the operators offer in a file and that gives code which parses."""
    return [mutation for mutation in Finder(file, source).found if parses(mutation.apply(source))]


def parses(source: bytes) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def draw(seed: int, sources: dict[str, bytes]) -> Iterator[Mutation]:
    """Yield one mutation a statement, in the seed's order.

    A statement's place follows from its own text: an edit elsewhere moves no other draw.
    """
    places = []
    for file, source in sorted(sources.items()):
        statements = defaultdict(list)
        for mutation in Finder(file, source).found:
            statements[mutation.statement].append(mutation)
        lines = source.splitlines()
        seen = defaultdict(int)
        for statement, offered in sorted(statements.items()):
            text = lines[statement - 1].decode().strip()
            seen[text] += 1
            generator = random.Random(f"{seed} {file} {text} {seen[text]}")
            places.append((generator.random(), file, statement, generator, offered))
    for _, file, _, generator, offered in sorted(places, key=lambda place: place[:3]):
        operators = sorted({mutation.operator for mutation in offered})
        while operators:
            operator = operators.pop(generator.randrange(len(operators)))
            choice = generator.choice(
                [mutation for mutation in offered if mutation.operator == operator]
            )
            if parses(choice.apply(sources[file])):
                yield choice
                break


# ---- which tests run which statement

PROBE = '''
"""Statements that ran, by number; a process that a test starts leaves its own in a file."""
import atexit, json, os
from contextlib import suppress

hits, exit_at_once = set(), os._exit


def leave(*status):
    test = os.environ.get("PYTEST_CURRENT_TEST", "")
    path = f"{os.environ['MUTANTS_HITS']}/{os.getpid()}-{id(hits)}"
    with suppress(OSError):  # a test may forbid files, or bytes of them
        with open(path, "w") as file:
            json.dump([test, sorted(hits)], file)
        os.replace(path, f"{path}.json")
    if status:
        exit_at_once(*status)


os._exit = leave  # how forked processes end, and those that must not wait for their threads
os.register_at_fork(after_in_child=hits.clear)
if "PYTEST_CURRENT_TEST" in os.environ:  # pytest's own process is told by the plugin
    atexit.register(leave)
'''
FILE_LINES = 100_000  # a probe's number is the file's place times this, plus the line


class Probes(ast.NodeTransformer):
    """A module with `_hit(number)` before every statement."""

    def __init__(self, base: int) -> None:
        self.base = base

    def visit(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(node, name, None)
            if isinstance(statements, list) and not isinstance(node, ast.Module):
                setattr(
                    node,
                    name,
                    [each for statement in statements for each in self.probed(statement)],
                )
        return node

    def probed(self, statement: ast.stmt) -> tuple[ast.stmt, ...]:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            return (statement,)  # a docstring stays the first
        return ast.parse(f"_hit({self.base + statement.lineno})").body[0], statement


def is_future(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ImportFrom) and statement.module == "__future__"


def with_probes(source: bytes, base: int) -> str:
    """Return the source with probes."""
    module = Probes(base).visit(ast.parse(source))
    first = [
        ast.get_docstring(module) is not None,
        *(is_future(statement) for statement in module.body),
    ]
    place = sum(first)  # after the docstring and what must follow it
    module.body[place:place] = ast.parse(
        "from _mutants_probe import hits as _hits\n_hit = _hits.add"
    ).body
    return ast.unparse(ast.fix_missing_locations(module)) + "\n"


def mutated_sources() -> dict[str, bytes]:
    """Return the files that are mutated, by their path from the root."""
    files = {
        str(path.relative_to(ROOT)): path
        for pattern in MUTATED
        for path in sorted(ROOT.glob(pattern))
    }
    return {name: path.read_bytes() for name, path in files.items() if name not in OFF_THE_CPU}


def recorded_tests() -> list[str]:
    """Return the test files whose tests are recorded and run."""
    found = {path for pattern in TESTS for path in (ROOT / "tests").glob(pattern)}
    return sorted(str(path.relative_to(ROOT)) for path in found if path.name not in OTHER_TESTS)


def file_of(test: str) -> str:
    return test.split("::")[0]


def file_keys(files: list[str]) -> dict[str, str]:
    """Return, for each test file, a hash of all that its record depends on."""
    names = [
        *ROOT.glob("kernels/**/*.py"),
        *ROOT.glob("perplexity/**/*.py"),
        *ROOT.glob("tests/**/*.py"),
    ]
    common = hashlib.sha256()
    for path in sorted(names):
        if not path.name.startswith("test_") and path.name not in (
            "mutants.py",
            "equivalent_mutants.py",
        ):
            common.update(path.read_bytes())
    common.update(f"{PROBE}{LEFT_OUT}{sys.version}".encode())
    return {
        file: hashlib.sha256(common.digest() + (ROOT / file).read_bytes()).hexdigest()
        for file in files
    }


def copy_tree(folder: Path) -> Path:
    """Copy the tree; in the copy `perplexity.kernels` is found without an installation."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*")
            )
        else:
            shutil.copy2(source, folder / name)
    (folder / "perplexity" / "kernels").symlink_to("../kernels")
    return folder


def end_processes_of(folder: Path) -> None:
    """End what still runs in a copy, by its environment: torchrun's workers leave the group."""
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"MUTANTS_ROOT={folder}\0".encode() in environment.read_bytes():
                os.kill(int(environment.parent.name), signal.SIGKILL)


RUNNING: set[Path] = set()  # copies in which a job runs


def stop(*_) -> None:
    """End what runs in the copies, on an interrupt."""
    for folder in RUNNING:
        end_processes_of(folder)
    raise KeyboardInterrupt


def start(folder: Path, job: dict, name: str, **environment: str) -> tuple[int, dict, float]:
    """Run a job in a copy of the tree.

    Returns its exit status, what it wrote, and its processor seconds.
    """
    # Beside the tree, not in it: tests may look at what the tree holds.
    todo = folder.parent / f"{folder.name}-{name}-job.json"
    out = folder.parent / f"{folder.name}-{name}.json"
    out.unlink(missing_ok=True)
    todo.write_text(json.dumps(job | {"out": str(out)}))
    base = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PYTEST", "COVERAGE"))
    }
    base |= dict(
        PYTHONPATH=str(folder),
        PYTHONDONTWRITEBYTECODE="1",
        OMP_NUM_THREADS="1",
        MUTANTS_ROOT=str(folder),
    )
    log = out.with_suffix(".log")
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(folder / "tests" / "mutants.py"), "--job", str(todo)],
            cwd=folder,
            env=base | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        RUNNING.add(folder)
        _, status, usage = os.wait4(process.pid, 0)
        RUNNING.discard(folder)
    process.returncode = os.waitstatus_to_exitcode(status)
    end_processes_of(folder)  # a test that was ended may leave some behind
    written = json.loads(out.read_text()) if out.exists() else {}
    if written.get("wrong_copy"):
        raise RuntimeError(f"{written['wrong_copy']} was imported, expected it from {folder}")
    return process.returncode, written, usage.ru_utime + usage.ru_stime


@dataclass
class Record:
    """Which statements each test runs, and the processor time it takes."""

    # name: {"seconds", "hits": {file: [lines]}}
    tests: dict[str, dict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_statement, self.by_file = defaultdict(set), defaultdict(set)
        for name, test in self.tests.items():
            for file, lines in test["hits"].items():
                self.by_file[file].add(name)
                for line in lines:
                    self.by_statement[file, line].add(name)

    def of_files(self, files: Iterable[str]) -> set[str]:
        return set().union(*(self.by_file[file] for file in files))


def record(workers: int) -> Record:
    """Return the record, made anew for the test files that changed."""
    files = recorded_tests()
    keys = file_keys(files)
    path = BUILD / "record.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept = {file: entry for file, entry in kept.items() if keys.get(file) == entry["key"]}
    stale = [file for file in files if file not in kept]
    if stale:
        print(f"recording which statements the tests of {len(stale)} files run ...", flush=True)
        stale.sort(key=lambda file: (ROOT / file).stat().st_size, reverse=True)
        groups = [group for group in (stale[place::workers] for place in range(workers)) if group]
        with ThreadPoolExecutor(workers) as pool:
            done = list(pool.map(record_group, range(len(groups)), groups))
        minutes = sum(seconds for _, seconds in done) / 60
        print(f"recorded in {minutes:.1f} minutes of processor time")
        for by_file, _ in done:
            kept |= {file: {"key": keys[file], "tests": tests} for file, tests in by_file.items()}
        path.write_text(json.dumps(kept))
        if missing := sorted(set(files) - set(kept)):
            sys.exit(f"not recorded: {', '.join(missing)}; see {BUILD}/*.log, then run this again")
    return Record({name: test for entry in kept.values() for name, test in entry["tests"].items()})


def record_group(number: int, files: list[str]) -> tuple[dict[str, dict], float]:
    """Record the tests of some files in a copy with probes.

    Tests that fail there run again in a copy without: torch.compile, say, refuses a probe.
    """
    folder = copy_tree(BUILD / f"record-{number}")
    sources = mutated_sources()
    for place, (name, source) in enumerate(sources.items(), start=1):
        (folder / name).write_text(with_probes(source, place * FILE_LINES))
    (folder / "_mutants_probe.py").write_text(PROBE)
    hits = folder.parent / f"hits-{number}"
    shutil.rmtree(hits, ignore_errors=True)
    hits.mkdir()
    status, written, seconds = start(folder, {"record": files}, "record", MUTANTS_HITS=str(hits))
    # Cut short, the files that were finished are worth keeping.
    complete = files if status in (0, 1, 5) else written.get("complete", [])
    tests = {
        name: test for name, test in written.get("tests", {}).items() if file_of(name) in complete
    }
    for left in hits.glob("*.json"):
        name, numbers = json.loads(left.read_text())
        if (name := name.rsplit(" (", 1)[0]) in tests:
            tests[name]["numbers"] = sorted({*tests[name]["numbers"], *numbers})
    names = list(sources)
    at_import = [module_statements(source) for source in sources.values()]
    for test in tests.values():
        test["hits"] = defaultdict(list)
        for value in test.pop("numbers"):
            place, line = value // FILE_LINES - 1, value % FILE_LINES
            if line not in at_import[place]:
                test["hits"][names[place]].append(line)
    failed = [name for name, test in tests.items() if test["failed"]]
    if failed:
        again = copy_tree(BUILD / f"plain-{number}")
        job = {"record": sorted({file_of(name) for name in failed}), "only": failed}
        _, plain, more = start(again, job, "plain")
        seconds += more
        for name in failed:
            if name not in plain.get("tests", {}) or plain["tests"][name]["failed"]:
                print(f"fails without any mutant, left out: {name}")
                del tests[name]
            else:
                tests[name]["seconds"] = plain["tests"][name]["seconds"]
        shutil.rmtree(again)
    shutil.rmtree(folder)
    shutil.rmtree(hits)
    by_file = {file: {} for file in complete}
    for name, test in tests.items():
        by_file[file_of(name)][name] = test
    return by_file, seconds


# ---- in the copy: pytest with a plugin


def processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class InTheCopy:
    """A pytest plugin that checks that the copy is what is imported."""

    def __init__(self, job: dict) -> None:
        self.job, self.written, self.failed = job, {"tests": {}, "complete": []}, False

    def write(self) -> None:
        Path(self.job["out"]).write_text(json.dumps(self.written))

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.written["caught"] = f"collecting {report.nodeid}"
            self.write()

    def pytest_collection_finish(self, session) -> None:
        import perplexity
        import perplexity.kernels

        for module in (perplexity, perplexity.kernels):
            if not Path(module.__file__).is_relative_to(os.environ["MUTANTS_ROOT"]):
                self.written["wrong_copy"] = module.__file__
                self.write()
                session.shouldstop = "another copy was imported"

    def pytest_runtest_logreport(self, report) -> None:
        self.failed |= report.failed


class Recording(InTheCopy):
    """The statements that each test runs, and its time."""

    def pytest_collection_modifyitems(self, config, items) -> None:
        only = self.job.get("only")
        items[:] = [item for item in items if only is None or item.nodeid in only]

    def around(self, item, following):
        hits = getattr(sys.modules.get("_mutants_probe"), "hits", set())
        hits.clear()
        self.failed, began = False, processor_seconds()
        yield
        seconds = processor_seconds() - began
        numbers = sorted(hits)
        found = {"seconds": seconds, "numbers": numbers, "failed": self.failed}
        self.written["tests"][item.nodeid] = found
        file = file_of(item.nodeid)
        if following is None or file_of(following.nodeid) != file:
            self.written["complete"].append(file)  # worth keeping, whatever becomes of the rest
            self.write()


class Judging(InTheCopy):
    """Tests in a given order, until one fails or their time is over."""

    def pytest_collection_modifyitems(self, config, items) -> None:
        place = {name: number for number, name in enumerate(self.job["order"])}
        items[:] = sorted(
            (item for item in items if item.nodeid in place), key=lambda item: place[item.nodeid]
        )

    def around(self, item, following):
        expected = self.job["order"][item.nodeid]
        self.written["running"] = item.nodeid
        self.write()
        # A mutant that never ends is caught by processor time, one that waits by the wall clock.
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime + 20 + 10 * expected)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        signal.alarm(int(120 + 20 * expected))
        self.failed = False
        yield
        signal.alarm(0)
        self.written["tests"][item.nodeid] = self.failed
        if self.failed:
            self.written["caught"] = item.nodeid
        elif following is not None:
            spent = processor_seconds() + self.job["order"][following.nodeid]
            if spent > self.job["seconds"]:
                item.session.shouldstop = "out of time"
        self.write()


def in_the_copy(job: dict) -> int:
    """Run a job; called in a process of its own, inside the copy."""
    import pytest

    plugin = (Recording if "record" in job else Judging)(job)

    class Around:
        @pytest.hookimpl(wrapper=True, tryfirst=True)
        def pytest_runtest_protocol(self, item, nextitem):
            steps = plugin.around(item, nextitem)
            next(steps)
            result = yield
            next(steps, None)
            return result

    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
    for name in LEFT_OUT:
        options += ["--deselect", f"tests/{name}"]
    if "order" in job:
        resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, resource.RLIM_INFINITY))
        files = list(dict.fromkeys(file_of(name) for name in job["order"]))
        return pytest.main(["-x", *options, *files], plugins=[plugin, Around()])
    return pytest.main([*options, *job["record"]], plugins=[plugin, Around()])


# ---- a mutant's life


@dataclass
class Mutant:
    """A mutation, the tests that may notice it in the order they run, and how it fared."""

    number: int
    mutation: Mutation
    before: str
    after: str
    order: dict[str, float]  # test name: expected seconds
    covering: int
    explained: str | None = None
    caught: str | None = None
    ran: int = 0

    @property
    def lives(self) -> bool:
        return self.caught is None and self.explained is None


def order_tests(covering: set[str], record: Record, file: str) -> dict[str, float]:
    """Return the tests that run a statement, then the other tests of their files.

    Test functions take turns, for the cases of one function notice much the same: of each its
    cheapest case first, then twice as many, and so on. Within a turn a file's tests stay together,
    for they share fixtures. The files of the mutated package come first, then the cheapest. Tests
    of whole processes come last: on a busy machine they may also fail for want of time.
    """
    package = Path(file).parent.name

    def turns(names: Iterable[str]) -> list[str]:
        functions = defaultdict(list)
        for name in sorted(names, key=lambda name: (record.tests[name]["seconds"], name)):
            functions[name.split("[")[0]].append(name)
        keyed = []
        for function, cases in functions.items():
            test_file = function.split("::")[0]
            mirrors = (
                Path(test_file).parent.name == package
                or Path(test_file).stem == f"test_{Path(file).stem}"
            )
            for place, name in enumerate(cases):
                slow = record.tests[name]["seconds"] > SLOW_SECONDS
                turn = (slow, (place + 1).bit_length())
                keyed.append(
                    (
                        turn,
                        not mirrors,
                        cost[test_file],
                        test_file,
                        record.tests[name]["seconds"],
                        name,
                    )
                )
        return [key[-1] for key in sorted(keyed)]

    cost = defaultdict(float)
    for name in covering:
        cost[file_of(name)] += record.tests[name]["seconds"]
    others = {name for name in record.tests if file_of(name) in cost} - covering
    names = [*turns(covering), *turns(others)]
    return {name: record.tests[name]["seconds"] for name in names}


def importers(file: str, sources: dict[str, bytes]) -> list[str]:
    """Return the file and the mutated files that import it, or something from it."""

    def module(path: str) -> str:
        return Path(path).parent.name if path.endswith("__init__.py") else Path(path).stem

    def imported(path: str) -> set[str]:
        names = set()
        for node in ast.walk(ast.parse(sources[path])):
            if isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[-1] if node.module else Path(path).parent.name)
                names.update(alias.name for alias in node.names)
        return names

    return [path for path in sources if path == file or module(file) in imported(path)]


def module_statements(source: bytes) -> set[int]:
    """Return the lines of the statements that run when the module is imported."""
    found, todo = set(), list(ast.parse(source).body)
    while todo:
        statement = todo.pop()
        found.add(statement.lineno)
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += [
                child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.stmt)
            ]
    return found


def choose(seed: int, count: int, record: Record, sources: dict[str, bytes]) -> list[Mutant]:
    """Return the seed's first ``count`` mutants on statements that tests run."""
    from equivalent_mutants import EQUIVALENT

    reasons = {(file, before, after): reason for file, before, after, reason in EQUIVALENT}
    at_import = {file: module_statements(source) for file, source in sources.items()}
    chosen = []
    for mutation in draw(seed, sources):
        file = mutation.file
        if mutation.statement in at_import[file]:
            covering = record.of_files(importers(file, sources))
        else:
            covering = record.by_statement[file, mutation.statement]
        if not covering:
            continue
        before, after = mutation.shown(sources[file])
        order = order_tests(covering, record, file)
        reason = reasons.get((file, before, after))
        chosen.append(
            Mutant(len(chosen) + 1, mutation, before, after, order, len(covering), reason)
        )
        if len(chosen) == count:
            break
    return chosen


class Budget:
    """Processor seconds that are left, shared by the threads that judge."""

    def __init__(self, seconds: float) -> None:
        self.left, self.lock = seconds, Lock()

    def take(self, most: float) -> float:
        with self.lock:
            taken = min(most, self.left)
            self.left -= taken
            return taken

    def give(self, seconds: float) -> None:
        with self.lock:
            self.left += seconds


def judge(mutant: Mutant, folder: Path, source: bytes, seconds: float) -> float:
    """Run tests that have not run yet, for about so many seconds; return the seconds used."""
    todo = dict(list(mutant.order.items())[mutant.ran :])
    path = folder / mutant.mutation.file
    path.write_bytes(mutant.mutation.apply(source))
    try:
        status, written, used = start(folder, {"order": todo, "seconds": seconds}, "judge")
    finally:
        path.write_bytes(source)
    tests = written.get("tests", {})
    mutant.ran += len(tests)
    if "caught" in written:
        mutant.caught = written["caught"]
    elif status < 0:
        mutant.caught = f"{signal.Signals(-status).name} in {written.get('running', 'an import')}"
    elif status not in (0, 2, 5):
        mutant.caught = f"pytest ends with status {int(status)}"
    elif not tests:
        mutant.ran = len(mutant.order)
    return used


def verdict(mutant: Mutant) -> str:
    if mutant.explained:
        return f"equivalent: {mutant.explained}"
    ran = f"{mutant.ran} of {len(mutant.order)} tests, {mutant.covering} run the line"
    return f"caught by {mutant.caught} ({ran})" if mutant.caught else f"LIVED ({ran})"


def show(mutant: Mutant) -> None:
    mutation = mutant.mutation
    print(f"{mutant.number:3}  {mutation.file}:{mutation.line}  {mutation.operator}")
    print(f"       {mutant.before}\n    -> {mutant.after}\n       {verdict(mutant)}", flush=True)


def run(seed: int, count: int, workers: int, seconds: float) -> int:
    """Draw mutants, judge them, print them. Returns 1 if one lives that nobody has explained."""
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = mutated_sources()
    mutants = choose(seed, count, record(workers), sources)
    budget, began = Budget(seconds), time.monotonic()
    folders = [copy_tree(BUILD / f"tree-{number}") for number in range(workers)]

    def judge_some(mutant: Mutant, most: float) -> None:
        given = budget.take(most + LEAST_SECONDS)
        folder = folders.pop()
        try:
            used = (
                judge(mutant, folder, sources[mutant.mutation.file], given)
                if given > LEAST_SECONDS
                else 0.0
            )
        finally:
            folders.append(folder)
        budget.give(given - used)
        if mutant.caught:
            show(mutant)

    with ThreadPoolExecutor(workers) as pool:
        for mutant in mutants:
            if mutant.explained:
                show(mutant)
        list(
            pool.map(
                lambda mutant: judge_some(mutant, FIRST_SECONDS), [m for m in mutants if m.lives]
            )
        )
        # Those with the fewest tests left come first: what they do not use is the others'.
        living = sorted(
            (m for m in mutants if m.lives and m.ran < len(m.order)),
            key=lambda m: len(m.order) - m.ran,
        )
        for place in range(0, len(living), workers):
            share = budget.left / (len(living) - place)
            list(
                pool.map(
                    lambda mutant, share=share: judge_some(mutant, share),
                    living[place : place + workers],
                )
            )
    lived = [mutant for mutant in mutants if mutant.lives]
    for mutant in lived:
        show(mutant)
    for folder in folders:
        shutil.rmtree(folder)
    caught = sum(mutant.caught is not None for mutant in mutants)
    print(
        f"seed {seed}: {len(mutants)} mutants, {caught} caught, "
        f"{len(mutants) - caught - len(lived)} equivalent, {len(lived)} lived; "
        f"{(seconds - budget.left) / 60:.1f} minutes of processor time, "
        f"{(time.monotonic() - began) / 60:.1f} minutes"
    )
    return 1 if lived else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Break the product on purpose, and see which test notices."
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=40, help="mutants (default 40)")
    parser.add_argument("--workers", type=int, default=1, help="mutants at a time (default 1)")
    minutes = SECONDS_IN_ALL / 60
    parser.add_argument(
        "--minutes", type=float, default=minutes, help="processor minutes in all (default 30)"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return in_the_copy(json.loads(Path(options.job).read_text()))
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    return run(options.seed, options.count, options.workers, 60 * options.minutes)


if __name__ == "__main__":
    sys.exit(main())
