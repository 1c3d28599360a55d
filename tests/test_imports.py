"""Imports run one way: kernels <- mpt <- trainer <- train.py, scripts. Read from the source, so nothing needs to be
importable.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("kernels", "mpt", "trainer", "scripts")
LAZY = ("wandb", "matplotlib", "datasets", "tensorboard")  # imported where they are used, never when a module loads


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of everything that the nodes import, wherever they stand."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the package's name"
            names.add((node.module or "").split(".")[0])
    return names


def imported_on_load(tree: ast.Module) -> set[str]:
    """The same without the bodies of functions and of `if TYPE_CHECKING:`."""

    class Outside(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

        visit_AsyncFunctionDef = visit_FunctionDef

    return imported(Outside().visit(ast.parse(ast.unparse(tree))))


def sources() -> list[Path]:
    files = [p for layer in LAYERS for p in sorted((ROOT / layer).rglob("*.py"))]
    return files + [p for p in [ROOT / "train.py"] if p.exists()]


def test_there_is_something_to_read():
    assert {p.relative_to(ROOT).parts[0] for p in sources()} >= {"kernels", "mpt", "trainer"}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path):
    layer = path.relative_to(ROOT).parts[0]
    tree = ast.parse(path.read_text())
    above = {*LAYERS[LAYERS.index(layer) + 1 :], "train"} if layer in LAYERS else {"scripts"}
    names = imported(tree)
    assert not names & above, f"{path} imports {sorted(names & above)}, which lie above {layer}"
    assert "tests" not in names
    if layer != "scripts":
        assert "transformers" not in names, f"{path} imports transformers, which only tests and scripts may"
    late = imported_on_load(tree) & set(LAZY)
    assert not late, f"{path} imports {sorted(late)} when it loads; import it where it is used"


def test_a_wrong_import_is_seen():
    lines = ("import os", "def f():", "    import trainer.run", "    from wandb import init")
    tree = ast.parse("\n".join([*lines, "if TYPE_CHECKING:", "    import datasets"]))
    assert imported(tree) == {"os", "trainer", "wandb", "datasets"}
    assert imported_on_load(tree) == {"os"}
