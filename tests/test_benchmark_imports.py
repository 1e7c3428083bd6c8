"""What benchmarks import of the project is there: they are run by hand, long after it has moved."""

import ast
import importlib

import pytest
from conftest import ROOT

IMPORTS = sorted(
    {
        (path.name, node.module, name.name)
        for path in (ROOT / "benchmarks").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fairseq")
        for name in node.names
    }
)


@pytest.mark.parametrize(("script", "module", "name"), IMPORTS)
def test_what_is_imported_is_there(script, module, name):
    found = importlib.import_module(module)
    assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), script
