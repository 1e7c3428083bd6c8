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
    int_list,
    literal_dict,
    require_at_least,
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
    "int_list",
    "literal_dict",
    "require_at_least",
    "to_dict",
]
