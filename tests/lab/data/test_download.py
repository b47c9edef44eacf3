"""Fetching one file from servers that behave well, badly and wickedly; all of them on this machine."""

from __future__ import annotations

import ipaddress
import os
import shutil
import ssl
import subprocess
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

from better_attention.lab.data import download
from better_attention.lab.data.download import Patience, Remote
from better_attention.lab.data.samples import DataError
from helpers import publisher as site
from helpers.publisher import CONTENT, HOST, Publisher

REMOTE = site.remote()
HOSTS = {HOST, "mirror.example"}


def fetch(publisher: Publisher, folder: Path, remote: Remote = REMOTE, **options: object) -> Path:
    with publisher.session() as session:
        return download.download(remote, folder, session=session, hosts=HOSTS, **options)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in folder.iterdir()} if folder.exists() else {}


def test_a_file_arrives_whole_and_under_its_name(publisher: Publisher, tmp_path: Path) -> None:
    progress: list[int] = []
    path = fetch(publisher, tmp_path / "new" / "folder", progress=progress.append)
    assert path == tmp_path / "new" / "folder" / "numbers.bin"
    assert path.read_bytes() == CONTENT
    assert files(path.parent) == {"numbers.bin": len(CONTENT)}
    assert publisher.requests == [(f"{HOST}/files/numbers.bin", None)]
    assert progress == sorted(progress)
    assert progress[-1] == len(CONTENT)


def test_what_is_there_is_not_asked_for_again(publisher: Publisher, tmp_path: Path) -> None:
    fetch(publisher, tmp_path)
    fetch(publisher, tmp_path)
    assert len(publisher.requests) == 1


def test_a_wrong_file_in_its_place_is_replaced(publisher: Publisher, tmp_path: Path) -> None:
    (tmp_path / "numbers.bin").write_bytes(b"something else")
    assert fetch(publisher, tmp_path).read_bytes() == CONTENT


def test_permissions_are_those_of_any_other_file(publisher: Publisher, tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        assert fetch(publisher, tmp_path).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(mask)


def test_a_broken_connection_is_taken_up_again(publisher: Publisher, tmp_path: Path) -> None:
    publisher.answers = [site.breaks_after(1000), site.breaks_after(500)]
    assert fetch(publisher, tmp_path).read_bytes() == CONTENT
    assert [place for _, place in publisher.requests] == [None, "bytes=1000-", "bytes=1500-"]


def test_a_later_run_goes_on_where_an_earlier_one_gave_up(publisher: Publisher, tmp_path: Path) -> None:
    publisher.answers = [site.breaks_after(1000), site.breaks_after(0), site.breaks_after(24)]
    with pytest.raises(
        DataError, match=r"connection broke .*1,024 of 10,240 bytes are here. Run the same command again"
    ):
        fetch(publisher, tmp_path)
    assert files(tmp_path) == {"numbers.bin.part": 1024}
    assert fetch(publisher, tmp_path).read_bytes() == CONTENT
    assert publisher.requests[-1][1] == "bytes=1024-"
    assert files(tmp_path) == {"numbers.bin": len(CONTENT)}


def test_a_run_killed_just_before_the_end_needs_no_request(publisher: Publisher, tmp_path: Path) -> None:
    (tmp_path / "numbers.bin.part").write_bytes(CONTENT)
    assert fetch(publisher, tmp_path).read_bytes() == CONTENT
    assert publisher.requests == []


@pytest.mark.parametrize("part", [b"of another version", b"\0" * len(CONTENT), b"\0" * (len(CONTENT) + 1)])
def test_a_part_of_something_else_is_thrown_away(publisher: Publisher, tmp_path: Path, part: bytes) -> None:
    (tmp_path / "numbers.bin.part").write_bytes(part)
    assert fetch(publisher, tmp_path).read_bytes() == CONTENT
    assert publisher.requests[-1][1] is None
    assert files(tmp_path) == {"numbers.bin": len(CONTENT)}


def test_a_server_that_cannot_resume_sends_everything_again(publisher: Publisher, tmp_path: Path) -> None:
    (tmp_path / "numbers.bin.part").write_bytes(CONTENT[:100])
    publisher.answers = [site.serves(CONTENT)]
    assert fetch(publisher, tmp_path).read_bytes() == CONTENT
    (tmp_path / "numbers.bin").unlink()
    (tmp_path / "numbers.bin.part").write_bytes(CONTENT[:100])
    publisher.answers = [site.refuses(416)]
    assert fetch(publisher, tmp_path).read_bytes() == CONTENT
    assert publisher.requests[-1][1] is None


def test_a_busy_server_is_asked_again(publisher: Publisher, tmp_path: Path) -> None:
    publisher.answers = [site.refuses(503), site.refuses(502)]
    assert fetch(publisher, tmp_path).read_bytes() == CONTENT


def test_a_stored_gz_is_not_unpacked_on_the_way(publisher: Publisher, tmp_path: Path) -> None:
    """Some servers call a .gz file a compressed answer; what was published is the .gz."""
    publisher.answers = [site.serves(CONTENT, Content_Encoding="gzip")]
    assert fetch(publisher, tmp_path).read_bytes() == CONTENT
    assert len(publisher.requests) == 1


def test_redirects_among_the_known_hosts(publisher: Publisher, tmp_path: Path) -> None:
    publisher.answers = [site.redirects("https://mirror.example/a"), site.redirects("/b")]
    assert fetch(publisher, tmp_path).read_bytes() == CONTENT
    assert [place for place, _ in publisher.requests] == [
        f"{HOST}/files/numbers.bin",
        "mirror.example/a",
        "mirror.example/b",
    ]


FORBIDDEN = [
    "http://data.example/files/numbers.bin",
    "https://elsewhere.example/numbers.bin",
    "//elsewhere.example/numbers.bin",
    "https://data.example.elsewhere.example/numbers.bin",
    "https://data.example@elsewhere.example/numbers.bin",
    "https://user@data.example/numbers.bin",
    "https://data.example:8443/numbers.bin",
    "file:///etc/passwd",
    "ftp://data.example/numbers.bin",
]


@pytest.mark.parametrize("location", FORBIDDEN)
def test_a_redirect_to_anywhere_else_is_not_followed(publisher: Publisher, tmp_path: Path, location: str) -> None:
    publisher.answers = [site.redirects(location)]
    with pytest.raises(
        DataError, match=r"refused to fetch from .*only https addresses of data\.example, mirror\.example"
    ):
        fetch(publisher, tmp_path)
    assert len(publisher.requests) == 1
    assert files(tmp_path) == {}


@pytest.mark.parametrize("url", [url for url in FORBIDDEN if not url.startswith("//")])
def test_a_forbidden_address_is_not_even_asked(publisher: Publisher, tmp_path: Path, url: str) -> None:
    remote = Remote(url=url, name="numbers.bin", size=REMOTE.size, sha256=REMOTE.sha256)
    with pytest.raises(DataError, match="refused to fetch"):
        fetch(publisher, tmp_path, remote)
    assert publisher.requests == []


def test_without_other_hosts_the_publishers_own_alone_is_asked(publisher: Publisher, tmp_path: Path) -> None:
    publisher.answers = [site.redirects("https://mirror.example/a")]
    with publisher.session() as session, pytest.raises(DataError, match="refused to fetch from 'https://mirror"):
        download.download(REMOTE, tmp_path, session=session)
    publisher.answers = [site.redirects("/b"), site.serves(CONTENT)]
    with publisher.session() as session:
        assert download.download(REMOTE, tmp_path, session=session).read_bytes() == CONTENT


def test_redirects_without_end(publisher: Publisher, tmp_path: Path) -> None:
    publisher.answers = [site.redirects(f"/{number}") for number in range(20)]
    with pytest.raises(DataError, match="redirects more than 5 times"):
        fetch(publisher, tmp_path)
    assert len(publisher.requests) == 6


PAGE = b"<html>We have moved</html>"
FAILURES = {
    "wrong contents": ([site.serves(CONTENT[::-1])], r"its SHA-256 is not [0-9a-f]{64}\), and was deleted"),
    "not found": ([site.refuses(404)], "the server answers 404 Not Found"),
    "forbidden": ([site.refuses(403)], "the server answers 403"),
    "no contents": ([site.refuses(204)], "the server answers 204"),
    "always busy": ([site.refuses(503)] * 3, "the server answers 503; 0 of 10,240"),
    "a page": ([site.serves(PAGE, Content_Type="text/html")], r"offers 26 bytes \(type text/html\).* needs 10,240"),
    "a page, unmeasured": ([site.without_length(PAGE)] * 3, "the server ended the transfer; 26 of 10,240 bytes"),
    "shorter": ([site.serves(CONTENT[:-1])], "offers 10239 bytes"),
    "longer": ([site.serves(CONTENT + b"\0")], "offers 10241 bytes"),
    "longer, unmeasured": ([site.without_length(CONTENT + b"\0" * 99)], "sends more than the 10,240 bytes"),
    "a length that is none": ([site.serves(CONTENT, Content_Length="many")], "offers many bytes"),
    "broken": ([site.breaks_after(5)] * 3, "the connection broke"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_download_leaves_nothing_that_passes_for_the_data(
    publisher: Publisher, tmp_path: Path, case: str
) -> None:
    publisher.answers, message = list(FAILURES[case][0]), FAILURES[case][1]
    with pytest.raises(DataError, match=message) as caught:
        fetch(publisher, tmp_path)
    assert "numbers.bin" in str(caught.value)
    assert "better-attention data import" in str(caught.value) or "Nothing was kept" in str(caught.value)
    assert files(tmp_path).keys() <= {"numbers.bin.part"}
    publisher.answers = []
    assert fetch(publisher, tmp_path).read_bytes() == CONTENT  # and nothing that spoils the next attempt


def test_a_range_that_was_not_asked_for(publisher: Publisher, tmp_path: Path) -> None:
    (tmp_path / "numbers.bin.part").write_bytes(CONTENT[:100])
    publisher.answers = [lambda request: request.reply(206, CONTENT[:-100], Content_Range="bytes 0-10139/10240")]
    with pytest.raises(DataError, match="it is another file"):
        fetch(publisher, tmp_path)


def test_a_server_that_falls_silent(publisher: Publisher, tmp_path: Path) -> None:
    def stall(request: site.Request) -> None:
        request.reply(200, CONTENT[:100], Content_Length=str(len(CONTENT)))
        time.sleep(0.2)
        request.hang_up()

    publisher.answers = [stall] * 3
    with pytest.raises(DataError, match=r"the connection broke \(ReadTimeoutError\)"):
        fetch(publisher, tmp_path, patience=Patience(connect=1.0, silence=0.05))


def test_a_server_that_drips(publisher: Publisher, tmp_path: Path) -> None:
    """Byte after byte, each in good time: the time-out never comes, and without another limit nor does the end."""

    def drip(request: site.Request) -> None:
        request.reply(206 if request.headers["Range"] else 200, b"", **_rest(request))
        try:
            for _ in range(100):
                request.wfile.write(b"\0")
                time.sleep(0.01)
        except OSError:
            request.hang_up()  # the client has had enough

    publisher.answers = [drip] * 3
    start = time.monotonic()
    with pytest.raises(DataError, match="sends less than 1024 bytes a second"):
        fetch(publisher, tmp_path, patience=Patience(after=0.05))
    assert time.monotonic() - start < 5


def _rest(request: site.Request) -> dict[str, str]:
    asked = request.headers["Range"]
    start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
    place = {"Content_Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"} if asked else {}
    return {"Content_Length": str(len(CONTENT) - start), **place}


def test_nobody_there(tmp_path: Path) -> None:
    with Publisher() as gone:
        pass
    with pytest.raises(DataError, match=r"there is no connection \(ConnectionError\); 0 of 10,240 bytes are here"):
        fetch(gone, tmp_path)


def test_a_full_disk(publisher: Publisher, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="file sizes can be limited on POSIX systems only")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        with pytest.raises(DataError, match=r"cannot write to .*: File too large. It needs 10,240 free bytes"):
            fetch(publisher, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "numbers.bin").exists()
    assert fetch(publisher, tmp_path).read_bytes() == CONTENT


def test_a_folder_that_cannot_be_made(publisher: Publisher, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write to .*file/folder: .*`--data DIR` takes another folder"):
        fetch(publisher, tmp_path / "file" / "folder")


def test_pooch_says_nothing_and_keeps_its_voice(
    publisher: Publisher, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import pooch

    level = pooch.get_logger().level
    fetch(publisher, tmp_path)
    assert capfd.readouterr() == ("", "")
    assert pooch.get_logger().level == level


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A throw-away certificate for 127.0.0.1 that nobody trusts unless told to."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed; it makes the throw-away certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    new = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "keyUsage=critical,digitalSignature,keyCertSign"]
    subprocess.run([*new.split(), *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return key, certificate


def test_real_tls(
    publisher: Publisher, tmp_path: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No transport of the test's own: a stranger's certificate is refused, a trusted one serves."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    key, chain = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    publisher.use_tls(context)
    host = f"{ipaddress.ip_address('127.0.0.1')}:{publisher.port}"
    remote = site.remote(host=host)
    with pytest.raises(DataError, match="certificate is not trusted"):
        download.download(remote, tmp_path / "a", hosts={host})
    with requests.Session() as session:
        session.trust_env = False
        session.verify = str(chain)
        path = download.download(remote, tmp_path / "b", hosts={host}, session=session)
    assert path.read_bytes() == CONTENT


def test_every_official_address_is_allowed_and_has_a_whole_digest() -> None:
    from better_attention.lab.data.published import SOURCES

    for remote in (remote for source in SOURCES.values() for remote in source.remotes):
        assert urlsplit(remote.url).scheme == "https"
        assert len(bytes.fromhex(remote.sha256)) == 32
        assert remote.size > 0
