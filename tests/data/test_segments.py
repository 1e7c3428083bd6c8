import json

import numpy as np
import pytest

from fairseq.data import segments
from fairseq.data.dictionary import Dictionary
from fairseq.data.segments import read_segments, write_segments
from fairseq.data.token_block_dataset import TokenBlockDataset


@pytest.fixture
def dictionary():
    made = Dictionary()
    for word in ("caf\u00e9", '"quoted"', "a\\b", "plain"):
        made.add_symbol(word)
    return made


def test_segments_are_the_blocks_in_corpus_order(tmp_path, dictionary):
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, len(dictionary), 103).astype(np.uint16)
    tokens[10::11] = dictionary.eos()
    blocks = TokenBlockDataset(tokens, np.array([103]), 10)
    path = tmp_path / "segments" / "segments.json"
    assert write_segments(path, blocks, dictionary) == 11
    written = json.loads(path.read_text(encoding="utf-8"))
    assert [item["id"] for item in written] == [str(i) for i in range(11)]
    for item, start in zip(written, range(0, 103, 10)):
        words = [dictionary[i] for i in tokens[start : start + 10].tolist() if i != dictionary.eos()]
        assert item["contents"] == " ".join(words)
    assert list(read_segments(path)) == [item["contents"] for item in written]
    assert [entry.name for entry in path.parent.iterdir()] == ["segments.json"]


def test_no_blocks_make_an_empty_list(tmp_path, dictionary):
    path = tmp_path / "segments.json"
    assert write_segments(path, [], dictionary) == 0
    assert json.loads(path.read_text(encoding="utf-8")) == []
    assert list(read_segments(path)) == []


@pytest.mark.parametrize("chunk", [3, 7, 30, 1000])
@pytest.mark.parametrize("form", ["one line", "indented", "object per line"])
def test_other_programs_spellings_are_read_in_pieces(tmp_path, monkeypatch, chunk, form):
    monkeypatch.setattr(segments, "_CHUNK_CHARS", chunk)
    items = [{"id": str(i), "contents": 'it\'s, ] "} {" \u00e9 ' * i, "more": [1, {"a": 2}]} for i in range(5)]
    text = {
        "one line": json.dumps(items),
        "indented": "\n " + json.dumps(items, indent=2) + "\n\n",
        "object per line": "".join(json.dumps(item) + "\n" for item in items),
    }[form]
    path = tmp_path / "segments.json"
    path.write_text(text, encoding="utf-8")
    assert list(read_segments(path)) == [item["contents"] for item in items]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": "0", "contents": "a"}, {"id": "2", "contents": "b"}]', "segment 1 has the id '2', ids must be pos"),
        ('[{"id": "0", "contents": "a"}, {"id": "1", "cont', "is cut off or not JSON"),
        ('[{"id": "0", "contents": "a"}', "is cut off or not JSON"),
        ('[{"id": "0", "text": "a"}]', "item 0 is not a segment"),
        ('["a"]', "item 0 is not a segment"),
        ("not JSON", "is cut off or not JSON"),
    ],
)
def test_a_file_of_something_else_is_reported(tmp_path, text, message):
    path = tmp_path / "segments.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        list(read_segments(path))


def test_writing_that_fails_leaves_the_old_file(tmp_path, dictionary):
    path = tmp_path / "segments.json"
    write_segments(path, [np.array([4, 5])], dictionary)
    before = path.read_bytes()

    def breaks_off():
        yield np.array([4])
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_segments(path, breaks_off(), dictionary)
    assert path.read_bytes() == before
