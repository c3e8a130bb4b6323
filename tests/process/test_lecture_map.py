"""The page that leads from formulas to code names what exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [line for line in (ROOT / "docs/lecture-map.md").read_text().splitlines() if "`" in line and line[0] == "|"]


def test_the_page_has_rows() -> None:
    assert len(ROWS) > 30


@pytest.mark.parametrize("row", ROWS)
def test_a_row_names_a_function_and_a_test_that_exist(row: str) -> None:
    function, test = re.findall(r"`([^`]+)::(\w+)`", row)
    assert test[0].startswith("tests/") and test[1].startswith("test_") and not function[0].startswith("tests/")
    for path, name in (function, test):
        nodes = ast.walk(ast.parse((ROOT / path).read_text()))
        assert any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name for n in nodes), f"{path}: {name}"
