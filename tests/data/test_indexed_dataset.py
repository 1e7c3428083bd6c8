import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq.data.indexed_dataset import MMapIndexedDataset, MMapIndexedDatasetBuilder, best_fitting_dtype

SENTENCES = st.lists(st.lists(st.integers(0, 100), max_size=6), max_size=8)


def write(prefix, sentences, dtype=np.uint16):
    with MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype) as builder:
        for sentence in sentences:
            builder.add_item(np.array(sentence, dtype=np.int64))
        builder.finalize(f"{prefix}.idx")


@given(SENTENCES, st.sampled_from([np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16, np.uint32, np.uint64]))
def test_what_is_written_is_read(tmp_path_factory, sentences, dtype):
    prefix = tmp_path_factory.mktemp("d") / "x"
    write(prefix, sentences, dtype)
    data = MMapIndexedDataset(prefix)
    assert [sentence.tolist() for sentence in data] == sentences
    assert data.sizes.tolist() == [len(sentence) for sentence in sentences]
    assert data.tokens.tolist() == sum(sentences, [])
    assert data.tokens.dtype == dtype


def test_the_bytes_are_those_of_the_format(tmp_path):
    write(tmp_path / "x", [[5, 6, 2], [2], [7, 2]])
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<6H", 5, 6, 2, 2, 7, 2)
    assert (tmp_path / "x.idx").read_bytes() == (
        b"MMIDIDX\x00\x00" + struct.pack("<QBQ", 1, 8, 3) + struct.pack("<3i", 3, 1, 2) + struct.pack("<3q", 0, 6, 8)
    )


@pytest.mark.parametrize(
    ("code", "kind"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H"), (9, "I"), (10, "Q")]
)
def test_every_number_type_of_fairseq_0_12_is_read(tmp_path, code, kind):
    (tmp_path / "x.bin").write_bytes(struct.pack(f"<4{kind}", 5, 2, 7, 2))
    size = struct.calcsize(f"<{kind}")
    (tmp_path / "x.idx").write_bytes(
        b"MMIDIDX\x00\x00" + struct.pack("<QBQ", 1, code, 2) + struct.pack("<2i2q", 2, 2, 0, 2 * size)
    )
    assert [sentence.tolist() for sentence in MMapIndexedDataset(tmp_path / "x")] == [[5, 2], [7, 2]]


def write_old(prefix, sentences, code=4, kind="i", offset=1):
    """fairseq's layout before mmap, by struct alone."""
    flat = [token + offset for sentence in sentences for token in sentence]
    ends = [sum(map(len, sentences[:i])) for i in range(len(sentences) + 1)]
    count = len(sentences)
    (prefix.parent / f"{prefix.name}.bin").write_bytes(struct.pack(f"<{len(flat)}{kind}", *flat))
    (prefix.parent / f"{prefix.name}.idx").write_bytes(
        b"TNTIDX\x00\x00"
        + struct.pack("<5Q", 1, code, struct.calcsize(kind), count, count)
        + struct.pack(f"<{count + 1}q", *range(count + 1))
        + struct.pack(f"<{count + 1}q", *ends)
        + struct.pack(f"<{count}q", *map(len, sentences))
    )


@given(SENTENCES, st.sampled_from([(1, "B"), (3, "h"), (4, "i"), (5, "q"), (8, "H")]))
def test_the_layout_before_mmap_is_read_and_its_numbers_count_from_1(tmp_path_factory, sentences, kind):
    prefix = tmp_path_factory.mktemp("d") / "x"
    write_old(prefix, sentences, *kind)
    data = MMapIndexedDataset(prefix)
    assert [sentence.tolist() for sentence in data] == sentences
    assert data.tokens.tolist() == sum(sentences, [])


def test_a_damaged_file_of_the_layout_before_mmap_is_an_error(tmp_path):
    prefix = tmp_path / "x"
    write_old(prefix, [[4, 2], [2]], offset=0)
    (tmp_path / "x.bin").write_bytes(struct.pack("<3i", 4, 0, 2))
    with pytest.raises(ValueError, match="holds the number 0, but its layout counts from 1"):
        MMapIndexedDataset(prefix)
    write_old(prefix, [[4, 2], [2]])
    whole = (tmp_path / "x.idx").read_bytes()
    (tmp_path / "x.idx").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"x\.idx has 104 bytes, 2 sentences need 112"):
        MMapIndexedDataset(prefix)
    (tmp_path / "x.idx").write_bytes(whole[:-8] + struct.pack("<q", 5))
    with pytest.raises(ValueError, match="sizes and offsets do not match"):
        MMapIndexedDataset(prefix)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"HUFFIDX\x00\x00" + bytes(40), "of fairseq's --dataset-impl huffman, which is not read here"),
        (b"MMIDIDX\x00\x00" + struct.pack("<QBQ", 1, 7, 0), "number type 7, floating point: features"),
        (
            b"MMIDIDX\x00\x00" + struct.pack("<QBQ", 1, 11, 0),
            r"number type 11, expected one of \[1, 2, 3, 4, 5, 8, 9, 10\]",
        ),
        (b"TNTIDX\x00\x00" + struct.pack("<5Q", 1, 6, 4, 0, 0) + bytes(16), "number type 6, floating point"),
    ],
)
def test_other_layouts_and_features_are_named(tmp_path, index, message):
    (tmp_path / "x.bin").write_bytes(b"")
    (tmp_path / "x.idx").write_bytes(index)
    with pytest.raises(ValueError, match=message):
        MMapIndexedDataset(tmp_path / "x")


def test_number_type_follows_the_vocabulary():
    assert best_fitting_dtype(65499) is np.uint16
    assert best_fitting_dtype(65500) is np.int32


def test_merging_equals_writing_at_once(tmp_path):
    write(tmp_path / "a", [[1, 2], [3]])
    write(tmp_path / "b", [[4], [5, 6]])
    with MMapIndexedDatasetBuilder(tmp_path / "c.bin", np.uint16) as builder:
        builder.merge_file_(tmp_path / "a")
        builder.merge_file_(tmp_path / "b")
        builder.finalize(tmp_path / "c.idx")
    write(tmp_path / "d", [[1, 2], [3], [4], [5, 6]])
    for end in (".bin", ".idx"):
        assert (tmp_path / f"c{end}").read_bytes() == (tmp_path / f"d{end}").read_bytes()


def test_a_token_too_large_for_the_type_is_an_error(tmp_path):
    with (
        pytest.raises(ValueError, match=r"tokens 1\.\.65536 do not fit uint16"),
        MMapIndexedDatasetBuilder(tmp_path / "x.bin", np.uint16) as builder,
    ):
        builder.add_item([1, 65536])
    assert os.listdir(tmp_path) == []


def test_float_is_no_number_type_of_tokens(tmp_path):
    with pytest.raises(ValueError, match="float32 is not among"):
        MMapIndexedDatasetBuilder(tmp_path / "x.bin", np.float32)


def test_an_index_out_of_range_is_an_error(tmp_path):
    write(tmp_path / "x", [[1]])
    for i in (-1, 1):
        with pytest.raises(IndexError, match=f"sentence {i} of 1"):
            MMapIndexedDataset(tmp_path / "x")[i]


def damaged(path, change):
    raw = bytearray(path.read_bytes())
    change(raw)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("end", "change", "message"),
    [
        (".bin", lambda raw: raw.pop(), r"x\.bin has 11 bytes, its \.idx says 6 tokens of 2 bytes \(12\)"),
        (".bin", lambda raw: raw.extend(b"12"), r"x\.bin has 14 bytes"),
        (".idx", lambda raw: raw.pop(), r"x\.idx has 61 bytes, 3 sentences need 62"),
        (".idx", lambda raw: raw.__delitem__(slice(10, None)), r"x\.idx is not a fairseq mmap index"),
        (".idx", lambda raw: raw.__setitem__(0, 0), r"x\.idx is not a fairseq mmap index \(bad magic\)"),
        (".idx", lambda raw: raw.__setitem__(9, 2), r"x\.idx has format version 2"),
        (".idx", lambda raw: raw.__setitem__(17, 6), r"x\.idx has number type 6"),
        (".idx", lambda raw: raw.__setitem__(26, 4), r"x\.idx: sizes and offsets do not match"),
    ],
)
def test_damaged_files_are_rejected(tmp_path, end, change, message):
    write(tmp_path / "x", [[5, 6, 2], [2], [7, 2]])
    damaged(tmp_path / f"x{end}", change)
    with pytest.raises(ValueError, match=message):
        MMapIndexedDataset(tmp_path / "x")


@pytest.mark.parametrize("end", [".bin", ".idx"])
def test_a_missing_file_is_named(tmp_path, end):
    write(tmp_path / "x", [[1]])
    (tmp_path / f"x{end}").unlink()
    with pytest.raises(ValueError, match=rf"x\{end} is missing; run preprocess"):
        MMapIndexedDataset(tmp_path / "x")


def test_an_interrupted_writer_leaves_the_old_files(tmp_path):
    write(tmp_path / "x", [[1, 2]])
    builder = MMapIndexedDatasetBuilder(tmp_path / "x.bin", np.uint16)
    builder.add_item([3, 4, 5])  # and is never finalised
    assert MMapIndexedDataset(tmp_path / "x")[0].tolist() == [1, 2]
    builder.__exit__()


@pytest.mark.parametrize("name", ["trime/data-bin/wt2s/valid", "fairseq012/data-bin/mt/train.de-en.en"])
def test_fairseqs_files_are_reproduced(tmp_path, name):
    golden = os.environ.get("FAIRSEQ_GOLDEN")
    if not golden:
        pytest.skip("FAIRSEQ_GOLDEN names no folder with fairseq's files")
    theirs = os.path.join(golden, name)
    data = MMapIndexedDataset(theirs)
    write(tmp_path / "x", list(data), data.tokens.dtype)
    for end in (".bin", ".idx"):
        with open(theirs + end, "rb") as file:
            assert (tmp_path / f"x{end}").read_bytes() == file.read()
