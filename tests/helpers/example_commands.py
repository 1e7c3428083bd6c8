"""What is checked of every example command: its arguments have readers, the README's lines are understood."""

import ast
import shlex
from collections.abc import Collection
from pathlib import Path


def names_read(folder: Path, constants: Collection[str] = ()) -> set[str]:
    """Attributes that the functions of a folder's programs read, and those of ``constants`` that they name."""
    read = set()
    for path in folder.glob("*.py"):
        functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
        nodes = [node for f in functions if f.name != "__post_init__" for node in ast.walk(f)]
        read |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
        read |= {n.value for n in nodes if isinstance(n, ast.Constant) and n.value in constants}
    return read


def readme_commands(folder: Path, script: str, model: str) -> list[list[str]]:
    """Words of a script's commands in the folder's README, for a model."""
    text = (folder / "README.md").read_text().replace("\\\n", " ").replace("${MODEL}", model)
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("python -u")]
    return [rest for _, _, path, *rest in commands if path.endswith(f"/{script}")]
