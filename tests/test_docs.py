"""What the documents promise: commands whose flags exist, links that lead somewhere, examples that run."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from fairseq.config import FlagParser, build
from fairseq.config.plugins import import_user_dir
from fairseq.criterions import CRITERIONS
from fairseq.criterions.base import build_criterion
from fairseq.data.types import LMBatch
from fairseq.memory.gnn.recall.config import RecallConfig
from fairseq.memory.retrieval.sweep_config import SweepConfig
from fairseq.models.architectures import build_model_config
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.options import parse_eval_lm, parse_train
from fairseq_cli.datastore import COMMANDS as DATASTORE_COMMANDS
from fairseq_cli.datastore import split_command
from fairseq_cli.web.explore import KINDS as EXPLORED_KINDS

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [ROOT / "train_scripts" / "shakespeare-demo.sh", ROOT / "examples" / "trime" / "run.sh"]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("train_scripts/*.md")]
)


def blocks(path: Path, language: str) -> Iterator[str]:
    yield from re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def shell_script(path: Path) -> str:
    """A script's text with its arrays filled in."""
    text = path.read_text(encoding="utf-8")
    shared = dict(re.findall(r"^(\w+)=\((.*?)\)$", text, re.MULTILINE | re.DOTALL))
    while re.search(r'"\$\{\w+\[@\]\}"', text):
        text = re.sub(r'"\$\{(\w+)\[@\]\}"', lambda found: " ".join(shared[found[1]].split()), text)
    for variable, value in {"weight": "0.1", "seed": "1", "updates": "10"}.items():
        text = text.replace(f'"${variable}"', value).replace(f"${variable}", value)
    return text.replace('"$@"', "")


def commands() -> list[tuple[str, list[str]]]:
    """(document, words) of every `python SCRIPT.py ...` in the documents, the demo and the example."""
    texts = [(path.name, text) for path in DOCUMENTS for text in blocks(path, "bash")]
    texts += [(path.name, shell_script(path)) for path in SCRIPTS]
    found = []
    for name, text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            start = re.search(r"\bpython (?=[\w-]+\.py )", line)
            if start and not line.lstrip().startswith("#"):
                words = shlex.split(line[start.end() :], comments=True)
                found.append((name, [word for word in words if word != "..."]))
    return found


COMMANDS = commands()


def words_after(program: str) -> list[list[str]]:
    """The words of every `PROGRAM ...` in the documents."""
    texts = [text.replace("\\\n", " ") for path in DOCUMENTS for text in blocks(path, "bash")]
    lines = [line for text in texts for line in text.splitlines() if line.startswith(f"{program} ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@cache
def help_text(script: str) -> str:
    told = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    return told.stdout


def test_the_documents_show_every_command() -> None:
    assert {"preprocess.py", "train.py", "eval_lm.py", "build_dstore.py"} <= {words[0] for _, words in COMMANDS}


@pytest.mark.parametrize("words", [words for _, words in COMMANDS], ids=[f"{name}-{w[0]}" for name, w in COMMANDS])
def test_the_flags_of_a_documented_command_exist(words: list[str], tmp_path: Path) -> None:
    script, rest = words[0], words[1:]
    if "--user-dir" in rest:  # the plug-in is another test's
        return
    if script in ("train.py", "eval_lm.py"):
        parse = parse_train if script == "train.py" else parse_eval_lm
        assert parse(rest).given["data"]  # a mistake would exit
        return
    known = set(re.findall(r"--[\w-]+", help_text(script)))
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known


@pytest.mark.parametrize("words", words_after("fairseq-datastore"), ids=" ".join)
def test_a_documented_command_of_fairseq_datastore_parses(words: list[str]) -> None:
    config = DATASTORE_COMMANDS[words[0]].config
    parser = FlagParser("fairseq-datastore", "")
    parser.add_config(config)
    own, command = split_command(words[1:])
    built = build(config, parser.parse(own))
    # A plan is of a store that is not there yet, targets are of neighbours, the doctor of none; run-shards runs one.
    assert any(getattr(built, name, None) for name in ("prefix", "keys", "folder", "retrieval")) or command


@pytest.mark.parametrize("words", words_after("fairseq-knn-sweep"), ids=" ".join)
def test_a_documented_sweep_parses(words: list[str]) -> None:
    parser = FlagParser("fairseq-knn-sweep", "")
    parser.add_config(SweepConfig)
    assert build(SweepConfig, parser.parse(words)).retrievals == ["valid.retrieval"]


@pytest.mark.parametrize("words", words_after("fairseq-neighbor-recall"), ids=" ".join)
def test_a_documented_comparison_of_recall_parses(words: list[str]) -> None:
    parser = FlagParser("fairseq-neighbor-recall", "")
    parser.add_config(RecallConfig)
    assert len(build(RecallConfig, parser.parse(words)).folders) > 1


@pytest.mark.parametrize("words", words_after("fairseq-explore"), ids=" ".join)
def test_a_documented_exploration_parses(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kind, rest = (words[0], words[1:]) if words[0] in EXPLORED_KINDS else ("saved", words)
    if kind == "saved":
        assert EXPLORED_KINDS[kind](rest)[0]["retrievals"] == ["valid.retrieval"]
        return
    with pytest.raises(ValueError, match=r"no checkpoint at|no file"):  # a mistake in a flag would exit
        EXPLORED_KINDS[kind](rest)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_modules_exist(path: Path) -> None:
    names = re.findall(r"`((?:fairseq|fairseq_cli|tests|docs|benchmarks|train_scripts)/[\w/.-]+)`", path.read_text())
    invented = {"fairseq/criterions/my_loss.py", "fairseq/tasks/my_task.py", "fairseq/memory/index/my_index.py"}
    invented |= {
        "fairseq/memory/sources/my_source.py",
        "fairseq/memory/combiners/my.py",
        "benchmarks/results/",
        "docs/my_page.md",
    }
    assert [name for name in names if name not in invented and not (ROOT / name).exists()] == []


def test_the_plug_in_example_multiplies_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = blocks(ROOT / "docs" / "extending.md", "python")
    (tmp_path / "doc_example_plugin.py").write_text(text)
    monkeypatch.setitem(CRITERIONS, "weighted_cross_entropy", None)  # so that it is taken out again at the end
    del CRITERIONS["weighted_cross_entropy"]
    import_user_dir(str(tmp_path / "doc_example_plugin.py"))
    config = build_model_config(
        "transformer_lm",
        {"decoder_layers": 1, "decoder_embed_dim": 8, "decoder_ffn_embed_dim": 8, "decoder_attention_heads": 1}
        | {"decoder_input_dim": 8, "decoder_output_dim": 8, "dropout": 0.0, "max_target_positions": 8},
    )
    model = TransformerLanguageModel.build(config, 12, 1)
    tokens = torch.randint(4, 12, (2, 5))
    batch = LMBatch(torch.arange(2), tokens, tokens.roll(-1, 1), torch.ones_like(tokens, dtype=torch.bool))
    plain = build_criterion("cross_entropy", {}, model)(model, batch)
    weighted = build_criterion("weighted_cross_entropy", {"my_weight": 3.0}, model)(model, batch)
    torch.testing.assert_close(weighted.sum, 3 * plain.sum)
    assert weighted.sample_size == plain.sample_size == 10


SITE = ROOT / "mkdocs.yml"


def pages_of(entry: object) -> list[str]:
    """The pages of a navigation entry, those of its sections included."""
    if isinstance(entry, str):
        return [entry]
    children = entry.values() if isinstance(entry, dict) else entry
    return [page for child in children for page in pages_of(child)]  # type: ignore[attr-defined]


def test_every_page_is_in_the_navigation_of_the_site_and_exists() -> None:
    site = yaml.safe_load(SITE.read_text(encoding="utf-8"))
    elsewhere = site["extra"]["pages"]
    pages = pages_of(site["nav"])
    assert len(pages) == len(set(pages))
    own = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(pages) == own | set(elsewhere)
    assert [file for file in elsewhere.values() if not (ROOT / file).is_file()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_compile_and_their_imports_exist(path: Path) -> None:
    for text in blocks(path, "python"):
        for node in ast.walk(ast.parse(text, str(path))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fairseq"):
                module = importlib.import_module(node.module or "")
                missing = [a.name for a in node.names if a.name != "*" and not hasattr(module, a.name)]
                assert missing == [], node.module


def messages() -> str:
    """Every string of the sources, one a line; what is filled in at run time is a NUL."""
    texts = set()
    for path in (p for folder in ("fairseq", "fairseq_cli") for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            words = [p.value if isinstance(p, ast.Constant) else "\0" for p in parts]
            texts.add(" ".join("".join(w for w in words if isinstance(w, str)).split()))
    return "\n".join(texts)


def test_the_troubleshooting_page_quotes_messages_that_exist() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings, known = re.findall(r"^### `(.*)`$", page, re.MULTILINE), messages()
    assert len(headings) > 30
    quoted = {h: "[^\n]*".join(re.escape(part.strip()) for part in h.split("...") if part.strip()) for h in headings}
    assert [heading for heading, pattern in quoted.items() if not re.search(pattern, known)] == []
