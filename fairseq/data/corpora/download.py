"""Files from the network: downloads resume after an interruption, and a file gets its name only once verified."""

from __future__ import annotations

import hashlib
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 30
_ATTEMPTS = 4
_LOG_EVERY_SECONDS = 10.0


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fetch(name: str, bases: Sequence[str], folder: Path, sha256: str | None) -> Path:
    """Download ``name`` from the first base address that answers, unless the right file exists already.

    Bytes are collected in ``NAME.part``, from which a later call resumes; the file gets its name once its SHA-256 is
    the expected one.

    Args:
        bases: addresses to which ``/NAME`` is appended, tried in order.
        sha256: of the whole file, in hexadecimal; None where none is known: then the first download's is kept in
            ``NAME.sha256`` and compared with from then on.
    Returns: the file's path, ``folder/NAME``.
    Raises: ConnectionError when no address serves the file; ValueError when its content is not the expected one.
    """
    path, noted = folder / name, folder / (name + ".sha256")
    if sha256 is None and noted.exists():
        sha256 = noted.read_text(encoding="utf-8").strip()
    if path.exists():
        _require_digest(path, sha256 or _note_digest(path, noted))
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / (name + ".part")
    failures = []
    for base in bases:
        url = f"{base.rstrip('/')}/{name}"
        try:
            _fetch_with_retries(url, part)
        except (OSError, HTTPException) as error:
            failures.append(f"{url} ({_reason(error)})")
            continue
        _require_digest(part, sha256 or _note_digest(part, noted))
        part.rename(path)
        return path
    raise ConnectionError(
        f"cannot download {name}: {'; '.join(failures)}. Check the network (downloaded bytes are kept), set "
        f"DATA_MIRROR=ADDRESS to another server that has {name}, or put the file at {path} yourself"
    )


def _note_digest(path: Path, noted: Path) -> str:
    """Keep the digest of a file for which none is published."""
    digest = sha256_of(path)
    noted.write_text(f"{digest}\n", encoding="utf-8")
    logger.warning("no SHA-256 of %s is known to compare with; it is %s, kept in %s", path.name, digest, noted)
    return digest


def _require_digest(path: Path, expected: str) -> None:
    actual = sha256_of(path)
    if actual != expected:
        if path.suffix == ".part":
            path.unlink()  # no byte of it can be trusted, so a download cannot resume from it
        raise ValueError(
            f"{path} has SHA-256 {actual}, expected {expected}; the file is damaged or another one: remove it "
            "and run the same command again"
        )


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error or type(error).__name__)


def _fetch_with_retries(url: str, part: Path) -> None:
    """Fill ``part``; retry a server that closes the connection early, as long as it sends more bytes each time."""
    for attempt in range(1, _ATTEMPTS + 1):
        size_before = part.stat().st_size if part.exists() else 0
        try:
            _fetch_rest(url, part)
            return
        except (OSError, HTTPException) as error:
            progressed = part.exists() and part.stat().st_size > size_before
            if attempt == _ATTEMPTS or not progressed:
                raise
            logger.warning(
                "%s closed the connection (%s); resuming from byte %d", url, _reason(error), part.stat().st_size
            )


def _fetch_rest(url: str, part: Path) -> None:
    """Append the missing bytes to ``part``, or start again if the server does not support ranges."""
    num_bytes = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={num_bytes}-"} if num_bytes else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and num_bytes:  # nothing after our last byte: the part is complete
            return
        raise
    with response:
        resumed = response.status == 206
        length = response.headers.get("Content-Length")
        total = int(length) + (num_bytes if resumed else 0) if length else None
        done, logged = (num_bytes if resumed else 0), time.monotonic()
        logger.info("downloading %s%s", url, f" from byte {num_bytes}" if resumed else "")
        with part.open("ab" if resumed else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                if time.monotonic() - logged > _LOG_EVERY_SECONDS:
                    logged = time.monotonic()
                    logger.info("%.1f of %s MB", done / 1e6, f"{total / 1e6:.1f}" if total else "?")
    if total is not None and done < total:
        raise ConnectionError(f"the connection closed after {done} of {total} bytes")
