"""Fetching one file from its publisher: https only, known hosts only, resumed, and checked before it counts.

pooch decides whether a download is needed, compares the SHA-256 and puts the file in place by renaming it;
this module is the transport that pooch calls. pooch does not resume, and its own transport follows
redirects to any host.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urljoin, urlsplit

from better_attention.lab.files import sync_folder

from .samples import DataError

if TYPE_CHECKING:
    import requests

Progress = Callable[[int], None]
"""Called with the bytes of the file that are there so far."""

_CHUNK = 1 << 16
_REDIRECTS = 5
_ATTEMPTS = 3  # of one call, each going on where the last one broke off


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a slow server is borne with before the connection counts as broken.

    Args:
        connect: seconds until it answers.
        silence: seconds without a byte.
        slowest: bytes a second, on average ...
        after: ... from this many seconds on: a server that sends byte after byte never runs into ``silence``.
    """

    connect: float = 10.0
    silence: float = 30.0
    slowest: int = 1024
    after: float = 60.0


@dataclass(frozen=True, slots=True)
class Remote:
    """One file at its publisher's.

    Args:
        url: its https address.
        name: what it is called here.
        size: its bytes.
        sha256: 64 hexadecimal digits, out of a source that is cited where the row stands.
    """

    url: str
    name: str
    size: int
    sha256: str


class BrokenError(Exception):
    """The connection ended or stalled before the file did; what has arrived is kept."""


def download(
    remote: Remote,
    folder: Path,
    *,
    session: requests.Session | None = None,
    hosts: Collection[str] | None = None,
    progress: Progress | None = None,
    patience: Patience = Patience(),
) -> Path:
    """Bring ``remote`` into ``folder``, unless it is there already with the right digest.

    What arrives is written to ``NAME.part`` beside the target; only a complete file with the right SHA-256 gets
    its name. A part is resumed by the next attempt, and thrown away if the whole then has a wrong digest.

    Args:
        remote: what to fetch.
        folder: where it shall lie; created if missing.
        session: the connection to use; a new one if None.
        hosts: the hosts (with port, if not 443) that may be asked, also by redirects; None: the publisher's own, in
            ``remote.url``, so that a redirect elsewhere is refused, whatever it offers.
        progress: called for every piece that arrives.
        patience: with a slow server.

    Returns:
        The file.

    Raises:
        DataError: the host refuses, the connection breaks, the file is another one, or there is no room for it.
    """
    import pooch
    import requests

    url, part = remote.url, folder / f"{remote.name}.part"
    hosts = {urlsplit(url).netloc} if hosts is None else hosts
    with session or requests.Session() as connection, _quiet(pooch.get_logger()), _disk_errors(folder, remote.size):
        transport = _Transport(remote, part, connection, hosts, progress, patience)
        for _ in range(2):  # a part may stem from another version of the file: then once more, from the start
            try:
                pooch.retrieve(url, f"sha256:{remote.sha256}", remote.name, folder, downloader=transport)
                sync_folder(folder)
                return folder / remote.name
            # A ValueError as well, so it has to be let through before pooch's own is caught.
            except DataError:
                raise
            except ValueError:  # pooch's word for a wrong digest; it has deleted the file
                if not transport.resumed:
                    break
    raise DataError(
        f"{url}: what arrived is not the published file (its SHA-256 is not {remote.sha256}), and was deleted. "
        "Try again later; if it stays so, get the file by other means and use `better-attention data import`."
    )


class _Transport:
    """What pooch calls to get the bytes: ``(url, path of a temporary file, pooch)``."""

    def __init__(
        self,
        remote: Remote,
        part: Path,
        session: requests.Session,
        hosts: Collection[str],
        progress: Progress | None,
        patience: Patience,
    ) -> None:
        self._remote, self._part, self._session, self._hosts = remote, part, session, hosts
        self._patience = patience
        self._progress = progress or (lambda _: None)
        self.resumed = False

    def __call__(self, url: str, output_file: str, pooch: object) -> None:
        """Complete the part, then move it to ``output_file``, where pooch checks it."""
        # A part that is longer than the whole belongs to another file.
        if self._have() > self._remote.size:
            self._part.unlink()
        self.resumed = self._have() > 0
        for left in reversed(range(_ATTEMPTS)):
            try:
                self._continue(url)
                break
            except BrokenError as error:
                if left == 0:
                    raise DataError(
                        f"{url}: {error}; {self._have():,} of {self._remote.size:,} bytes are here. Run the same "
                        "command again to go on from there, or get the file by other means and use "
                        "`better-attention data import`."
                    ) from None
        self._part.replace(output_file)

    def _have(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def _continue(self, url: str) -> None:
        """Ask for what is missing and append it to the part."""
        have, size = self._have(), self._remote.size
        if have == size:
            return
        with self._get(url, have) as response, self._part.open("ab" if self._goes_on(response, have) else "wb") as file:
            for data in _body(response, self._patience):
                # One byte beyond the published size shows that this is another file.
                file.write(data[: size + 1 - file.tell()])
                self._progress(file.tell())
                if file.tell() > size:
                    break
            file.flush()
            os.fsync(file.fileno())
        if self._have() > size:
            self._part.unlink()
            raise DataError(f"{url} sends more than the {size:,} bytes of the published file. Nothing was kept.")
        if self._have() < size:
            raise BrokenError("the server ended the transfer")

    def _get(self, url: str, have: int) -> requests.Response:
        """The answer to the request, redirects followed by hand: every address is checked before it is asked."""
        import requests

        # Compressed on the way, the file would have other lengths and ranges than the published one.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        timeout = self._patience.connect, self._patience.silence
        for _ in range(_REDIRECTS + 1):
            check_address(url, self._hosts)
            try:
                response = self._session.get(url, headers=headers, stream=True, allow_redirects=False, timeout=timeout)
            except requests.exceptions.SSLError as error:
                raise DataError(f"{url}: the server's certificate is not trusted ({error}).") from None
            except requests.RequestException as error:
                raise BrokenError(f"there is no connection ({type(error).__name__})") from None
            if not response.is_redirect:
                return response
            response.close()
            url = urljoin(url, response.headers["Location"])
        raise DataError(f"{self._remote.url} redirects more than {_REDIRECTS} times.")

    def _goes_on(self, response: requests.Response, have: int) -> bool:
        """Whether the answer continues the part (True) or starts anew (False).

        Raises:
            DataError: the answer is no part of the published file.
        """
        remote, status = self._remote, response.status_code
        if status in (429, 500, 502, 503, 504):
            raise BrokenError(f"the server answers {status}")
        if status == 416:  # it has fewer bytes than we asked to skip
            self._part.unlink(missing_ok=True)
            raise BrokenError("the server cannot resume")
        if status not in (200, 206):
            raise DataError(
                f"{remote.url}: the server answers {status} {response.reason}. The file may have moved: get it by "
                "other means and use `better-attention data import`."
            )
        goes_on = status == 206
        expected = remote.size - have if goes_on else remote.size
        length = response.headers.get("Content-Length", str(expected))
        content_range = response.headers.get("Content-Range", "")
        if length != str(expected) or (goes_on and not content_range.startswith(f"bytes {have}-")):
            kind = response.headers.get("Content-Type", "unknown")
            raise DataError(
                f"{remote.url}: the server offers {length} bytes (type {kind}), the published file needs {expected:,}: "
                "it is another file, or a page. Get it by other means and use `better-attention data import`."
            )
        return goes_on


def _body(response: requests.Response, patience: Patience) -> Iterator[bytes]:
    """The bytes as sent (never decoded: a .gz stays a .gz), each piece as soon as it is there."""
    import urllib3

    start, received = time.monotonic(), 0
    while True:
        try:
            # read1() returns what has arrived, where read() would wait for a whole piece and the progress would stand
            # still.
            data: bytes = response.raw.read1(_CHUNK, decode_content=False)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise BrokenError(f"the connection broke ({type(error).__name__})") from None
        if not data:
            return
        yield data
        received += len(data)
        seconds = time.monotonic() - start
        if seconds > patience.after and received < patience.slowest * seconds:
            raise BrokenError(f"the server sends less than {patience.slowest} bytes a second")


def check_address(url: str, hosts: Collection[str]) -> None:
    """Refuse an address that is not https or whose host (and port, user name) is not in ``hosts``.

    Raises:
        DataError: with the address, and what is allowed.
    """
    parts = urlsplit(url)
    if parts.scheme != "https" or parts.netloc.lower() not in hosts:
        raise DataError(
            f"refused to fetch from {url!r}: only https addresses of {', '.join(sorted(hosts))} are asked. "
            "Get the file by other means and use `better-attention data import`."
        )


class _Logger(Protocol):
    level: int

    def setLevel(self, level: int) -> None: ...  # noqa: N802 - logging's own name


@contextmanager
def _quiet(logger: _Logger) -> Iterator[None]:
    """pooch announces each download on stderr, where our progress is drawn."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _disk_errors(folder: Path, size: int) -> Iterator[None]:
    """Turn what the disk says into a message with a way out."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write to {folder}: {error.strerror or error}. It needs {size:,} free bytes and the right to "
            "write; `--data DIR` takes another folder."
        ) from None
