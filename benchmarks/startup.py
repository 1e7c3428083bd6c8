"""`import fairseq` and `python eval_lm.py --help` each take less than a second."""

from __future__ import annotations

import common


def main() -> None:
    """Time both, in fresh processes."""
    options = common.parser(__doc__).parse_args()
    imports, helps = common.in_turn(
        lambda: common.run("-c", "import fairseq"), lambda: common.run("eval_lm.py", "--help"), options.repeats
    )
    bare = [common.seconds(lambda: common.run("-c", "pass")) for _ in range(options.repeats)]
    slowest = max(sorted(imports)[len(imports) // 2], sorted(helps)[len(helps) // 2])
    details = {"import_seconds": imports, "help_seconds": helps, "bare_python_seconds": bare}
    common.tell("startup", "seconds of the slower of import and --help", slowest, "< 1", details, options.out)


if __name__ == "__main__":
    main()
