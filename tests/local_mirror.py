"""A web server on this machine that fails on demand: for the tests of downloads."""
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Mirror:
    """Serves `content` at every address; an address's last word says how.

    whole            as it should be, ranges too
    cut              hangs up after `piece` bytes of each reply
    reset            the same, by a reset
    once             gives `piece` bytes at the first request, 503 later
    once-stalls      the same, but does not hang up
    silent           accepts, and says nothing
    stalls           sends `piece` bytes, then nothing
    rangeless        ignores Range
    rangeless-cut    ignores Range, hangs up after `piece` bytes
    wrong            other bytes of the same length
    lengthless       no Content-Length; closes at the end
    slow             `piece` bytes at a time, a tenth of a second between them
    anything else    404

    `log` lists (word, first byte asked for or None, bytes sent).
    """

    def __init__(self, content, piece=1000):
        self.content, self.piece, self.log, self.agents = content, piece, [], set()
        self.stop = threading.Event()
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                mirror.answer(self)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, address):
                pass  # a client that went away

        self.server = Server(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,),
                                       daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.stop.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def url(self, word, name="file"):
        return f"http://127.0.0.1:{self.server.server_port}/{name}/{word}"

    def answer(self, request):
        word = request.path.rsplit("/", 1)[1]
        self.agents.add(request.headers.get("User-Agent"))
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        asked = int(asked[1]) if asked else None
        entry = [word, asked, 0]
        seen = any(e[0] == word for e in self.log)
        self.log.append(entry)
        if word == "silent":
            self.stop.wait(20)
            return
        if word not in ("whole", "cut", "reset", "once", "once-stalls", "stalls", "wrong",
                        "rangeless", "rangeless-cut", "lengthless", "slow"):
            return request.send_error(404)
        if word.startswith("once") and seen:
            return request.send_error(503)
        start = 0 if asked is None or word.startswith("rangeless") else asked
        if start >= len(self.content):
            return request.send_error(416)
        rest = self.content[start:]
        if word == "wrong":
            rest = bytes(255 - b for b in rest)
        partial = start > 0 or (asked == 0 and not word.startswith("rangeless"))
        request.send_response(206 if partial else 200)
        if partial:
            end, total = len(self.content) - 1, len(self.content)
            request.send_header("Content-Range", f"bytes {start}-{end}/{total}")
        if word != "lengthless":
            request.send_header("Content-Length", str(len(rest)))
        request.end_headers()
        self.send(request, word, rest, entry)

    def send(self, request, word, rest, entry):
        if word in ("cut", "reset", "once", "once-stalls", "stalls", "rangeless-cut"):
            rest = rest[:self.piece]
        step = self.piece if word == "slow" else max(len(rest), 1)
        for k in range(0, len(rest), step):
            entry[2] += len(rest[k:k + step])  # first: the client may be done before us
            request.wfile.write(rest[k:k + step])
            if word == "slow" and self.stop.wait(0.1):
                return
        request.wfile.flush()
        if word.endswith("stalls"):
            self.stop.wait(20)
        if word == "reset":  # close at once, with RST
            self.stop.wait(0.2)  # let the bytes be read first
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                          struct.pack("ii", 1, 0))
            request.connection.close()
