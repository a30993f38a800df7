"""The tree tells the story: packages import what lies below them, so there is no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "lirpa_megatron"
FROM_BELOW = (
    "errors", "arithmetic", "compat", "parallel", "operators", "rounding", "adapters", "problem",
    "forward", "networks", "crown", "bounded_module", "complete", "checkpoint", "report", "verify",
    "training", "cli", "__main__",
)
"""Each may import those before it. `lirpa_megatron` itself offers names of all of them, lazily."""


def rooms(module: str) -> list[str]:
    return module.split(".")[1:2]


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, but for the sake of types alone."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner) for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types or not isinstance(node, ast.ImportFrom):
            continue
        if node.module == "lirpa_megatron":
            yield from (f"lirpa_megatron.{name.name}" for name in node.names)
        elif node.module and node.module.startswith("lirpa_megatron."):
            yield node.module


def test_packages_import_only_what_lies_below_them():
    known = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert known - {"__init__", "__pycache__"} == set(FROM_BELOW)
    upward = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"
        for module in imports(path) for room in rooms(module)
        if room in FROM_BELOW and FROM_BELOW.index(room)
        > FROM_BELOW.index(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    ]
    assert not upward


def test_the_engine_knows_operators_by_what_they_declare():
    """It imports their contract, what they are given and what they return; no operator's class."""
    allowed = {
        "operators", "operators.context", "operators.coefficients", "operators.operator",
        "operators.numerics", "operators.parameters", "operators.affine.form", "operators.tuning",
    }
    for path in [*(PACKAGE / "crown").glob("*.py"), PACKAGE / "bounded_module.py"]:
        used = {m.removeprefix("lirpa_megatron.") for m in imports(path)}
        assert {m for m in used if m.startswith("operators")} <= allowed, path.name
