"""Instructions that let a CPU fetch memory before it is read or written, for compiled loops."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from fairseq.memory.index.ops.numba_library import cgutils, numba, types

_BYTE, _INT = ir.IntType(8).as_pointer(), ir.IntType(32)


def fetch_line(builder: Any, at: Any, *, to_write: bool = False, level: int = 1) -> None:
    """Write the instruction that fetches the line of a pointer into a level of the cache."""
    kind = ir.FunctionType(ir.VoidType(), [_BYTE, _INT, _INT, _INT])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    options = (ir.Constant(_INT, value) for value in (int(to_write), 4 - level, 1))
    builder.call(prefetch, [builder.bitcast(at, _BYTE), *options])


def _fetch(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        fetch_line(builder, builder.inttoptr(given[0], _BYTE))
        return context.get_dummy_value()

    return types.void(address), generate


fetch: Any = numba.extending.intrinsic(_fetch)
"""Fetch the line of an address, which will be read."""
