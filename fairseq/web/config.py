"""Options of a program that listens on a network address."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fairseq.config import flag, require_within

TOKEN_VARIABLE = "FAIRSEQ_TOKEN"


@dataclass(frozen=True, kw_only=True)
class AddressConfig:
    """Where to listen, and what a client has to know."""

    host: str | None = flag("--host", default=None)
    """Address to listen on, such as 0.0.0.0, for clients on other machines; they then have to give the token. Without
    it only this machine is answered."""
    port: int = flag("--port", default=8000)
    """Port to listen on; 0 takes a free one and prints it."""
    token: str | None = flag("--token", default=None)
    """Secret that clients have to give ("Authorization: Bearer TOKEN"). FAIRSEQ_TOKEN in the environment does the same
    and is not seen in the list of processes; with --host and neither, one is made and printed."""

    def __post_init__(self) -> None:
        require_within(0, 65535, port=self.port)
        if self.token is not None and (not self.token or not self.token.isascii() or not self.token.isprintable()):
            raise ValueError("--token must be printable ASCII and not empty; leave it out to have one made")

    @property
    def chosen_token(self) -> str | None:
        """The secret of --token or of the environment; None if neither is given."""
        return self.token or os.environ.get(TOKEN_VARIABLE) or None
