"""lm-evaluation-harness's command with the model ``fairseq-memory``: python -m fairseq.hf.lm_eval run --model ..."""

from __future__ import annotations

import sys


def main() -> None:
    """Register the model, and hand over to the harness."""
    try:
        import fairseq.hf.lm_eval.model  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("lm_eval"):
            raise
        sys.exit("lm-eval is not installed; pip install 'fairseq-memory[lm-eval]'")
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
