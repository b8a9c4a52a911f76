"""Downloads against a local HTTP server that misbehaves in every way the network does."""

import contextlib
import http.server
import io
import itertools
import shutil
import socket
import threading
import urllib.request

import pytest
import torch
from safetensors.torch import save_file

import download
from utils import InputError, sha256_of

ONNX = b"\x08\x07\x12\x07pytorch"  # how one begins


def model_bytes(seed=0):
    buffer = io.BytesIO()
    torch.save({"weight": torch.arange(100_000) + seed}, buffer)
    return buffer.getvalue()


class Server:
    """A server on a free local port; `answer(handler)` decides what each request gets, `requests` keeps them."""

    def __init__(self, answer):
        self.requests = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append((self.path, dict(self.headers)))
                answer(self)

            def log_message(self, *args):
                pass

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"
        self.httpd.requests = self.requests
        threading.Thread(target=self.httpd.serve_forever, args=(0.01,), daemon=True).start()


@contextlib.contextmanager
def serving(answer):
    server = Server(answer)
    try:
        yield server
    finally:
        server.httpd.shutdown()
        server.httpd.server_close()


def send(handler, data, *, status=200, announced=None, send_only=None, tag='"v1"', content_type="application/zip"):
    """Answer with `data`, honouring a range request for the current tag; optionally cut after `send_only` bytes."""
    start = 0
    wanted = handler.headers.get("Range")
    if wanted and handler.headers.get("If-Range") == tag:
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
        status = 206
    body = data[start:]
    handler.send_response(status)
    if status == 206:
        handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
    handler.send_header("Content-Length", str(announced if announced is not None else len(body)))
    handler.send_header("Content-Type", content_type)
    if tag:
        handler.send_header("ETag", tag)
    handler.end_headers()
    handler.wfile.write(body if send_only is None else body[:send_only])


def redirect(handler, where):
    handler.send_response(302)
    handler.send_header("Location", where)
    handler.end_headers()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)


def parts_of(url, folder, data, tag):
    """What an interrupted download of `url` left."""
    target = download.place_of(url, folder)
    target.parent.mkdir()
    target.with_name("net.pt.part").write_bytes(data)
    if tag:
        target.with_name("net.pt.part.etag").write_text(tag)


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_download_is_whole_recorded_and_used_again(tmp_path):
    data = model_bytes()
    with serving(lambda handler: send(handler, data)) as server:
        path = download.fetch(f"{server.url}/release/net.pt", tmp_path)
        assert path.read_bytes() == data and path.name == "net.pt"
        assert path.with_name("net.pt.sha256").read_text() == f"{sha256_of(path)}  net.pt\n"
        assert download.fetch(f"{server.url}/release/net.pt", tmp_path) == path
        assert len(server.requests) == 1
        assert path.with_name("address.txt").read_text() == f"{server.url}/release/net.pt\n"
    assert leftovers(path.parent) == ["address.txt", "net.pt", "net.pt.sha256"]


def test_two_addresses_with_one_file_name_are_two_networks(tmp_path):
    """Every network here is called embedding.pt: the name alone must never decide."""

    def answer(handler):
        send(handler, model_bytes(seed=len(handler.path)))

    with serving(answer) as server:
        addresses = [f"{server.url}/{run}/embedding.pt" for run in ("a", "bb")] + [f"{server.url}/a/embedding.pt?v=2"]
        files = [download.checkpoint_path(address, tmp_path) for address in addresses]
        assert len({path.read_bytes() for path in files}) == 3
        assert [download.checkpoint_path(address, tmp_path) for address in addresses] == files
        assert len(server.requests) == 3


def test_cut_connections_are_continued_where_they_ended(tmp_path):
    data = model_bytes()
    with serving(lambda handler: send(handler, data, send_only=200_000)) as server:
        assert download.fetch(f"{server.url}/net.pt", tmp_path).read_bytes() == data
        ranges = [headers.get("Range") for _, headers in server.requests]
    assert ranges[:3] == [None, "bytes=200000-", "bytes=400000-"]
    assert len(ranges) == -(-len(data) // 200_000)


def test_a_later_run_goes_on_with_the_part(tmp_path):
    data = model_bytes()
    with serving(lambda handler: send(handler, data)) as server:
        parts_of(f"{server.url}/net.pt", tmp_path, data[:1234], '"v1"')
        assert download.fetch(f"{server.url}/net.pt", tmp_path).read_bytes() == data
        assert server.requests[0][1]["Range"] == "bytes=1234-"


@pytest.mark.parametrize("etag", ['"v0"', None])
def test_a_part_of_another_file_is_thrown_away(tmp_path, etag):
    data = model_bytes()
    with serving(lambda handler: send(handler, data)) as server:
        parts_of(f"{server.url}/net.pt", tmp_path, b"x" * 5000, etag)
        assert download.fetch(f"{server.url}/net.pt", tmp_path).read_bytes() == data


def test_part_longer_than_the_file(tmp_path):
    data = model_bytes()

    def answer(handler):
        if handler.headers.get("Range"):
            handler.send_error(416)
        else:
            send(handler, data)

    with serving(answer) as server:
        parts_of(f"{server.url}/net.pt", tmp_path, b"x" * (len(data) + 5), '"v1"')
        assert download.fetch(f"{server.url}/net.pt", tmp_path).read_bytes() == data


def rest(data, content_range, tag='"v1"'):
    """Answers with the first half of `data`, and from then on as if all it has to say about ranges were this."""

    def answer(handler):
        if not handler.headers.get("Range"):
            again = any("Range" in headers for _, headers in handler.server.requests)
            return send(handler, data, send_only=None if again else len(data) // 2)
        start = len(data) // 2
        handler.send_response(206)
        handler.send_header("Content-Range", content_range.format(start=start, last=len(data) - 1, all=len(data)))
        handler.send_header("ETag", tag)
        handler.end_headers()
        handler.wfile.write(data[:-1][start:] + b"x")

    return answer


@pytest.mark.parametrize(
    ("content_range", "tag"),
    [
        ("bytes {start}-{last}/{all}", '"v2"'),  # of another file, though If-Range forbids that
        ("bytes 0-{last}/{all}", '"v1"'),
        ("bytes {start}-{last}/*", '"v1"'),
    ],
)
def test_a_rest_that_does_not_fit_is_not_taken_and_all_is_asked_for(tmp_path, content_range, tag):
    data = model_bytes()
    with serving(rest(data, content_range, tag)) as server:
        assert download.fetch(f"{server.url}/net.pt", tmp_path).read_bytes() == data
        assert [headers.get("Range") for _, headers in server.requests] == [None, f"bytes={len(data) // 2}-", None]


def test_halves_without_a_rest_end(tmp_path):
    """However much of it comes each time, it is the same half."""
    data = model_bytes()

    def answer(handler):
        if len(handler.server.requests) > 50:
            handler.send_error(404)
        elif handler.headers.get("Range"):
            handler.send_error(416)
        else:
            send(handler, data, send_only=len(data) // 2)

    with serving(answer) as server, pytest.raises(InputError, match=r"has no such range|connection ended"):
        download.fetch(f"{server.url}/net.pt", tmp_path)


def test_a_zip_without_its_end_is_no_model(tmp_path):
    """Of a body whose length nobody announced nothing else says that it was cut off."""
    data = model_bytes()
    with serving(lambda handler: chunked(handler, [data[:-5000]])) as server:
        with pytest.raises(InputError, match=r"the end of the \.pt model is missing"):
            download.fetch(f"{server.url}/net.pt", tmp_path)
        assert not list(tmp_path.rglob("net.pt*"))
    with serving(lambda handler: chunked(handler, [data])) as server:
        assert download.fetch(f"{server.url}/net.pt", tmp_path).read_bytes() == data


def test_a_known_file_in_a_folder_for_reading_only(tmp_path, monkeypatch):
    data = model_bytes()
    with serving(lambda handler: send(handler, data)) as server:
        path = download.fetch(f"{server.url}/net.pt", tmp_path)
        monkeypatch.setattr(download, "locked", None)
        assert download.fetch(f"{server.url}/net.pt", tmp_path) == path


def test_redirect_is_followed(tmp_path):
    data = model_bytes()

    def answer(handler):
        if handler.path == "/net.pt":
            handler.send_response(302)
            handler.send_header("Location", "/storage/4711?signature=abc")
            handler.end_headers()
        else:
            send(handler, data)

    with serving(answer) as server:
        path = download.fetch(f"{server.url}/net.pt", tmp_path)
    assert path.name == "net.pt" and path.read_bytes() == data


def test_wrong_length_is_an_error_without_a_file(tmp_path):
    data = model_bytes()
    with (
        serving(lambda handler: send(handler, data, announced=len(data) + 10, tag=None)) as server,
        pytest.raises(InputError, match="connection ended after"),
    ):
        download.fetch(f"{server.url}/net.pt", tmp_path)
    assert not list(tmp_path.rglob("net.pt"))


def test_wrong_hash_is_refused_ever_after(tmp_path):
    seeds = iter((0, 1))
    with serving(lambda handler: send(handler, model_bytes(next(seeds)))) as server:
        path = download.fetch(f"{server.url}/net.pt", tmp_path)
        path.unlink()
        for _ in range(2):
            with pytest.raises(InputError, match=r"net\.pt: SHA-256 is .* recorded at first use"):
                download.fetch(f"{server.url}/net.pt", tmp_path)
        assert len(server.requests) == 2


def chunked(handler, blocks):
    """Answer with blocks of unknown number, without announcing a length."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/zip")
    handler.end_headers()
    with contextlib.suppress(OSError):
        for block in blocks:
            handler.wfile.write(block)


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\0\0\0\0"])
def test_a_body_without_an_end_ends(tmp_path, monkeypatch, start):
    monkeypatch.setattr(download, "LARGEST_UNANNOUNCED", 1 << 22)
    blocks = itertools.chain([start], itertools.repeat(bytes(1 << 16)))
    reason = "no end after 4,194,304 bytes" if start[0] else "not a .pt model"
    with (
        serving(lambda handler: chunked(handler, blocks)) as server,
        pytest.raises(InputError, match=reason),
    ):
        download.fetch(f"{server.url}/net.pt", tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) == 0


def test_a_trickle_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PATIENCE_S", 0.0)
    with (
        serving(lambda handler: send(handler, model_bytes()[:100], announced=10**6, tag=None)) as server,
        pytest.raises(InputError, match="only 100 bytes came"),
    ):
        download.fetch(f"{server.url}/net.pt", tmp_path)


def test_more_than_announced_is_an_error(tmp_path):
    data = model_bytes()
    with (
        serving(lambda handler: send(handler, data, announced=len(data) - 10)) as server,
        pytest.raises(InputError, match="more than the announced"),
    ):
        download.fetch(f"{server.url}/net.pt", tmp_path)
    assert not download.place_of(f"{server.url}/net.pt", tmp_path).exists()


def test_more_than_any_model_or_the_disk_is_refused_before_it_comes(tmp_path):
    for announced in (download.LARGEST + 1, shutil.disk_usage(tmp_path).total + 1):
        with (
            serving(lambda handler, size=announced: send(handler, b"PK\x03\x04", announced=size)) as server,
            pytest.raises(InputError, match=r"a model has at most|free"),
        ):
            download.fetch(f"{server.url}/net.pt", tmp_path)
        assert len(server.requests) == 1


@pytest.mark.parametrize("where", ["ftp://127.0.0.1/net.pt", "file:///etc/passwd", "data:,PK"])
def test_redirect_to_another_protocol_is_refused(tmp_path, where):
    refused = pytest.raises(InputError, match=r"redirects from http to ftp|answered 302")
    with serving(lambda handler: redirect(handler, where)) as server, refused:
        download.fetch(f"{server.url}/net.pt", tmp_path)


def test_redirect_from_https_to_http_is_refused():
    request = urllib.request.Request("https://example.org/net.pt")
    with pytest.raises(download._RefusedError, match="from https to http"):
        download._Redirects().redirect_request(request, None, 302, "", {}, "http://example.org/net.pt")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda handler: send(handler, b"no model", announced="9" * 5000), "not a .pt model"),
        (lambda handler: redirect(handler, "http://[::1/net.pt"), "no such address, or a redirect to none"),
        (lambda handler: redirect(handler, f"http://{'a' * 70}.org/net.pt"), "no such address, or a redirect to none"),
        (lambda handler: redirect(handler, handler.path), "answered 302 .* infinite loop.;"),
        (lambda handler: handler.send_error(404), "404"),
        (lambda handler: send(handler, b"<html>log in</html>", content_type="text/html"), "web page"),
        (lambda handler: send(handler, b"no model at all"), "not a .pt model"),
        (lambda handler: send(handler, b""), "not a .pt model"),
    ],
)
def test_answers_that_are_no_model(tmp_path, answer, reason):
    with serving(answer) as server, pytest.raises(InputError, match=reason) as caught:
        download.fetch(f"{server.url}/net.pt", tmp_path)
    place = download.place_of(f"{server.url}/net.pt", tmp_path)
    assert str(place) in str(caught.value)
    assert not place.exists() and not place.with_name("net.pt.sha256").exists()


def test_safetensors_are_a_model(tmp_path):
    save_file({"weight": torch.ones(3)}, tmp_path / "made.safetensors")
    data = (tmp_path / "made.safetensors").read_bytes()
    with serving(lambda handler: send(handler, data)) as server:
        assert download.fetch(f"{server.url}/net.safetensors", tmp_path / "weights").read_bytes() == data
    with serving(lambda handler: send(handler, b"no model at all")) as server, pytest.raises(InputError, match="not a"):
        download.fetch(f"{server.url}/net.safetensors", tmp_path / "others")


def test_letters_of_a_suffix_may_be_capital(tmp_path):
    with serving(lambda handler: send(handler, ONNX)) as server:
        assert download.fetch(f"{server.url}/net.ONNX", tmp_path).read_bytes() == ONNX


def test_no_network_names_the_address_and_the_place(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/insight-face-v3.pt"
        with pytest.raises(InputError) as caught:
            download.fetch(url, tmp_path)
    assert url in str(caught.value) and str(download.place_of(url, tmp_path)) in str(caught.value)


def test_file_put_there_by_hand_is_taken_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "RELEASED_URL", "http://127.0.0.1:9/insight-face-v3.pt")
    (tmp_path / "insight-face-v3.pt").write_bytes(model_bytes())
    assert download.checkpoint_path("released", tmp_path) == tmp_path / "insight-face-v3.pt"
    assert (tmp_path / "insight-face-v3.pt.sha256").exists()


@pytest.mark.parametrize("path", ["[::1/a.pt", "127.0.0.1:9/ü.pt", "127.0.0.1:9/a%00.pt", "127.0.0.1:9/a b.pt"])
def test_what_is_no_address_is_one_line(path, tmp_path):
    with pytest.raises(InputError, match="not an address"):
        download.checkpoint_path(f"HTTP://{path}", tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_path_is_a_path(tmp_path):
    assert download.checkpoint_path(tmp_path / "a.pt") == tmp_path / "a.pt"


def test_two_processes_download_once(tmp_path):
    data = model_bytes()
    with serving(lambda handler: send(handler, data)) as server:
        threads = [threading.Thread(target=download.fetch, args=(f"{server.url}/net.pt", tmp_path)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(server.requests) == 1
    assert download.place_of(f"{server.url}/net.pt", tmp_path).read_bytes() == data
