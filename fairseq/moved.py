"""Import paths that are not files: our own old ones, which warn, and fairseq's, which are here to stay.

A name of fairseq that is not offered is an ImportError that says what to use instead.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

from fairseq import fairseq_names

MOVED = {
    "fairseq.memory.bm25_lucene": "fairseq.data.bm25.lucene",
    "fairseq.memory.clusters": "fairseq.memory.retomaton.clusters",
    "fairseq.memory.combiners.fixed": "fairseq.memory.combiners.interpolation",
    "fairseq.memory.datastore_writer": "fairseq.memory.datastore.writer",
    "fairseq.memory.hf": "fairseq.hf",
    "fairseq.memory.hf.evaluation": "fairseq.hf.knn.evaluation",
    "fairseq.memory.hf.extended_mind": "fairseq.hf.attention.wrapper",
    "fairseq.memory.hf.extended_mind_interface": "fairseq.hf.attention.original_api",
    "fairseq.memory.hf.knn": "fairseq.hf.knn.wrapper",
    "fairseq.memory.hf.retomaton": "fairseq.hf.knn.retomaton",
    "fairseq.memory.hf.saver": "fairseq.hf.knn.saver",
    "fairseq.memory.index.build_config": "fairseq.memory.index.build.config",
    "fairseq.memory.index.faiss_index": "fairseq.memory.index.faiss.index",
    "fairseq.memory.joint_loss": "fairseq.memory.trime.joint_loss",
    "fairseq.memory.joint_stream": "fairseq.memory.trime.streaming",
    "fairseq.memory.knn_config": "fairseq.memory.sources.config",
    "fairseq.memory.members_files": "fairseq.memory.retomaton.foreign_clusters",
    "fairseq.memory.retomaton_config": "fairseq.memory.retomaton.config",
    "fairseq.memory.sources.retomaton": "fairseq.memory.retomaton.automaton",
    "fairseq.memory.vocab_mixing": "fairseq.memory.combiners.vocab_mixing",
}


class _MovedModules:
    """Finds the old names and hands on what the new modules define; importlib.abc is left aside, it takes 12 ms."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """A spec for an old name; None for all others."""
        if fullname in MOVED:
            return ModuleSpec(fullname, cast(Any, self), is_package=fullname == "fairseq.memory.hf")
        if not fullname.startswith("fairseq."):
            return None
        if fullname in fairseq_names.MODULES:
            # A package, so that importing a name it lacks comes here as well.
            return ModuleSpec(fullname, cast(Any, self), is_package=True)
        text = fairseq_names.sentence(fullname)
        if text is not None:
            raise ImportError(text, name=fullname)
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        """An ordinary module."""

    def exec_module(self, module: ModuleType) -> None:
        """Fill a module in: fairseq's with the names of the one that serves it, an old one of ours with a warning."""
        if module.__name__ in fairseq_names.MODULES:
            _serve(module, importlib.import_module(fairseq_names.MODULES[module.__name__]))
            return
        self._warn(module)

    def _warn(self, module: ModuleType) -> None:
        """Warn, and look every name up in the new module; old modules within an old package come first."""
        old, new = module.__name__, MOVED[module.__name__]
        text = f"{old} is now {new} and will not be found under its old name in the next release"
        warnings.warn(text, DeprecationWarning, stacklevel=3)  # frames of importlib do not count
        try:
            target = importlib.import_module(new)
        except ModuleNotFoundError as error:
            # By name: the floors of the house forbid to import it here.
            raise importlib.import_module("fairseq.runtime.lazy").missing_extra(error) from error
        public = getattr(target, "__all__", None) or [name for name in vars(target) if not name.startswith("_")]

        def find(name: str) -> Any:
            return importlib.import_module(f"{old}.{name}") if f"{old}.{name}" in MOVED else getattr(target, name)

        names = {"__getattr__": find, "__dir__": lambda: sorted(public), "__all__": list(public)}
        module.__dict__.update(names, __doc__=target.__doc__)


def _serve(module: ModuleType, target: ModuleType) -> None:
    """Give a module of fairseq the names of ``target``; others say what to use instead, where that is known."""
    hidden = ("__name__", "__spec__", "__loader__", "__path__", "__package__", "__file__")
    module.__dict__.update({name: value for name, value in vars(target).items() if name not in hidden})

    def find(name: str) -> Any:
        own = fairseq_names.sentence(f"{module.__name__}.{name}")
        raise AttributeError(own or f"module {module.__name__!r} has no attribute {name!r}")

    module.__dict__.setdefault("__getattr__", find)


def install() -> None:
    """Make the old names importable; once is enough."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
