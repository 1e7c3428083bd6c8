"""Stores as other programs lay them out, made here by numpy alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from store_making import DIM, rows

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.describe import StoreHints
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.index.build.preflight import open_store as open_for_building
from fairseq.memory.sources.config import KnnConfig
from fairseq.memory.sources.external import open_store as open_for_search

ROWS = 20
KEYS, VALUES = rows(ROWS)
STATED = {"dim": DIM, "size": ROWS}


def knn_lm(folder: Path, half: bool) -> tuple[Path, dict]:
    KEYS.astype("float16" if half else "float32").tofile(folder / "d_keys.npy")
    VALUES.astype("int16" if half else "int64").tofile(folder / "d_vals.npy")
    return folder / "d", STATED


def trime(folder: Path, half: bool) -> tuple[Path, dict]:
    KEYS.astype("float16" if half else "float32").tofile(folder / f"d{'-fp16' if half else ''}_keys.npy")
    VALUES.astype("int64").tofile(folder / "d_vals.npy")
    return folder / "d", STATED


def knn_mt(folder: Path, half: bool) -> tuple[Path, dict]:
    KEYS.astype("float16" if half else "float32").tofile(folder / "keys.npy")
    VALUES.astype("int64").reshape(-1, 1).tofile(folder / "vals.npy")
    return folder, STATED


def with_headers(folder: Path, half: bool) -> tuple[Path, dict]:
    np.save(folder / "keys.npy", KEYS.astype("float16" if half else "float32"))
    np.save(folder / "vals.npy", VALUES.astype("int32").reshape(-1, 1))
    return folder, {}


def knn_transformers(folder: Path, half: bool) -> tuple[Path, dict]:
    prefix = folder / f"dstore_gpt2-large_{ROWS}_{DIM}"
    KEYS.astype("float16" if half else "float32").tofile(f"{prefix}_keys.npy")
    VALUES.astype("int32").reshape(-1, 1).tofile(f"{prefix}_vals.npy")
    return prefix, {}


def its_folder(folder: Path, half: bool) -> tuple[Path, dict]:
    knn_transformers(folder, half)
    return folder, {}


def knn_box(folder: Path, half: bool) -> tuple[Path, dict]:
    knn_mt(folder, half)
    infos = {"keys": {"name": "keys", "shape": [ROWS, DIM]}, "vals": {"name": "vals", "shape": [ROWS, 1]}}
    (folder / "config.json").write_text(json.dumps({"data_list": ["keys", "vals"], "data_infos": infos}))
    return folder, {}


def sockeye(folder: Path, half: bool) -> tuple[Path, dict]:
    KEYS.astype("float16" if half else "float32").tofile(folder / "keys.npy")
    VALUES.astype("int32").reshape(-1, 1).tofile(folder / "vals.npy")
    settings = {"dimension": DIM, "index_size": ROWS, "index_type": "''", "state_data_type": "float16"}
    lines = ["!KNNConfig", *(f"{name}: {value}" for name, value in settings.items())]
    (folder / "config.yaml").write_text("\n".join(lines) + "\n")
    return folder, {}


def knn_models(folder: Path, half: bool) -> tuple[Path, dict]:
    knn_mt(folder, half)
    (folder / "vals.npy").rename(folder / "values.npy")
    return folder, STATED


LAYOUTS = [knn_lm, trime, knn_mt, with_headers, knn_transformers, its_folder, knn_box, sockeye, knn_models]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_store_of_another_program_is_read(tmp_path, layout, half):
    prefix, sizes = layout(tmp_path, half)
    flag = {"fp16": half} if sizes else {}
    expected = KEYS.astype("float16" if half else "float32").astype("float32")
    for stated in (sizes, STATED):
        store = Datastore.open(prefix, StoreHints(**stated, **flag))
        assert (len(store), store.dim) == (ROWS, DIM)
        assert store.keys.dtype == ("float16" if half else "float32")
        np.testing.assert_array_equal(store.take_keys(np.arange(ROWS)), expected)
        np.testing.assert_array_equal(store.values, VALUES)
    sizes_given = {"dstore_size": ROWS} if sizes else {}
    flags = {"dstore_fp16": half} if sizes else {}
    searched = open_for_search(KnnConfig(dstore_filename=str(prefix), **sizes_given, **flags), dim=DIM)
    np.testing.assert_array_equal(searched.values, VALUES)
    config = BuildConfig(
        dstore_mmap=str(prefix), faiss_index="x", dimension=DIM if sizes else None, dstore_size=ROWS, **flags
    )
    np.testing.assert_array_equal(open_for_building(config).keys, store.keys)
    np.testing.assert_array_equal(store.context(np.array([3]), before=2, after=1)[0], VALUES[1:5])
    np.testing.assert_array_equal(store.where(np.array([3, -1])), [[0, -1], [3, -1]])


@pytest.mark.parametrize(
    ("layout", "stated", "message"),
    [
        (knn_mt, {"dim": DIM, "size": ROWS + 1}, r"keys.npy holds 320 bytes; 21 rows of 4 float32 .* it holds 20 rows"),
        (knn_mt, {"dim": DIM, "size": ROWS, "fp16": True}, "these are float32 keys: drop --dstore-fp16"),
        (knn_mt, {}, "keys.npy has no metadata .* give files of the original programs their --dstore-size"),
        (with_headers, {"dim": DIM + 1}, "keys.npy holds 4 columns, 5 were stated"),
        (with_headers, {"dim": DIM, "size": 7}, "keys.npy holds 20 rows, 7 were stated"),
        (knn_transformers, {"size": 7}, "holds 20 rows, 7 were stated"),
    ],
)
def test_sizes_that_do_not_fit_are_reported(tmp_path, layout, stated, message):
    prefix, _ = layout(tmp_path, False)
    with pytest.raises(ValueError, match=message):
        Datastore.open(prefix, StoreHints(**stated))


def damage(path: Path, size: int | None = None, content: bytes = b"") -> None:
    path.write_bytes(content or path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("layout", "name", "change", "message"),
    [
        (
            knn_transformers,
            f"dstore_gpt2-large_{ROWS}_{DIM}_keys.npy",
            {"size": 300},
            "by its name or settings it has 20 rows of 4",
        ),
        (knn_transformers, f"dstore_gpt2-large_{ROWS}_{DIM}_vals.npy", {"size": 78}, "78 bytes; 20 values take 160"),
        (with_headers, "keys.npy", {"size": 300}, "keys.npy is not a complete NumPy array"),
        (with_headers, "vals.npy", {"size": 130}, "vals.npy is not a complete NumPy array"),
        (knn_lm, "d_vals.npy", {"content": b"x" * 33}, "33 bytes; 20 values take 160 as int64"),
    ],
)
def test_damaged_files_are_reported(tmp_path, layout, name, change, message):
    prefix, stated = layout(tmp_path, False)
    damage(tmp_path / name, **change)
    with pytest.raises(ValueError, match=message):
        Datastore.open(prefix, StoreHints(**stated))


def test_arrays_of_other_types_and_shapes_are_rejected(tmp_path):
    prefix, _ = with_headers(tmp_path, False)
    np.save(tmp_path / "vals.npy", VALUES[:5])
    with pytest.raises(ValueError, match="holds 5 int64, the keys are 20 rows"):
        Datastore.open(prefix, StoreHints())
    for keys, message in (
        (KEYS.astype(np.float64), "holds float64, keys are float32 or float16"),
        (KEYS[None], r"holds an array of shape \(1, 20, 4\), keys are"),
        (np.asfortranarray(KEYS), "in column order; save it in row order"),
        (KEYS[:0], "empty or in column order"),
    ):
        np.save(tmp_path / "keys.npy", keys)
        with pytest.raises(ValueError, match=message):
            Datastore.open(prefix, StoreHints())


def test_swapped_files_are_reported(tmp_path):
    prefix, stated = knn_lm(tmp_path, False)
    (tmp_path / "d_keys.npy").rename(tmp_path / "x")
    (tmp_path / "d_vals.npy").rename(tmp_path / "d_keys.npy")
    (tmp_path / "x").rename(tmp_path / "d_vals.npy")
    with pytest.raises(ValueError, match=r"d_keys.npy holds 160 bytes; 20 rows of 4 float32 values take 320"):
        Datastore.open(prefix, StoreHints(**stated))


def test_a_folder_of_several_stores_is_not_guessed_at(tmp_path):
    its_folder(tmp_path, True)
    KEYS.astype("float16").tofile(tmp_path / f"dstore_bart_{ROWS}_{DIM}_keys.npy")
    with pytest.raises(ValueError, match=r"several stores: dstore_bart_20_4, dstore_gpt2-large_20_4; give one"):
        Datastore.open(tmp_path, StoreHints())


def test_settings_that_belong_to_other_files_are_told_or_passed_over(tmp_path):
    folder, _ = knn_box(tmp_path, half=True)
    (folder / "config.json").write_text('{"data_infos": {"vals": {}}}')
    with pytest.raises(ValueError, match=r"config\.json does not state the shape of the keys"):
        Datastore.open(folder, StoreHints(fp16=True, **STATED))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert len(Datastore.open(folder, StoreHints(fp16=True, **STATED))) == ROWS


def test_a_store_in_hdf5_is_named(tmp_path):
    (tmp_path / "values.bin").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(20))
    with pytest.raises(ValueError, match="is a store of knn-seq, in HDF5, which is not read here"):
        Datastore.open(tmp_path, StoreHints(**STATED))
