"""Search for terms that a model's forward adds to its token loss, in the forward's source code."""

from __future__ import annotations

import ast
import inspect
import operator
import re
import textwrap
from collections.abc import Iterator

LOSS = re.compile(r"(^|_)loss(es)?$")
# Calls that combine losses; ``a + b`` and the like are operators.
COMBINING = {"sum", "stack", "cat", "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_"}
ROUTER = "output_router_logits"  # the argument of a forward that switches a router's loss on


def extra_terms(model) -> Iterator[str]:
    """Yield one message for each change that ``model.forward`` makes to its token loss.

    A change has no effect if its coefficients are attributes of the model that are all 0. Changes
    under ``if output_router_logits`` are left out: that switch is an argument of each forward.
    Methods of the model with "loss" in their names and the forwards of parent classes are read as
    well. A forward without source code yields nothing.

    Args:
        model: A transformers model.

    Example:
        >>> from types import SimpleNamespace
        >>> list(extra_terms(SimpleNamespace(forward=len)))  # no source code
        []
    """
    name = type(model).__name__
    for tree in _trees(model):
        for statement, expression in _changes(tree):
            coefficients = _coefficients(expression, model)
            if coefficients and not any(coefficients.values()):
                continue
            code = " ".join(ast.unparse(statement).split())
            code = code if len(code) <= 100 else code[:100] + "..."
            if len(coefficients) == 1:
                ((coefficient, value),) = coefficients.items()
                yield (
                    f"{coefficient}: expected 0, got {value}: "
                    f"{name} adds to its token loss by `{code}`"
                )
            else:
                yield f"model: expected the mean loss of next tokens alone, {name} has `{code}`"


def _trees(model) -> Iterator[ast.AST]:
    """Yield the code of the forward, of parents' forwards it calls, and of methods on losses."""
    seen, pending = set(), [inspect.unwrap(model.forward)]
    while pending:
        function = pending.pop()
        function = getattr(function, "__func__", function)
        if function in seen:
            continue
        seen.add(function)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            continue
        yield tree
        for call in ast.walk(tree):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                continue
            owner, method = call.func.value, call.func.attr
            if isinstance(owner, ast.Call) and getattr(owner.func, "id", None) == "super":
                # The class of ``super()`` does not matter: each function is read once.
                parents = [vars(kind).get(method) for kind in type(model).__mro__]
                pending += [
                    inspect.unwrap(parent) for parent in parents if inspect.isfunction(parent)
                ]
            elif getattr(owner, "id", None) == "self" and "loss" in method:
                bound = getattr(model, method, None)
                if method != "loss_function" and inspect.ismethod(bound):
                    pending.append(inspect.unwrap(bound))


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Yield each statement that changes a loss, with the expression of the change."""
    if isinstance(node, ast.If) and any(_name(part) == ROUTER for part in ast.walk(node.test)):
        for part in node.orelse:
            yield from _changes(part)
        return
    value = getattr(node, "value", None)
    if isinstance(node, ast.AugAssign):
        changed = _is_loss(node.target)
    elif isinstance(node, ast.Assign):
        changed = any(map(_is_loss, node.targets)) and _combines(node.value)
    elif isinstance(node, ast.Return):
        changed = value is not None and _combines(value)
    else:
        smoothing = isinstance(node, ast.keyword) and node.arg == "label_smoothing"
        changed = smoothing and getattr(value, "value", None) != 0
    if changed and value is not None:
        yield node, value
    for child in ast.iter_child_nodes(node):
        yield from _changes(child)


def _combines(expression: ast.AST) -> bool:
    """Return whether an expression combines a loss with something else."""
    for node in ast.walk(expression):
        if isinstance(node, ast.BinOp):
            counted = isinstance(node.op, ast.Div) and _name(node.right) == "num_items_in_batch"
            if not counted and (_reads_loss(node.left) or _reads_loss(node.right)):
                return True
        elif isinstance(node, ast.Call) and _name(node.func) in COMBINING:
            parts = [node.func.value] if isinstance(node.func, ast.Attribute) else []
            for part in node.args:
                parts += part.elts if isinstance(part, ast.Tuple) else [part]
            if any(map(_reads_loss, parts)):
                return True
    return False


def _reads_loss(expression: ast.AST) -> bool:
    """Return whether the value of an expression depends on a loss."""
    if isinstance(expression, ast.Attribute) and expression.attr in ("dtype", "device", "shape"):
        return False
    if isinstance(expression, ast.Tuple):  # ``(loss,) + outputs`` is no sum
        return False
    if isinstance(expression, ast.Call):  # a function that is called a loss returns one
        inner = expression.func.value if isinstance(expression.func, ast.Attribute) else None
        words = [word.value for word in expression.keywords]
        return any(
            _reads_loss(part) for part in [inner, *expression.args, *words] if part is not None
        )
    if _is_loss(expression):
        return True
    return any(map(_reads_loss, ast.iter_child_nodes(expression)))


def _is_loss(node: ast.AST) -> bool:
    return LOSS.search(_name(node) or "") is not None


def _name(node: ast.AST) -> str | None:
    """Return the last name of a variable, an attribute or a string key."""
    if isinstance(node, ast.Subscript):
        node = node.slice
    for attribute in ("id", "attr", "value"):
        name = getattr(node, attribute, None)
        if isinstance(name, str):
            return name
    return None


def _coefficients(expression: ast.AST, model) -> dict[str, float]:
    """Return the numbers among the model's attributes in an expression, by their last name."""
    coefficients = {}
    for node in ast.walk(expression):
        path = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if re.fullmatch(r"self(\.\w+)+", path):
            try:
                value = operator.attrgetter(path.removeprefix("self."))(model)
            except AttributeError:
                continue
            if value is None or isinstance(value, int | float):
                coefficients[path.rpartition(".")[2]] = value or 0
    return coefficients
