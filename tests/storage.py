"""A folder as Google Cloud Storage: for epath by way of fsspec, for TensorStore over HTTP.

What is faked is the network and Google's side of it. The clients are the real ones, but for gcsfs.
"""

import contextlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from orbax.checkpoint._src.path import gcs_utils


class Bucket(DirFileSystem):
    """gs://NAME/... as files under `path`; like gcsfs it needs no folder made before."""

    def _join(self, path):
        if isinstance(path, str):
            path = path.removeprefix("gs://")
        return super()._join(path)


@contextlib.contextmanager
def served(folder, monkeypatch):
    """While entered, gs:// is `folder`."""
    local = LocalFileSystem(auto_mkdir=True)
    bucket = Bucket(path=str(folder), fs=local)
    systems = {"gcs": bucket, "file": local}
    kind = type(backend.fsspec_backend)
    monkeypatch.setattr(kind, "_get_filesystem", lambda self, name: systems[name])
    # Orbax asks whether the bucket has folders; it has none.
    monkeypatch.setattr(gcs_utils, "get_bucket", lambda name: object())

    server = ThreadingHTTPServer(("localhost", 0), type("H", (_Handler,), {"folder": folder}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://localhost:{server.server_port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """As much of the JSON API of Cloud Storage as TensorStore speaks."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def parse(self):
        """-> (query, path of the object, or of the bucket)."""
        address = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(address.query))
        words = address.path.split("/")
        at = words.index("b")
        bucket = self.folder / words[at + 1]
        name = query.get("name") or urllib.parse.unquote("/".join(words[at + 3 :]))
        return query, bucket, bucket / name

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def generation(self, file):
        return str(file.stat().st_mtime_ns) if file.is_file() else "0"

    def refused(self, query, file):
        wanted = query.get("ifGenerationMatch")
        return wanted is not None and wanted != self.generation(file)

    def do_GET(self):
        query, bucket, file = self.parse()
        if file == bucket:
            names = (str(p.relative_to(bucket)) for p in bucket.rglob("*") if p.is_file())
            prefix = query.get("prefix", "")
            items = [{"name": name} for name in sorted(names) if name.startswith(prefix)]
            self.answer(200, json.dumps({"items": items}).encode())
        elif not file.is_file():
            self.answer(404)
        elif query.get("ifGenerationNotMatch") == self.generation(file):
            self.answer(304)
        else:
            data, headers = file.read_bytes(), {"x_goog_generation": self.generation(file)}
            if part := self.headers.get("Range"):
                first, _, last = part.removeprefix("bytes=").partition("-")
                whole = len(data)
                start = int(first) if first else whole - int(last)
                end = min(int(last) + 1 if first and last else whole, whole)
                headers["Content_Range"] = f"bytes {start}-{end - 1}/{whole}"
                self.answer(206, data[start:end], **headers)
            else:
                self.answer(200, data, **headers)

    def do_POST(self):
        query, _, file = self.parse()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refused(query, file):
            self.answer(412)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        made = {"name": query["name"], "generation": self.generation(file), "size": str(len(data))}
        self.answer(200, json.dumps(made).encode())

    def do_DELETE(self):
        query, _, file = self.parse()
        if self.refused(query, file):
            self.answer(412)
        elif not file.is_file():
            self.answer(404)
        else:
            file.unlink()
            self.answer(204)
