"""Whether Python on a page could run: it compiles, and what it names in libraries is there."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

_ABSENT = object()


def check_python_text(text: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Raises where a name, an attribute or an argument of a library is not there.

    Args:
        text: of the block.
        known: names that earlier blocks of the page imported.

    Returns:
        What this block and those before it imported.
    """
    tree = ast.parse(text)
    compile(tree, "page", "exec")
    names = {**known, **dict(_imported(tree))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            _resolved(node, names)
        if isinstance(node, ast.Call):
            _check_call(node, names)
    return names


def _imported(tree: ast.AST) -> Iterator[tuple[str, Any]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = import_module(alias.name)
                top = import_module(alias.name.partition(".")[0])
                yield (alias.asname, module) if alias.asname else (top.__name__, top)
        if isinstance(node, ast.ImportFrom):
            module = import_module(str(node.module))
            for alias in node.names:
                yield alias.asname or alias.name, _member(module, alias.name)


def _member(module: Any, name: str) -> Any:
    if hasattr(module, name):
        return getattr(module, name)
    return import_module(f"{module.__name__}.{name}")


def _resolved(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """What an expression of names and dots is; `_ABSENT` where it begins with no import."""
    if isinstance(node, ast.Name):
        return names.get(node.id, _ABSENT)
    if isinstance(node, ast.Attribute):
        whole = _resolved(node.value, names)
        if whole is _ABSENT:
            return _ABSENT
        assert hasattr(whole, node.attr), f"line {node.lineno}: {whole!r} has no `{node.attr}`"
        return getattr(whole, node.attr)
    return _ABSENT


def _check_call(node: ast.Call, names: Mapping[str, Any]) -> None:
    called = _resolved(node.func, names)
    if called is _ABSENT or any(isinstance(argument, ast.Starred) for argument in node.args):
        return
    keywords = {word.arg: None for word in node.keywords if word.arg is not None}
    if len(keywords) < len(node.keywords):
        return
    try:
        signature = inspect.signature(called)
    except ValueError:
        # Written in C, without a signature.
        return
    try:
        signature.bind(*[None] * len(node.args), **keywords)
    except TypeError as error:
        raise AssertionError(f"line {node.lineno}: {ast.unparse(node)}: {error}") from error
