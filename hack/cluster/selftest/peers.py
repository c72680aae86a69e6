"""One of two pods of a JobSet: answers on a port, and wants to hear the other's name from the other."""

import http.server
import os
import threading
import time
import urllib.request

OWN = os.environ["JOB_COMPLETION_INDEX"]
OTHER = str(1 - int(OWN))
PATIENCE_S = 60


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(OWN.encode())
        heard.set()


def ask(host: str) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return urllib.request.urlopen(f"http://{host}:8000/", timeout=2).read().decode()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


heard = threading.Event()
threading.Thread(target=http.server.HTTPServer(("", 8000), Answer).serve_forever, daemon=True).start()
answer = ask(f"pair-peer-0-{OTHER}.pair")
assert answer == OTHER, answer
assert heard.wait(PATIENCE_S), "the other pod did not ask"
print(f"pod {OWN} found pod {answer}", flush=True)
