"""Plug-ins: a folder or file of the user's, imported for the names it registers (``--user-dir``)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

from fairseq.registry import Entry, registrar

T = TypeVar("T", bound=Callable[..., Any])


class Register(Protocol):
    """A ``register_*`` decorator of named parts."""

    def __call__(self, name: str, config: type | None = None, *, dataclass: type | None = None) -> Callable[[T], T]:
        """Enter what is decorated under a name, with the config that makes its flags."""
        ...


def class_registrar(table: dict[str, Entry], what: str, old_form: str) -> Register:
    """Make the decorator with which a plug-in enters a class or function and its config into a table.

    ``@register_criterion("my_loss", MyLossConfig)`` above ``class MyLoss`` makes ``--criterion my_loss`` known,
    along with the flags of ``MyLossConfig``. Without a config of ours the class is in fairseq's form.

    Args:
        old_form: ``"package.module:function"`` that makes an entry of a class in fairseq's form and its dataclass.
    """
    enter = registrar(table, what)

    def register(name: str, config: type | None = None, *, dataclass: type | None = None) -> Callable[[T], T]:
        def add(target: T) -> T:
            if config is None or getattr(config, "is_fairseq_dataclass", False):
                entry = Entry(type, old_form).load()(target, dataclass or config)
            else:
                entry = Entry(config, target)
            enter(name)(entry)
            return target

        return add

    return register


def import_user_dir(path: str) -> ModuleType:
    """Import a package folder (with ``__init__.py``) or a ``.py`` file under its base name, once.

    The folder that holds it is not put on ``sys.path``, so that nothing else in there can hide an installed module.

    Raises: FileNotFoundError when there is no such plug-in, ValueError when its name is taken by another module.
    """
    source = _source(path)
    name = source.parent.name if source.name == "__init__.py" else source.stem
    if not name.isidentifier():
        raise ValueError(f"--user-dir {path}: {name!r} is not a module name (letters, digits, underscores); rename it")
    if name in sys.modules:
        if _is_file(getattr(sys.modules[name], "__file__", None), source):
            return sys.modules[name]
        raise _name_taken(path, name)
    known = importlib.util.find_spec(name)
    if known is not None and known.origin is not None and not _is_file(known.origin, source):
        raise _name_taken(path, name)

    search = [str(source.parent)] if source.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, source, submodule_search_locations=search)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:  # whatever stops it, a half-made module must not pass for an imported one
        del sys.modules[name]
        raise
    return module


def _source(path: str) -> Path:
    """The Python file at a plug-in's path, which may lack the ``.py``."""
    given = Path(path).expanduser().resolve()
    if given.is_dir():
        if not (given / "__init__.py").is_file():
            raise FileNotFoundError(
                f"--user-dir {path} is a folder without __init__.py; add one that imports its parts"
            )
        return given / "__init__.py"
    for candidate in (given, given.with_name(given.name + ".py")):
        if candidate.is_file() and candidate.suffix == ".py":
            return candidate
    raise FileNotFoundError(f"--user-dir {path}: there is no such folder and no such .py file")


def _is_file(origin: str | None, source: Path) -> bool:
    return origin is not None and Path(origin).resolve() == source


def _name_taken(path: str, name: str) -> ValueError:
    return ValueError(f"--user-dir {path}: a module {name!r} exists already; rename the plug-in")
