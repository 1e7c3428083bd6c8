"""Loops that tensor operations cannot express without passing over everything several times, compiled by numba.

They release the interpreter's lock and run on one thread each; ``map_in_threads`` runs several side by side. Import
this module where it is used: numba takes half a second to load.

Shapes: N or Q queries, M columns of scores (keys), C candidates a query may hold, H hits, D width, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np

from fairseq.memory.index.ops.half_kernels import READS_FLOAT16
from fairseq.memory.index.ops.kernel_cache import KernelCache, kernel_name
from fairseq.memory.index.ops.lane_sum_kernels import products, squared_distances
from fairseq.memory.index.ops.numba_library import numba, types
from fairseq.memory.index.ops.vector_kernels import count_reaching, finite_range

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

GROUP = 64
"""Scores are passed over by so many neighbouring columns: a pass that counts is vectorized, one that lists is not."""

KEY_TYPES = ("f4", "u2", "i2") if READS_FLOAT16 else ("f4", "i2")
"""Types of keys in calls, for ``compiled``: float32, and the bits of float16 and bfloat16 (``half_kernels``)."""

LOWEST = np.float32(-3.0e38)
"""A threshold that every key reaches, deleted ones (minus infinity) excepted."""

NOTHING = np.int64(0x7FFFFFFFFFFFFFFF)
"""A place without a neighbour; after all others in the order of packed neighbours."""

_HALVINGS = 10
_LARGEST = np.finfo(np.float32).max

# float32 sums may be taken in any order: that lets the CPU add 8 or 16 numbers at once.
ANY_ORDER = {"reassoc", "contract", "nsz"}
# And so may the largest of numbers be found where none of them is NaN.
FINITE = ANY_ORDER | {"nnan"}


KERNELS: dict[str, tuple[Any, tuple[str, ...]]] = {}
"""Each kernel that is called from Python, with the types of its calls: what ``fairseq-datastore doctor`` compiles."""


def compiled(*signatures: str, **options: Any) -> Callable[[Kernel], Kernel]:
    """numba.njit, its result kept on disk (``kernel_cache.py``).

    Args:
        signatures: types of the arguments in every call from Python, in numba's notation; other types work too, but are
            compiled at their first use. Without any it cannot be called from Python, only from other kernels.
    """

    def compile_kernel(function: Kernel) -> Kernel:
        options.update(nogil=True, error_model="numpy")
        # Without the wrappers for calls from C, and from Python, all kernels compile in 0.73 of the time.
        options.update(no_cfunc_wrapper=True, no_cpython_wrapper=not signatures)
        # Said in so many words: otherwise the first caller's is inherited, and kept on disk for all. A product that was
        # first compiled below a caller that may fuse had other last bits from then on (19% of 64 columns' sums).
        options.setdefault("fastmath", False)
        kernel: Any = numba.njit(**options)(function)
        kernel._cache = KernelCache(function)
        if signatures:
            KERNELS[kernel_name(function)] = (kernel, signatures)
        return cast(Kernel, kernel)

    return compile_kernel


_SIZE_BITS = np.int32(0x7FFFFFFF)
_NOTHING = np.int32(-0x7F800001)  # minus infinity, as ``largest`` orders it


@compiled()
def largest(bits_C: Any) -> Any:
    """The bits of the largest of some float32, given as bits.

    Of floats, numba's maximum is not vectorized; the bits of a float, those of a negative one but the sign inverted,
    are ordered as the floats are. NaN is the largest of all.
    """
    most = _NOTHING
    for i in range(len(bits_C)):
        most = max(most, bits_C[i] ^ ((bits_C[i] >> np.int32(31)) & _SIZE_BITS))
    return most ^ ((most >> np.int32(31)) & _SIZE_BITS)


@compiled()
def approx_kth_largest(score_C: Any, k: int) -> Any:
    """A number that at least k finite entries reach, and few more; -inf where fewer are finite."""
    least, most, count = finite_range(score_C)
    if count < k:
        return np.float32(-np.inf)
    for _ in range(_HALVINGS):  # counting takes a twentieth of the time of selecting the k-th
        middle = np.float32(0.5) * (least + most)
        if count_reaching(score_C, middle) >= k:
            least = middle
        else:
            most = middle
    return least


@compiled()
def kth_largest(score_C: Any, k: int) -> Any:
    """A number that k entries reach, and more only where they equal the k-th, which it is then.

    Minus infinity where fewer than k are larger than that; NaN is nothing.
    """
    half = np.float32(0.5)
    least, most, count = finite_range(score_C)
    if count < k:
        return np.float32(-np.inf)
    for _ in range(2):  # what lies between has to be finite
        if count_reaching(score_C, most) >= k:
            return most
        most = min(most, _LARGEST)
    while count > k:
        middle = half * least + half * most
        if not least < middle < most:
            break
        reached = count_reaching(score_C, middle)
        if reached >= k:
            least, count = middle, reached
        else:
            most = middle
    return least


def _to_bits(typing_context: Any, number: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.bitcast(given[0], context.get_value_type(types.int32))

    return types.int32(types.float32), generate


_bits: Any = numba.extending.intrinsic(_to_bits)


@compiled()
def pack(score: Any, row: Any) -> Any:
    """A score and a row as one integer: smaller for a higher score, then for a lower row."""
    bits = np.int64(_bits(score))
    if bits < 0:
        bits ^= 0x7FFFFFFF  # the bits of a negative float, inverted, order as the float does
    return ((np.int64(-1) - bits) << 32) | row


@compiled("(f4[:,::1], i8, i8[:,::1])")
def pack_largest(score_NC: Any, k: int, packed_NC: Any) -> int:
    """Write the k largest entries of each row, and few more, as integers that rise as the entries fall.

    The lower 32 bits of an integer are the entry's place, so that of equals the earlier ones are the lower. The places
    behind a row's last one get the largest of integers.

    Returns: how many places are written at most; -1 where a row has fewer than k finite entries.
    """
    most = k
    row_C = np.empty(score_NC.shape[1], np.float32)
    bits_C = row_C.view(np.int32)
    for n in range(len(score_NC)):
        for i in range(len(row_C)):
            row_C[i] = -np.inf if np.isnan(score_NC[n, i]) else score_NC[n, i]
        least = approx_kth_largest(row_C, k)
        if least == -np.inf:
            return -1
        packed_C, count = packed_NC[n], np.uint64(0)
        for i in range(len(row_C)):
            bits = bits_C[i]
            falling = ~(bits ^ ((bits >> np.int32(31)) & _SIZE_BITS))
            packed_C[count] = (np.int64(falling) << np.int64(32)) | np.int64(i)
            count += np.uint64(row_C[i] >= least)
        packed_C[count:] = np.int64(0x7FFFFFFFFFFFFFFF)
        most = max(most, np.int64(count))
    return most


@compiled()
def dot(a_D: Any, b_D: Any) -> Any:
    """The inner product."""
    return products(a_D, (b_D,))[0]


@compiled()
def neg_sq_l2(a_D: Any, b_D: Any) -> Any:
    """Minus the squared distance."""
    return -squared_distances(a_D, (b_D,))[0]
