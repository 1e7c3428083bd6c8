"""The peak memory of saving a datastore does not grow with the datastore."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import common


def peak_bytes(*words: str) -> int:
    """Peak resident memory of one of the project's commands, as the system counts it."""
    process = subprocess.Popen(
        [sys.executable, *words], cwd=common.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(words)} failed with status {status}")
    return usage.ru_maxrss * 1024


def main() -> None:
    """Save stores of two sizes and compare."""
    parser = common.parser(__doc__)
    parser.add_argument("--small", type=int, default=100_000, help="tokens of the small text")
    parser.add_argument("--large", type=int, default=1_000_000, help="tokens of the large text")
    options = parser.parse_args()
    peaks: dict[int, list[int]] = {options.small: [], options.large: []}
    with tempfile.TemporaryDirectory() as made:
        texts = {size: Path(made) / str(size) for size in peaks}
        for size, folder in texts.items():
            folder.mkdir()
            common.make_data(folder, size)
        for _ in range(max(1, options.repeats // 2)):
            for size, folder in texts.items():
                data = folder / "data-bin"  # each text has a dictionary, and so a model, of its own
                checkpoint = folder / "ckpt" / "checkpoint_last.pt"
                if not checkpoint.exists():
                    common.train(data, folder / "ckpt")
                words = "--cpu --gen-subset train --max-tokens 256 --context-window 192 --tokens-per-sample 64"
                words += f" --save-knnlm-dstore --dstore-mmap {folder / 'dstore'}"
                peaks[size].append(peak_bytes("eval_lm.py", str(data), "--path", str(checkpoint), *words.split()))
    ratio = common.median_ratio(peaks[options.large], peaks[options.small])
    details = {"peak_bytes": {str(size): values for size, values in peaks.items()}}
    what = f"peak memory of {options.large} over {options.small} rows"
    common.tell("save_memory", what, ratio, "about 1", details, options.out)


if __name__ == "__main__":
    main()
