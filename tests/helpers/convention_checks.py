"""The project's habits as checks over source text; test_conventions.py runs them on the project and on bad examples.

A check takes the sources and returns complaints, each "path:line: what is wrong".
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_MODULES_IN_FOLDER = 14

# Floors, the lowest first: a module imports from its own line or from a line above it. One line per room; what fairseq
# has at its top level keeps its place there and has a line of its own.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("fairseq", "fairseq.moved", "fairseq.fairseq_names"),
    ("fairseq.registry",),
    ("fairseq.config",),
    ("fairseq.runtime",),
    ("fairseq.data",),
    ("fairseq.metrics",),
    ("fairseq.modules",),
    ("fairseq.memory",),
    ("fairseq.data.bm25",),  # its loops are compiled as memory's are
    ("fairseq.models",),
    ("fairseq.checkpoints",),
    ("fairseq.checkpoint_utils",),
    ("fairseq.verification",),
    ("fairseq.optim",),
    ("fairseq.criterions",),
    ("fairseq.tasks",),
    ("fairseq.sequence_scorer",),
    ("fairseq.generation",),
    ("fairseq.trainer",),
    ("fairseq.training",),
    ("fairseq.evaluation",),
    ("fairseq.options",),
    ("fairseq.option_tree",),
    ("fairseq.compat",),
    ("fairseq.hf",),
    ("fairseq.web",),
    ("fairseq.serving",),
    ("fairseq.explorer",),
    ("fairseq_cli",),
)
# The same inside a room: its subrooms and ground-floor modules, the lowest first.
ROOMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "fairseq.memory": (
        ("log_space",),
        ("types",),
        ("similarity", "scoring"),
        ("datastore",),
        ("index",),
        ("sources",),
        ("combiners",),
        ("trime",),
        ("extended_mind",),
        ("retomaton",),
        ("retrieval",),
        ("gnn",),
        ("proof",),
        ("planning",),
        ("kernel_warmup",),
    ),
    "fairseq.memory.index": (
        ("base",),
        ("faiss_library",),
        ("ops",),
        ("candidates", "kmeans"),
        ("lists",),
        ("faiss",),
        ("exact",),
        ("grown",),
        ("opening",),
        ("sharded",),
        ("build",),
    ),
    "fairseq.memory.gnn": (
        ("config", "neighbors_config"),
        ("kernels",),
        ("graph", "attention"),
        ("layer",),
        ("network",),
        ("codec", "row_file"),
        ("features", "neighbors"),
        ("cached", "recall"),
        ("inputs",),
    ),
    "fairseq.hf": (
        ("hooks",),
        ("gguf",),
        ("loading",),
        ("decoding",),
        ("knn",),
        ("attention",),
        ("pipeline",),
        ("lm_eval",),
    ),
    "fairseq.serving": (
        ("config", "errors"),
        ("texts", "metrics", "fields"),
        ("jobs",),
        ("rows",),
        ("memories",),
        ("engine",),
        ("requests",),
        ("answers", "store_requests"),
        ("app",),
        ("opening",),
    ),
    "fairseq.explorer": (
        ("config",),
        ("packing", "words", "rules"),
        ("text_table", "neighbors"),
        ("explanation",),
        ("export", "schema"),
        ("live", "reading"),
        ("kinds",),
        ("app",),
    ),
}

# package -> the only places that may import it
ONLY_IN = {
    "argparse": ("fairseq/config/flags.py", "benchmarks/"),
    "faiss": ("fairseq/memory/index/faiss_library.py", "benchmarks/plain_knnlm.py"),
    "pyarrow": ("fairseq/memory/retrieval/soft_targets.py", "fairseq/hf/", "examples/"),
    "ray": ("fairseq/runtime/ray_cluster.py",),
    "starlette": ("fairseq/serving/", "fairseq/explorer/"),
    "transformers": ("fairseq/hf/", "examples/", "benchmarks/"),
    "uvicorn": ("fairseq/web/running.py",),
}

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Source:
    """One Python file."""

    path: str
    text: str
    tree: ast.Module = field(compare=False, repr=False)

    @classmethod
    def parse(cls, path: str, text: str) -> Source:
        return cls(path, text, ast.parse(text, path))

    @property
    def module(self) -> str:
        parts = PurePosixPath(self.path).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def is_library(self) -> bool:
        return self.path.startswith("fairseq/")

    def complaint(self, node: ast.AST | int, text: str) -> str:
        line = node if isinstance(node, int) else getattr(node, "lineno", 1)
        return f"{self.path}:{line}: {text}"


def module_length(sources: Sequence[Source]) -> list[str]:
    lengths = ((source, source.text.count("\n")) for source in sources)
    return [s.complaint(1, f"{n} lines, at most {MAX_MODULE_LINES}") for s, n in lengths if n > MAX_MODULE_LINES]


def function_length(sources: Sequence[Source]) -> list[str]:
    found = []
    for source, node in _nodes(sources, *_FUNCTIONS):
        lines = node.end_lineno - node.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            found.append(source.complaint(node, f"{node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}"))
    return found


def no_print_in_library(sources: Sequence[Source]) -> list[str]:
    calls = ((s, node) for s, node in _nodes(sources, ast.Call) if s.is_library)
    return [s.complaint(node, "print in the library; use a logger") for s, node in calls if _called(node) == "print"]


def no_parameter_called_args(sources: Sequence[Source]) -> list[str]:
    found = []
    for source, node in _nodes(sources, *_FUNCTIONS, ast.Lambda):
        parameters = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        if source.path not in ("fairseq/config/flags.py", "fairseq/options.py") and "args" in [
            p.arg for p in parameters
        ]:
            found.append(source.complaint(node, "a parameter called args hides what the function needs"))
    return found


def layer_order(sources: Sequence[Source]) -> list[str]:
    found = []
    for source in sources:
        if not source.path.startswith(("fairseq/", "fairseq_cli/")):
            continue
        own = _layer(source.module)
        if own is None:
            found.append(source.complaint(1, f"{source.module} has no layer; give it one in LAYERS"))
            continue
        for node, name in _imports(source):
            other = _layer(name)
            if other is not None and other > own:
                found.append(source.complaint(node, f"{source.module} imports {name}, which stands above it"))
    return found


def room_order(sources: Sequence[Source]) -> list[str]:
    """The order of floors inside a room, by ``ROOMS``."""
    found = []
    for source in sources:
        for room, floors in ROOMS.items():
            own = _floor(source.module, room, floors)
            if own is None:
                continue
            if own < 0:
                found.append(source.complaint(1, f"{source.module} has no floor in {room}; give it one in ROOMS"))
                continue
            for node, name in _imports(source):
                other = _floor(name, room, floors)
                if other is not None and other > own:
                    found.append(source.complaint(node, f"{source.module} imports {name}, which stands above it"))
    return found


def folder_size(sources: Sequence[Source]) -> list[str]:
    """A folder with more modules than one reads at a glance becomes rooms."""
    folders: dict[PurePosixPath, int] = {}
    for source in sources:
        path = PurePosixPath(source.path)
        if source.path.startswith(("fairseq/", "fairseq_cli/")) and path.name != "__init__.py":
            folders[path.parent] = folders.get(path.parent, 0) + 1
    return [
        f"{folder}:1: {count} modules in one folder, at most {MAX_MODULES_IN_FOLDER}; make rooms"
        for folder, count in folders.items()
        if count > MAX_MODULES_IN_FOLDER
    ]


def imports_stay_where_they_belong(sources: Sequence[Source]) -> list[str]:
    found = []
    for source in sources:
        if source.path.startswith("tests/"):
            continue
        for node, name in _imports(source):
            places = ONLY_IN.get(name.partition(".")[0])
            if places is not None and not source.path.startswith(places):
                found.append(source.complaint(node, f"{name} may be imported only in {', '.join(places)}"))
    return found


OWN_COMPILED_FILES = "fairseq/memory/index/ops/kernel_cache.py"


def nothing_is_evaluated(sources: Sequence[Source]) -> list[str]:
    """No eval, exec or unpickling of code: a file or a flag is data."""
    found = []
    for source, node in _nodes(sources, ast.Call):
        name = _called(node)
        words = {word.arg: word.value for word in node.keywords}
        only_weights = words.get("weights_only")
        if name in ("eval", "exec"):
            found.append(source.complaint(node, f"{name} runs text as code; use ast.literal_eval"))
        if name == "torch.load" and not (isinstance(only_weights, ast.Constant) and only_weights.value is True):
            found.append(source.complaint(node, "torch.load without weights_only=True runs what a file contains"))
        if str(source.path) == OWN_COMPILED_FILES and name == "pickle.loads":
            continue  # files that this user alone can write, as numba's own cache reads them
        if name in ("pickle.load", "pickle.loads") or (name == "np.load" and "allow_pickle" in words):
            found.append(source.complaint(node, f"{name} runs what a file contains"))
    return found


def no_bare_exception(sources: Sequence[Source]) -> list[str]:
    found = []
    for source, node in _nodes(sources, ast.Raise):
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        if isinstance(raised, ast.Name) and raised.id in ("Exception", "BaseException"):
            found.append(source.complaint(node, "raise ValueError, OSError or another kind that says what it is"))
    return found


def only_ascii(sources: Sequence[Source]) -> list[str]:
    found = []
    for source in sources:
        lines = (number for number, line in enumerate(source.text.splitlines(), 1) if not line.isascii())
        found += [source.complaint(number, "not ASCII") for number in lines]
    return found


def every_config_field_is_read(sources: Sequence[Source]) -> list[str]:
    """A flag nobody reads is a promise nobody keeps.

    Reading is ``something.field``, ``mapping["field"]``, ``mapping.get("field")`` or ``getattr(x, "field")`` anywhere
    outside the tests. ``self.field`` counts only in the config's own class or a subclass, and not in
    ``__post_init__``: there a value is checked, not used.
    """
    sources = [source for source in sources if not source.path.startswith("tests/")]
    bases = {
        node.name: [b.id for b in node.bases if isinstance(b, ast.Name)] for _, node in _nodes(sources, ast.ClassDef)
    }
    read_anywhere: set[str] = set()
    read_by_class: set[tuple[str, str]] = set()
    for source in sources:
        for owner, function, name, through_self in _reads(source.tree):
            if not through_self:
                read_anywhere.add(name)
            elif function != "__post_init__":
                read_by_class |= {(ancestor, name) for ancestor in _ancestors(owner, bases)}
    found = []
    for source, node in _nodes(sources, ast.ClassDef):
        for name, line in _flag_fields(node):
            if name not in read_anywhere and (node.name, name) not in read_by_class:
                found.append(source.complaint(line, f"nothing reads {node.name}.{name}"))
    return found


def every_test_can_fail(sources: Sequence[Source]) -> list[str]:
    """A test asserts something itself, or calls a function of its module that does."""
    found = []
    for source in sources:
        if not PurePosixPath(source.path).name.startswith("test_"):
            continue
        functions = {node.name: node for _, node in _nodes([source], *_FUNCTIONS)}
        asserting = {name for name, node in functions.items() if _asserts(node)}
        while more := {n for n, node in functions.items() if n not in asserting and _calls(node) & asserting}:
            asserting |= more
        for name, node in functions.items():
            if name.startswith("test_") and name not in asserting:
                found.append(source.complaint(node, f"{name} asserts nothing"))
    return found


CHECKS: dict[str, Callable[[Sequence[Source]], list[str]]] = {
    check.__name__: check
    for check in (
        module_length,
        function_length,
        no_print_in_library,
        no_parameter_called_args,
        layer_order,
        room_order,
        folder_size,
        imports_stay_where_they_belong,
        nothing_is_evaluated,
        no_bare_exception,
        only_ascii,
        every_config_field_is_read,
        every_test_can_fail,
    )
}


def _nodes(sources: Sequence[Source], *kinds: type[ast.AST]) -> Iterator[tuple[Source, ast.AST]]:
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, kinds):
                yield source, node


def _called(call: ast.Call) -> str:
    """``print`` or ``torch.load``; an empty string for anything longer."""
    if isinstance(call.func, ast.Name):
        return call.func.id
    if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
        return f"{call.func.value.id}.{call.func.attr}"
    return ""


def _imports(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Every imported name, with the module it is taken from in front; those made inside functions too."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node, "a relative import"


def _layer(name: str) -> int | None:
    """The layer of a module or of a name in it; None for what is not ours or unknown."""
    best, layer = "", None
    for number, prefixes in enumerate(LAYERS):
        for prefix in prefixes:
            fits = name == prefix or (name.startswith(prefix + ".") and prefix != "fairseq")
            if fits and len(prefix) > len(best):
                best, layer = prefix, number
    return layer


def _floor(name: str, room: str, floors: tuple[tuple[str, ...], ...]) -> int | None:
    """The floor of a module, or of a name in it, inside a room; None outside of the room, -1 when it has none."""
    if not name.startswith(room + "."):
        return None
    first = name[len(room) + 1 :].partition(".")[0]
    if not first.islower():  # a name that the room's own face hands on
        return None
    return next((number for number, names in enumerate(floors) if first in names), -1)


def _flag_fields(node: ast.ClassDef) -> Iterator[tuple[str, int]]:
    for statement in node.body:
        is_field = isinstance(statement, ast.AnnAssign) and isinstance(statement.value, ast.Call)
        if is_field and _called(statement.value) == "flag":
            yield statement.target.id, statement.lineno


def _ancestors(name: str, bases: dict[str, list[str]]) -> set[str]:
    """A class and all it inherits from, as far as the sources tell."""
    found, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += bases.get(current, [])
    return found


def _reads(node: ast.AST, owner: str = "", function: str = "") -> Iterator[tuple[str, str, str, bool]]:
    """(class, function, name read, whether through self) for each attribute, key or getattr that reads a name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _reads(child, child.name, "")
            continue
        if isinstance(child, _FUNCTIONS):
            yield from _reads(child, owner, function or child.name)
            continue
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load):
            yield owner, function, child.attr, isinstance(child.value, ast.Name) and child.value.id == "self"
        key = _key(child)
        if key is not None:
            yield owner, function, key, False
        yield from _reads(child, owner, function)


def _key(node: ast.AST) -> str | None:
    """The string in ``x["key"]``, ``x.get("key")`` and ``getattr(x, "key")``."""
    key: ast.AST | None = None
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        key = node.slice
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
        key = node.args[0]
    elif isinstance(node, ast.Call) and _called(node) == "getattr":
        key = node.args[1]
    return key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else None


def _asserts(node: ast.AST) -> bool:
    for child in ast.walk(node):
        if isinstance(child, ast.Assert) and not isinstance(child.test, ast.Constant):
            return True
        name = child.func.attr if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute) else ""
        if name in ("raises", "warns", "fail") or name.startswith("assert"):
            return True
    return False


def _calls(node: ast.AST) -> set[str]:
    return {
        child.func.id for child in ast.walk(node) if isinstance(child, ast.Call) and isinstance(child.func, ast.Name)
    }
