"""The only module that imports numba: what the environment says about it is checked once, before any kernel is made.

numba reports a variable that it cannot read by a warning of a dozen lines, or by an error that names neither the
variable nor its value; without its compiler, kernels that are built of machine instructions do not exist.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import warnings
from typing import Any

logger = logging.getLogger(__name__)

_UNREADABLE = re.compile("Environment variable '(.+?)' is defined but its associated value '(.*?)' could", re.DOTALL)


def import_numba() -> Any:
    """The numba module. Raises: ValueError that names the variable with which no kernel can be compiled."""
    threads = os.environ.get("NUMBA_NUM_THREADS", "")
    if re.fullmatch(r"\s*(-\s*\d+|[+-]?0+)\s*", threads):
        raise ValueError(f"NUMBA_NUM_THREADS={threads!r} is less than 1; unset it, or set it to a number of threads")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import numba
    for warning in caught:
        unreadable = _UNREADABLE.match(str(warning.message))
        if unreadable:
            name, value = unreadable.groups()
            logger.warning("%s=%r cannot be read, numba takes its default; unset it or correct the value", name, value)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    disabled = importlib.import_module("numba.core.config").DISABLE_JIT
    if disabled:
        raise ValueError(f"NUMBA_DISABLE_JIT={disabled} leaves searches without their compiled kernels; unset it")
    return numba


# numba's types do not declare what is used of it.
numba: Any = import_numba()
caching: Any = importlib.import_module("numba.core.caching")
cgutils: Any = importlib.import_module("numba.core.cgutils")
config: Any = importlib.import_module("numba.core.config")
errors: Any = importlib.import_module("numba.core.errors")
sigutils: Any = importlib.import_module("numba.core.sigutils")
rtsys: Any = importlib.import_module("numba.core.runtime").rtsys
types: Any = importlib.import_module("numba.core.types")


def compiler_features() -> set[str]:
    """Instructions that numba compiles for here, by LLVM's names: the CPU's, unless numba's settings say others."""
    features: str = numba.core.registry.cpu_target.target_context.codegen()._get_host_cpu_features()
    return {name[1:] for name in features.split(",") if name.startswith("+")} if not _is_generic() else set()


def _is_generic() -> bool:
    return config.CPU_NAME is not None and config.CPU_FEATURES is None
