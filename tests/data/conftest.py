"""Makes `published_files` importable; a web server on this machine, for downloads."""

import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

HELPERS = str(Path(__file__).parent)
if HELPERS not in sys.path:
    sys.path.append(HELPERS)


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; of a file named "broken" it sends half of what it announces."""

    def log_message(self, *_: object) -> None:
        pass

    def copyfile(self, source, outputfile) -> None:  # type: ignore[no-untyped-def]
        data = source.read()
        outputfile.write(data[: len(data) // 2] if self.path.endswith("broken") else data)
        self.close_connection = True


class Site:
    """Attributes: folder: what is served; url: its address, ending in a slash."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    folder = tmp_path / "site"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield Site(folder, f"http://127.0.0.1:{server.server_address[1]}/")
    server.shutdown()
    thread.join()
    server.server_close()
