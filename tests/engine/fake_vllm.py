"""Stands in for vLLM's server: the same two endpoints, and a worker process that does not see its parent die.

Usage: fake_vllm.py PORT MODE, with MODE `ready`, `stubborn` (ignores SIGTERM), `silent` (never healthy) or
`broken` (fails as vLLM does).
"""

import json
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

port, mode = int(sys.argv[1]), sys.argv[2]

if mode == "broken":
    print("Traceback (most recent call last):\n  File x\n(EngineCore) ERROR ValueError: too little KV cache")
    sys.exit("RuntimeError: Engine core initialization failed. See root cause above.")

worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


def stop(number: int, frame: object) -> None:
    worker.kill()
    sys.exit(0)


signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "stubborn" else stop)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = {"data": [{"id": "fake", "max_model_len": 4096}]} if self.path == "/v1/models" else {}
        payload = json.dumps(body).encode()
        self.send_response(503 if mode == "silent" else 200)
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *parts: object) -> None:
        pass


ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
