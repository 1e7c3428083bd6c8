"""Products by each instruction set that this processor has, against those of whole numbers."""

import numpy as np
import pytest
import torch

from fairseq.memory.index.ops import products as ways

NAMES = [name for name in ways.available() if ways.by_name(name).is_interleaved]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [1, 40, 136])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 15, 70])
def test_products_are_those_of_whole_numbers(name, width, rows):
    draw, products = np.random.default_rng(rows + width), ways.by_name(name)
    columns = products.columns(width)
    largest = 63 if name == "avx2" else 127
    shape_R, shape_M = (rows, columns), (128, columns)
    row_RE, key_ME = (draw.integers(-largest, largest + 1, shape).astype(np.int8) for shape in (shape_R, shape_M))
    row_RE[0], key_ME[0] = largest, -largest  # as large as they get
    keys, start_M = products.lay_out(torch.from_numpy(key_ME))
    whole_RE, whole_ME = row_RE.astype(np.int64), key_ME.astype(np.int64)
    half = columns // 2
    if products.longest:
        true_RM = row_RE.view(np.int16).astype(np.int64) @ key_ME.view(np.int16).astype(np.int64).T
        true_RM = true_RM.astype(np.int32)  # numbers are larger here than rounding makes them
    elif products.is_fine:
        (first_RF, second_RF), (first_MF, second_MF) = (np.split(x, [half], axis=1) for x in (whole_RE, whole_ME))
        true_RM = 64 * (first_RF @ first_MF.T) + first_RF @ second_MF.T + second_RF @ first_MF.T
        both_M = whole_ME.sum(1) + 64 * first_MF.sum(1)
        start_M = (-products.zero * both_M).astype(np.int32)
    else:
        true_RM = whole_RE @ whole_ME.T
    found_RM = torch.empty(rows, 128, dtype=torch.int32)
    unsigned_RE = (row_RE.astype(np.int16) + products.zero).astype(np.uint8).view(np.int8)
    products.multiply(torch.from_numpy(unsigned_RE), keys, start_M, found_RM)
    np.testing.assert_array_equal(found_RM.numpy(), true_RM)
