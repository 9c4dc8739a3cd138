"""Policies and surrogate forms are rows of two tables: nobody else asks for their names."""

from __future__ import annotations

import ast

from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_runtime.plan.surrogate import SURROGATES

from tests.test_layout import MODULES, ROOT, tree

TABLES = {"lora_drop_runtime.plan.policy", "lora_drop_runtime.plan.surrogate"}


def spelled(tree: ast.AST) -> list[str]:
    """The names that a module spells as a string of its own; longer strings, as messages are, may contain them."""
    names = {*POLICIES, *SURROGATES}
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in names]


def test_nobody_else_spells_a_policy_or_a_surrogate() -> None:
    """Neither in a comparison, nor as a default, nor as a key: the row's facts and DEFAULT_… are there for that."""
    for name in MODULES.keys() - TABLES:
        assert not spelled(tree(name)), name
    for path in (ROOT / "examples").glob("*.py"):
        assert not spelled(ast.parse(path.read_text())), path


def test_what_is_looked_for_is_found() -> None:
    source = 'if policy == "skip" or form in ("recurrent", other): print("residual starts from the input")'
    assert spelled(ast.parse(source)) == ["skip", "recurrent"]
    assert set(MODULES) >= TABLES
    assert all(spelled(tree(table)) for table in TABLES)
