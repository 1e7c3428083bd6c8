"""Every flag of fairseq's and TRIME's commands is the same, mapped, ignored or rejected, and the page says which."""

import pytest
from flags_table import PAGE, PROGRAMS, classify, reference_flags, section

from fairseq import options
from fairseq_cli import generate, preprocess

FLAGS = [(command, name) for command in PROGRAMS for name in reference_flags()[command]]


def test_no_flag_of_the_originals_is_without_a_decision():
    assert [flag for flag in FLAGS if classify(*flag) == ("", "")] == []
    assert len(FLAGS) > 350


def test_the_page_holds_the_table():
    assert section() in PAGE.read_text(encoding="utf-8"), "run python tests/helpers/flags_table.py"


def parse(command, words):
    if command == "train":
        return options.parse_train(["data", *words])
    if command == "evaluate":
        return options.parse_eval_lm(["data", "--path", "x", *words])
    if command == "generate":
        return generate.parsed(["data", "--path", "x", *words], "generate.py")
    return preprocess.parse(["--only-source", "--trainpref", "x", *words])


@pytest.mark.parametrize(("command", "name"), [flag for flag in FLAGS if classify(*flag)[0] == "rejected"])
def test_a_rejected_flag_gives_its_reason(command, name, capsys):
    if name == "--character-embeddings":
        pytest.skip("rejected by a config of its own; tested there")
    with pytest.raises(SystemExit):
        parse(command, [name])
    assert f"{name} {classify(command, name)[1]}" in capsys.readouterr().err


def test_ignored_flags_are_accepted_with_a_warning(caplog):
    from flags_table import IGNORED

    for command in ("train", "evaluate", "generate"):
        names = [name for cmd, name in FLAGS if cmd == command and classify(cmd, name)[0] == "ignored"]
        words = [word for name in names for word in (name, *["1"] * IGNORED[command][name][0])]
        caplog.clear()
        parse(command, words)
        assert all(f"{name} is ignored: " in caplog.text for name in names)
