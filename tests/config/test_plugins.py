"""Plug-ins: what a folder or a file registers is known by name afterwards."""

import sys

import pytest

from fairseq.config.plugins import import_user_dir
from fairseq.criterions import CRITERIONS
from fairseq.criterions.base import build_criterion

PLUGIN = '''
from dataclasses import dataclass

from fairseq.config import flag
from fairseq.criterions import register_criterion
from fairseq.criterions.base import Criterion
from fairseq.criterions.configs import CriterionConfig

TIMES_READ = []
TIMES_READ.append(1)


@dataclass(frozen=True, kw_only=True)
class ScaledConfig(CriterionConfig):
    """A loss times a number."""

    scale: float = flag("--plugin-scale", default=2.0)
    """The number."""


@register_criterion("scaled_test_loss", ScaledConfig)
class ScaledLoss(Criterion):
    """A loss times a number."""
'''


@pytest.fixture(autouse=True)
def _leave_nothing_behind():
    modules, criterions, path = set(sys.modules), dict(CRITERIONS), list(sys.path)
    yield
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    CRITERIONS.clear()
    CRITERIONS.update(criterions)
    assert sys.path == path


def test_a_folder_is_imported_under_its_name_and_registers(tmp_path):
    folder = tmp_path / "my_plugin_folder"
    folder.mkdir()
    (folder / "__init__.py").write_text("from my_plugin_folder import loss\nfrom . import loss as same\n")
    (folder / "loss.py").write_text(PLUGIN)
    module = import_user_dir(f"{folder}/")
    assert module is sys.modules["my_plugin_folder"]
    assert module.loss is module.same
    criterion = build_criterion("scaled_test_loss", {"scale": 3.0}, model=None)
    assert criterion.config.scale == 3.0
    assert type(criterion) is module.loss.ScaledLoss


@pytest.mark.parametrize("suffix", [".py", ""])
def test_a_file_is_imported_once_with_or_without_its_suffix(tmp_path, suffix):
    (tmp_path / "my_plugin_file.py").write_text(PLUGIN)
    module = import_user_dir(str(tmp_path / f"my_plugin_file{suffix}"))
    assert "scaled_test_loss" in CRITERIONS
    assert import_user_dir(str(tmp_path / "my_plugin_file.py")) is module
    assert module.TIMES_READ == [1]


def test_a_relative_path_starts_at_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_plugin_here.py").write_text("VALUE = 5\n")
    monkeypatch.chdir(tmp_path)
    assert import_user_dir("my_plugin_here.py").VALUE == 5


def test_names_already_registered_are_refused(tmp_path):
    (tmp_path / "my_plugin_a.py").write_text(PLUGIN)
    (tmp_path / "my_plugin_b.py").write_text(PLUGIN)
    import_user_dir(str(tmp_path / "my_plugin_a.py"))
    with pytest.raises(ValueError, match="criterion 'scaled_test_loss' is registered twice"):
        import_user_dir(str(tmp_path / "my_plugin_b.py"))


def test_a_plugin_that_fails_is_not_left_half_imported(tmp_path):
    plugin = tmp_path / "my_plugin_broken.py"
    plugin.write_text("VALUE = 1\n1 / 0\n")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            import_user_dir(str(plugin))
    assert "my_plugin_broken" not in sys.modules


@pytest.mark.parametrize("taken", ["torch", "json", "wave"])
def test_a_name_of_another_module_is_refused(tmp_path, taken):
    (tmp_path / f"{taken}.py").write_text("VALUE = 1\n")
    with pytest.raises(ValueError, match=f"a module '{taken}' exists already; rename the plug-in"):
        import_user_dir(str(tmp_path / taken))


def test_a_name_no_module_can_have_is_refused(tmp_path):
    (tmp_path / "my-plugin.py").write_text("VALUE = 1\n")
    with pytest.raises(ValueError, match="'my-plugin' is not a module name"):
        import_user_dir(str(tmp_path / "my-plugin.py"))


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder and no such .py file"):
        import_user_dir(str(tmp_path / "nothing_here"))
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(FileNotFoundError, match="a folder without __init__.py"):
        import_user_dir(str(tmp_path / "empty_folder"))
