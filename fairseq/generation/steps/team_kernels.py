"""A compiled function on all threads of torch's OpenMP, called from within a kernel.

These threads are torch's own and wait for work for milliseconds after each parallel loop, so that they begin within
microseconds; threads that Python wakes need 0.14 ms, which is more than most products of a decoding step take.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from fairseq.memory.index.ops.numba_library import cgutils, numba, types

_INT = ir.IntType(32)
_POINTER = ir.IntType(8).as_pointer()


def _member(context: Any, builder: Any, worker: Any, kind: Any, parts: Any, held_at: Any) -> Any:
    """A function of C's that calls ``worker`` with the arguments that its own argument points to."""
    compiled = worker.dispatcher.overloads[kind.args]
    context.active_code_library.add_linking_library(compiled.library)
    module = builder.module
    of_c = ir.FunctionType(ir.VoidType(), [_POINTER])
    member = ir.Function(module, of_c, module.get_unique_name("team_member"))
    member.linkage = "internal"
    inner = ir.IRBuilder(member.append_basic_block("entry"))
    held = inner.load(inner.bitcast(member.args[0], held_at.type))
    given = [inner.extract_value(held, number) for number in range(parts)]
    context.call_internal_no_propagate(inner, compiled.fndesc, kind, given)
    inner.ret_void()
    return member


def _run_in_team(typing_context: Any, worker: Any, address: Any, threads: Any, given: Any) -> Any:
    kind = typing_context.resolve_function_type(worker, given.types, {})

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        held_at = cgutils.alloca_once_value(builder, values[3])
        member = _member(context, builder, worker, kind, len(given.types), held_at)
        # libgomp's void GOMP_parallel(void (*member)(void *), void *held, unsigned threads, unsigned flags)
        run = ir.FunctionType(ir.VoidType(), [member.type, _POINTER, _INT, _INT])
        call = builder.inttoptr(values[1], run.as_pointer())
        count = builder.trunc(values[2], _INT)
        builder.call(call, [member, builder.bitcast(held_at, _POINTER), count, ir.Constant(_INT, 0)])
        return context.get_dummy_value()

    return types.void(worker, types.int64, types.int64, given), generate


run_in_team: Any = numba.extending.intrinsic(_run_in_team)
"""``(worker, address, threads, arguments)``: call the kernel ``worker(*arguments)`` once on each thread.

It must not raise, or allocate. The address is that of OpenMP's ``GOMP_parallel`` (``threads.openmp_address``).
"""


def _take(typing_context: Any, next_N: Any, place: Any, count: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        base = context.make_array(signature.args[0])(context, builder, values[0]).data
        return builder.atomic_rmw("add", builder.gep(base, [values[1]]), values[2], "monotonic")

    return types.int64(next_N, types.intp, types.int64), generate


take: Any = numba.extending.intrinsic(_take)
"""``(next_N, place, count)``: the int64 there before, to which the count is added; every thread gets another one."""
