"""Settings of these programs: ``--base CONFIG.yaml`` (several are merged in order), then ``key=value`` words."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_settings(words: Sequence[str], required: Sequence[str] = ()) -> dict[str, Any]:
    """One mapping of all settings; exits with a line that says what is wrong or missing."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    files, pairs, waiting = [], [], list(words)
    while waiting:
        word = waiting.pop(0)
        if word in ("--base", "-b"):
            while waiting and "=" not in waiting[0] and not waiting[0].startswith("-"):
                files.append(waiting.pop(0))
        elif "=" in word and not word.startswith("-"):
            pairs.append(word)
        else:
            _stop(f"{word!r} is neither --base CONFIG.yaml nor key=value")
    if not files:
        _stop("give --base CONFIG.yaml")
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        _stop(f"no file {missing[0]!r}")
    try:
        merged = OmegaConf.merge(*(OmegaConf.load(file) for file in files), OmegaConf.from_dotlist(pairs))
        settings: dict[str, Any] = OmegaConf.to_container(merged, resolve=True)  # type: ignore[assignment]
    except (OmegaConfBaseException, YAMLError) as error:
        _stop(" ".join(str(error).split()))
    absent = [name for name in required if settings.get(name) in (None, "???")]
    if absent:
        _stop(f"the setting {absent[0]!r} is missing; write it into the config or give {absent[0]}=...")
    return settings


def _stop(message: str) -> None:
    sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {message}\n")
    sys.exit(2)
