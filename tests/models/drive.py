"""A stand-in for Google Drive and for plain addresses, on this machine.

It is a proxy that answers for every host itself, with a certificate made for the test. A downloader reaches it through
the environment variables that name a proxy and the certificates to trust, and so runs unchanged.
"""

import contextlib
import re
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

CONFIRMATION = (
    "<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>"
    '<form id="download-form" action="https://drive.usercontent.google.com/download" method="get">'
    '<input type="hidden" name="id" value="{id}"><input type="hidden" name="export" value="download">'
    '<input type="hidden" name="confirm" value="t"><input type="hidden" name="uuid" value="1-2-3">'
    '<input type="submit" value="Download anyway"></form></body></html>'
)
QUOTA = (
    "<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>"
    '<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p></body></html>'
)
SIGN_IN = "<!DOCTYPE html><html><head><title>Sign in</title></head><body><form action='/signin'></form></body></html>"


class Source(ThreadingHTTPServer):
    """The server.

    Attributes:
        content: The bytes of the file.
        page: None for the file; otherwise the status and the page that stands in its place.
        cuts: After how many bytes each of the next answers breaks off; None for an answer that does not.
        stalls: An answer that breaks off sets `stalled` and waits for `released` before it does.
        ranges: Whether parts of the file can be asked for.
        tag: The ETag of the file, if there is one.
        log: (host, path, Range header) of each request.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = b""
        self.page: tuple[int, str] | None = None
        self.cuts: list[int | None] = []
        self.stalls = False
        self.stalled = threading.Event()
        self.released = threading.Event()
        self.ranges = True
        self.tag: str | None = None
        self.log: list[tuple[str, str, str | None]] = []
        self.certificate = folder / "certificate.pem"
        hosts = ("drive.google.com", "docs.google.com", "drive.usercontent.google.com", "weights.example")
        names = ",".join(f"DNS:{host}" for host in hosts)
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=stand-in"]
        command += ["-addext", f"subjectAltName={names}", "-keyout", folder / "key.pem", "-out", self.certificate]
        subprocess.run(command, check=True, capture_output=True)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(self.certificate, folder / "key.pem")

    def environment(self) -> dict[str, str]:
        """The variables through which a downloader reaches this server."""
        address = f"http://127.0.0.1:{self.server_port}"
        certificate = str(self.certificate)
        return {
            "https_proxy": address,
            "HTTPS_PROXY": address,
            "REQUESTS_CA_BUNDLE": certificate,
            "SSL_CERT_FILE": certificate,
            "no_proxy": "",
            "NO_PROXY": "",
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Source
    host = ""

    def log_message(self, *args: object) -> None:
        pass

    def do_CONNECT(self) -> None:
        self.host = self.path.partition(":")[0]
        self.send_response(200)
        self.end_headers()
        self.connection = self.request = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb")
        self.wfile = self.connection.makefile("wb")
        self.close_connection = False

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        self.server.log.append((self.host, address.path, self.headers["Range"]))
        query = parse_qs(address.query)
        if self.server.page is not None:
            self._send_page(*self.server.page)
        elif self.host == "drive.google.com":
            self._send_page(200, CONFIRMATION.format(id=query["id"][0]))
        elif self.host == "drive.usercontent.google.com" and (query.get("confirm"), query.get("uuid")) != (
            ["t"],
            ["1-2-3"],
        ):
            self._send_page(400, SIGN_IN)
        else:
            self._send_file()

    def _send_page(self, status: int, page: str) -> None:
        body = page.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self) -> None:
        content, first = self.server.content, 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        same = self.headers["If-Range"] in (None, self.server.tag)
        if asked and self.server.ranges and same:
            first = int(asked[1])
            if first >= len(content):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Disposition", 'attachment; filename="released name.pth"')
        self.send_header("Content-Length", str(len(content) - first))
        if self.server.tag:
            self.send_header("ETag", self.server.tag)
        self.end_headers()
        cut = self.server.cuts.pop(0) if self.server.cuts else None
        with contextlib.suppress(OSError):  # a client that goes away
            self.wfile.write(content[first:] if cut is None else content[first : first + cut])
            self.wfile.flush()
        if cut is not None:
            if self.server.stalls:
                self.server.stalled.set()
                self.server.released.wait(60)
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.close()
