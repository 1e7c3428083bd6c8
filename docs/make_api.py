"""Writes docs/api.md from the docstrings of the public names, and docs/examples.md from examples/python.

    python docs/make_api.py

It reads source text only, so it needs no installed package. tests/test_api.py fails when a page is out of date and
runs the examples of the API page from top to bottom.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTE = "<!-- Written by docs/make_api.py; edit the docstrings (or scripts) and run it again. -->\n"

# Heading -> names, in the order of the page. The examples run in this order.
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "fairseq.memory": {
        "Datastores": ("DatastoreWriter", "Datastore", "StoreHints"),
        "Indexes": ("Metric", "BuildConfig", "build_index", "open_index", "ExactIndex", "FaissIndex", "Neighbors"),
        "Sources of candidates": ("ExternalMemory", "Passage", "LocalMemory", "RollingMemory", "Candidates"),
        "Combiners": ("Interpolation", "JointNormalization", "VocabularyMixer", "knn_logp"),
        "Readers": ("ScoredPositions", "MemoryReader", "Retomaton"),
        "Training": ("InBatchMemory", "joint_loss"),
    },
    "fairseq.hf": {
        "kNN-LM and RetoMaton": ("KNNSaver", "KNNWrapper", "RetomatonWrapper"),
        "Perplexity of a text": ("windows_of", "SentencePair", "save_datastore", "evaluate", "prove"),
        "Memories inside attention": ("ExtendedMind", "extended_mind", "from_pretrained"),
    },
}

INTRODUCTION = """\
# Python API

These names are public. Everything else may change without notice. Import them from the package, not from the module
that defines them: `from fairseq.memory import Datastore`. A name is imported when it is first used, so
`import fairseq.memory` loads neither torch nor numpy. Import paths of release 0.1 (`fairseq.memory.hf...`) work for one
more release, with a `DeprecationWarning`.

Suffixes of a name are its shape: N positions, K neighbours, M candidates, D key width, V vocabulary, B sequences,
T tokens. Scores are *higher is closer*; logarithms are natural. Wrong input raises `ValueError` with both values and
the fix. A missing optional package raises `ImportError` with the pip command.

The examples on this page run from top to bottom, in an empty folder, after these lines:

```python
import math

import torch

from fairseq.memory import *

torch.manual_seed(0)
key_ND = torch.randn(1000, 16)  # keys of 1,000 positions
token_N = torch.randint(0, 50, (1000,))  # the token that came next at each
query_ND, target_N = key_ND[:3] + 0.1 * torch.randn(3, 16), token_N[:3]
lm_logits_NV = torch.randn(3, 50)
lm_norm_N = lm_logits_NV.logsumexp(1)
lm_logp_N = lm_logits_NV[torch.arange(3), target_N] - lm_norm_N
```
"""

HF_INTRODUCTION = """\
These need `pip install 'fairseq-memory[hf]'`. Any decoder of transformers takes the place of this small random one:

```python
from transformers import GPT2Config, GPT2LMHeadModel

from fairseq.hf import *

model = GPT2LMHeadModel(
    GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
).eval()
ids_BT = torch.randint(0, 50, (2, 32))  # token ids from the model's tokenizer
```
"""

EXAMPLES_INTRODUCTION = """\
# Python examples

Five short programs. Each makes its own data in a temporary folder and runs offline on a CPU in seconds:

```bash
python examples/python/mix_a_store_into_logits.py
```
"""
EXAMPLES = (
    "mix_a_store_into_logits",
    "exact_search",
    "build_an_index",
    "score_with_trime_memories",
    "wrap_a_hugging_face_model",
)

_DOC = re.compile(r"^(Args|Returns|Raises|Source)\b[.:]", re.MULTILINE)


@dataclass(frozen=True)
class Module:
    """One parsed source file."""

    name: str
    tree: ast.Module

    @classmethod
    def read(cls, name: str) -> Module:
        """Parse a module by its dotted name."""
        path = ROOT / name.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        return cls(name, ast.parse(path.read_text(encoding="utf-8")))

    def find(self, name: str) -> ast.ClassDef | ast.FunctionDef:
        """A class or function of the module, or of the one it is imported from."""
        for node in self.tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
                return node
        origin = self.origin(name)
        if origin is None:
            raise LookupError(f"{self.name} has no {name}")
        return Module.read(origin).find(name)

    def origin(self, name: str) -> str | None:
        """The module of ours that a name is imported from."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
                return node.module if node.module and node.module.startswith("fairseq") else None
        return None


def lazy_table(package: str) -> dict[str, str]:
    """Name -> module: the table that a package gives to ``lazy_names``."""
    for node in ast.walk(Module.read(package).tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "lazy_names":
            table: dict[str, str] = ast.literal_eval(node.args[1])
            return table
    raise LookupError(f"{package} has no lazy table")


def api_page() -> str:
    """The text of docs/api.md."""
    parts = [NOTE, INTRODUCTION]
    for package, groups in GROUPS.items():
        parts.append(f"## {package}\n")
        if package == "fairseq.hf":
            parts.append(HF_INTRODUCTION)
        table = lazy_table(package)
        for heading, names in groups.items():
            parts.append(f"### {heading}\n")
            parts += [entry(name, Module.read(table[name])) for name in names]
    return "\n".join(parts)


def entry(name: str, module: Module) -> str:
    """One public name: signature, docstring, fields and methods."""
    node = module.find(name)
    lines = [f"#### {name}", "", "```text", signature(node), "```", "", *paragraphs(ast.get_docstring(node) or "")]
    if isinstance(node, ast.ClassDef):
        init = method(node, "__init__")
        if init is not None:
            lines += paragraphs(_without_summary(ast.get_docstring(init) or ""))
        lines += _listed("Fields", fields(node))
        lines += _listed("Members", members(node, module))
    return "\n".join(_examples_last(lines)).rstrip() + "\n"


def signature(node: ast.ClassDef | ast.FunctionDef) -> str:
    """The call of a class or function, with its types and defaults."""
    if isinstance(node, ast.FunctionDef):
        is_context = any(
            isinstance(each, ast.Attribute) and each.attr == "contextmanager" for each in node.decorator_list
        )
        returns = "" if node.returns is None or is_context else f" -> {ast.unparse(node.returns)}"
        return _call(node.name, parameters(node), returns)
    init = method(node, "__init__")
    if init is not None:
        return _call(node.name, parameters(init)[1:], "")
    bases = [ast.unparse(base) for base in node.bases]
    if not any("dataclass" in ast.unparse(each) for each in node.decorator_list):
        return f"{node.name}()" if not bases else f"class {node.name}({', '.join(bases)})"
    keyword_only = any("kw_only=True" in ast.unparse(each) for each in node.decorator_list)
    made = [f"{each.target.id}: {ast.unparse(each.annotation)}{_default(each)}" for each in _fields(node)]
    return _call(node.name, (["*"] if keyword_only else []) + made, "")


def parameters(node: ast.FunctionDef) -> list[str]:
    """The parameters of a function as they stand in the source."""
    given, words = node.args, []
    defaults: list[ast.expr | None] = [None] * (len(given.args) - len(given.defaults)) + list(given.defaults)
    words += [_parameter(each, default) for each, default in zip(given.args, defaults)]
    if given.vararg is not None:
        words.append("*" + _parameter(given.vararg, None))
    elif given.kwonlyargs:
        words.append("*")
    words += [_parameter(each, default) for each, default in zip(given.kwonlyargs, given.kw_defaults)]
    return words + (["**" + _parameter(given.kwarg, None)] if given.kwarg is not None else [])


def method(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    """A class's own method."""
    return next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == name), None)


def fields(node: ast.ClassDef) -> Iterator[str]:
    """Fields of a dataclass or values of an enumeration, each with the line under or beside it."""
    body = [*node.body, None]
    for each, after in zip(body, body[1:]):
        text = _text(after)
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and not each.target.id.startswith("_"):
            yield f"`{each.target.id}`: {text}" if text else f"`{each.target.id}`"
        elif isinstance(each, ast.Assign) and _is_enumeration(node) and isinstance(each.targets[0], ast.Name):
            yield f"`{each.targets[0].id}` (`{ast.unparse(each.value)}`)" + (f": {text}" if text else "")


def members(node: ast.ClassDef, module: Module) -> Iterator[str]:
    """Public methods and properties, inherited ones of ours last, each with its first sentence."""
    seen: set[str] = set()
    for owner in _with_bases(node, module):
        for each in owner.body:
            if not isinstance(each, ast.FunctionDef) or each.name.startswith("_") or each.name in seen:
                continue
            seen.add(each.name)
            decorators = [ast.unparse(decorator) for decorator in each.decorator_list]
            if any(decorator.endswith(".setter") for decorator in decorators):
                continue
            call = each.name if any("property" in decorator for decorator in decorators) else _short_call(each)
            doc = (ast.get_docstring(each) or "").split("\n\n")[0].replace("\n", " ")
            yield f"`{call}`: {_markdown(doc)}"


def paragraphs(doc: str) -> list[str]:
    """A docstring as Markdown lines: arguments as a list, examples as they are."""
    blocks = re.split(r"(^```python\n.*?^```$)", doc, flags=re.MULTILINE | re.DOTALL)
    lines: list[str] = []
    for block in blocks:
        lines += [*block.splitlines(), ""] if block.startswith("```") else _prose(block)
    return lines


def _prose(text: str) -> list[str]:
    lines: list[str] = []
    for section in _sections(text):
        kind = _DOC.match(section)
        if kind is None:
            lines += [_markdown(section), ""]
        elif kind[1] == "Args":
            lines += ["Arguments:", "", *_arguments(section[kind.end() :]), ""]
        else:
            rest = " ".join(section[kind.end() :].split())
            lines += [f"{kind[1]}: {_markdown(rest)}", ""]
    return lines


def _sections(text: str) -> Iterator[str]:
    """Paragraphs; ``Args:``, ``Raises:`` and the like begin one even without an empty line before them."""
    starts = [match.start() for match in _DOC.finditer(text)]
    for start, stop in zip([0, *starts], [*starts, len(text)]):
        section = text[start:stop].strip()
        if _DOC.match(section):
            head, *rest = section.split("\n\n") if not section.startswith("Args") else [section]
            yield head
            yield from (each for each in rest if each.strip())
        else:
            yield from (each for each in re.split(r"\n\n+", section) if each.strip())


def _arguments(text: str) -> list[str]:
    text = inspect.cleandoc("\n" + text.strip("\n"))
    items = re.split(r"^(?=\w+: )", text, flags=re.MULTILINE)
    found = (re.match(r"(\w+): (.*)", item, re.DOTALL) for item in items)
    return [f"- `{each[1]}`: {_markdown(' '.join(each[2].split()))}" for each in found if each is not None]


def _markdown(text: str) -> str:
    return re.sub(r"``(.+?)``|:\w+:`(.+?)`", lambda found: f"`{found[1] or found[2]}`", text)


def _without_summary(doc: str) -> str:
    """The docstring of a constructor from its arguments on."""
    start = doc.find("Args")
    return doc[start:] if start >= 0 else ""


def _examples_last(lines: Sequence[str]) -> list[str]:
    text = "\n".join(lines)
    examples = re.findall(r"^```python\n.*?^```\n", text + "\n", flags=re.MULTILINE | re.DOTALL)
    for example in examples:
        text = (text + "\n").replace(example, "", 1)
    text = re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"
    return [text, *examples]


def _listed(heading: str, items: Iterator[str]) -> list[str]:
    found = [f"- {item}" for item in items]
    return [f"{heading}:", "", *found, ""] if found else []


def _call(name: str, words: Sequence[str], returns: str) -> str:
    line = f"{name}({', '.join(words)}){returns}"
    return line if len(line) <= 100 else "\n    ".join([f"{name}(", *(f"{word}," for word in words)]) + f"\n){returns}"


def _short_call(node: ast.FunctionDef) -> str:
    names = [each.arg for each in (*node.args.args, *node.args.kwonlyargs) if each.arg not in ("self", "cls")]
    return f"{node.name}({', '.join(names)})"


def _parameter(each: ast.arg, default: ast.expr | None) -> str:
    kind = "" if each.annotation is None else f": {ast.unparse(each.annotation)}"
    return f"{each.arg}{kind}" + ("" if default is None else f" = {ast.unparse(default)}")


def _default(node: ast.AnnAssign) -> str:
    """The default of a field: its own, or that of the flag it is made by."""
    if isinstance(node.value, ast.Call):
        found = next((word.value for word in node.value.keywords if word.arg == "default"), None)
        return " = ..." if found is None and ast.unparse(node.value.func) == "field" else _equals(found)
    return _equals(node.value)


def _equals(value: ast.expr | None) -> str:
    return "" if value is None else f" = {ast.unparse(value)}"


def _fields(node: ast.ClassDef) -> list[ast.AnnAssign]:
    return [each for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)]


def _is_enumeration(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).endswith("Enum") for base in node.bases)


def _text(node: ast.stmt | None) -> str:
    """The string that stands on its own in a class body, as one line."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return _markdown(" ".join(node.value.value.split()))
    return ""


def _with_bases(node: ast.ClassDef, module: Module) -> Iterator[ast.ClassDef]:
    yield node
    for base in node.bases:
        name = ast.unparse(base)
        origin = module.origin(name)
        if origin is not None:
            above = Module.read(origin)
            found = above.find(name)
            if isinstance(found, ast.ClassDef):
                yield from _with_bases(found, above)


def examples_page() -> str:
    """The text of docs/examples.md: every script with its first sentences."""
    parts = [NOTE, EXAMPLES_INTRODUCTION]
    for name in EXAMPLES:
        text = (ROOT / "examples" / "python" / f"{name}.py").read_text(encoding="utf-8")
        about = inspect.cleandoc(ast.get_docstring(ast.parse(text)) or "")
        code = text.split('"""', 2)[2].strip()
        parts.append(f"## {name}.py\n\n{_markdown(about)}\n\n```python\n{code}\n```\n")
    return "\n".join(parts)


PAGES = {"docs/api.md": api_page, "docs/examples.md": examples_page}


def main() -> None:
    """Write the pages."""
    for path, page in PAGES.items():
        (ROOT / path).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
