"""Options as frozen dataclasses, the flags made from them, and plug-ins. The only room that knows argparse."""

from fairseq.config.flags import (
    FlagParser,
    Namespace,
    UnreadableError,
    build,
    field_help,
    flag,
    flag_names,
    float_list,
    in_python,
    int_list,
    literal_dict,
    require_at_least,
    require_shard,
    to_dict,
)

__all__ = [
    "FlagParser",
    "Namespace",
    "UnreadableError",
    "build",
    "field_help",
    "flag",
    "flag_names",
    "float_list",
    "in_python",
    "int_list",
    "literal_dict",
    "require_at_least",
    "require_shard",
    "to_dict",
]
