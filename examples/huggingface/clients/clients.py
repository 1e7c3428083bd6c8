"""Run programs that drive a model on one with a memory: clients.py [CLIENT ...], all that are installed by default.

Prints a line per check: the largest difference from what the model gives when it is called directly, or the message of
a call that is rejected. Exits with status 1 if one is not as it must be.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

CLIENTS: dict[str, tuple[str, ...]] = {
    "lm_eval": ("lm_eval", "datasets"),
    "peft": ("peft",),
    "trl": ("trl", "peft", "datasets"),
    "accelerate": ("accelerate",),
    "pipeline": (),
    "compile": (),
    "batching": (),
}
"""The packages that each needs besides transformers; NAME_client.py runs it."""


def is_installed(client: str) -> bool:
    """True if all that a client needs is there."""
    return all(importlib.util.find_spec(package) for package in CLIENTS[client])


def checks_of(client: str, kind: str) -> list[object]:
    """The checks and refusals of one client with a memory of one kind."""
    from tiny import save_store, tiny_model

    model = tiny_model()
    with tempfile.TemporaryDirectory() as folder:
        save_store(model, Path(folder))
        found: list[object] = importlib.import_module(f"{client}_client").run(kind, model, Path(folder))
        return found


def main(words: list[str]) -> int:
    """Run clients; returns how many checks failed."""
    if set(words) & {"-h", "--help"}:
        sys.stdout.write(f"{__doc__}\nClients: {', '.join(CLIENTS)}\n")
        return 0
    unknown = set(words) - set(CLIENTS)
    if unknown:
        sys.exit(f"error: unknown client {min(unknown)!r}; known: {', '.join(CLIENTS)}")
    from tiny import KINDS, Check

    failed = 0
    for client in words or filter(is_installed, CLIENTS):
        for kind in KINDS:
            for check in checks_of(client, kind):
                assert hasattr(check, "passes")
                failed += not check.passes
                sign = "ok" if check.passes else "WRONG"
                figure = f"{check.difference:.1e}" if isinstance(check, Check) else repr(check.message)
                sys.stdout.write(f"{sign:5} {client:12} {kind:13} {check.what}: {figure}\n")
                sys.stdout.flush()
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
