"""A test that expects a failure says which: a bare `pytest.raises(AssertionError)` is content with any accident.

Of what is so general that anything may raise it, the test has to match the message or look at what was
caught. The base classes of the product's own errors count as general too.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
GENERAL = {"Exception", "BaseException", "AssertionError", "RuntimeError", "OSError", "RankFailure", "UcpError"}


def careless(source: str) -> list[str]:
    """Lines of `pytest.raises` of something general without `match` and without `as caught`; and of assertions that a
    text is merely another one (`!= "global_step8"`), which a thousand wrong values satisfy."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.With):
            found += [f"{item.context_expr.lineno}: raises" for item in node.items if _is_general(item)]
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.Compare):
            last = node.test.comparators[-1]
            is_text = isinstance(last, ast.Constant) and isinstance(last.value, str)
            if isinstance(node.test.ops[-1], ast.NotEq) and is_text:
                found.append(f"{node.lineno}: != {last.value!r}")
    return found


def _is_general(item: ast.withitem) -> bool:
    call = item.context_expr
    if not isinstance(call, ast.Call) or ast.unparse(call.func) != "pytest.raises" or not call.args:
        return False
    kinds = call.args[0].elts if isinstance(call.args[0], ast.Tuple) else call.args[:1]
    is_general = any(ast.unparse(kind) in GENERAL for kind in kinds)
    return is_general and item.optional_vars is None and not any(key.arg == "match" for key in call.keywords)


def test_every_general_failure_is_matched():
    files = sorted(TESTS.rglob("test_*.py"))
    assert len(files) > 80
    found = {str(path.relative_to(TESTS)): lines for path in files if (lines := careless(path.read_text()))}
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "with pytest.raises(AssertionError):\n    run()",
        "with pytest.raises((ValueError, UcpError)):\n    run()",
        "with open(x) as f, pytest.raises(RankFailure):\n    run()",
        'assert latest.read_text() != "global_step8"',
    ],
)
def test_planted_faults_are_seen(text):
    assert len(careless(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        'with pytest.raises(AssertionError, match="x"):\n    run()',
        "with pytest.raises(UcpError) as caught:\n    run()",
        "with pytest.raises(MissingFileError):\n    run()",
        "assert first != second",
    ],
)
def test_what_says_enough_passes(text):
    assert careless(text) == []
