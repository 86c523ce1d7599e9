"""OpenVINO GenAI's continuous batching behind the part of OpenAI's HTTP API that a load needs.

    python -m benchmarks.peers.openvino_server --out CONVERTED --threads 2 --port 8001

One thread steps the pipeline, as its own server does; requests join between steps. Standard
library and OpenVINO only: it runs in that peer's environment.
"""

from __future__ import annotations

import argparse
import json
import queue
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.peers.openvino_peer import pipeline_of

_MODEL = "openvino"


class Stepper:
    """Gives each request a queue of lists of token ids, and None at its end."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._asked: queue.SimpleQueue[tuple[Any, int, queue.SimpleQueue[Any]]] = (
            queue.SimpleQueue()
        )
        self._running: list[tuple[Any, queue.SimpleQueue[Any]]] = []
        self._ids = count()
        threading.Thread(target=self._step_forever, daemon=True).start()

    def stream(self, prompt: Any, new_tokens: int) -> Iterator[list[int]]:
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._asked.put((prompt, new_tokens, answers))
        while (tokens := answers.get()) is not None:
            yield tokens

    def _step_forever(self) -> None:
        while True:
            if not self._running:
                self._admit(self._asked.get())
            while not self._asked.empty():
                self._admit(self._asked.get())
            self._pipeline.step()
            self._running = [pair for pair in self._running if _deliver(*pair)]

    def _admit(self, asked: tuple[Any, int, queue.SimpleQueue[Any]]) -> None:
        import openvino_genai as genai

        prompt, new_tokens, answers = asked
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        handle = self._pipeline.add_request(next(self._ids), prompt, config)
        self._running.append((handle, answers))


def _deliver(handle: Any, answers: queue.SimpleQueue[Any]) -> bool:
    """What a step has brought of a request; whether more will come."""
    import openvino_genai as genai

    while handle.can_read():
        for output in handle.read().values():
            answers.put(list(output.generated_ids))
    if handle.get_status() == genai.GenerationStatus.RUNNING:
        return True
    answers.put(None)
    return False


class _Handler(BaseHTTPRequestHandler):
    """Says HTTP/1.0: a stream ends with its connection."""

    stepper: Stepper
    tokenizer: Any

    def do_GET(self) -> None:
        self._say(200, {"object": "list", "data": [{"id": _MODEL, "object": "model"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = self.tokenizer.encode(asked["prompt"]).input_ids
        streams = self.stepper.stream(prompt, int(asked["max_tokens"]))
        usage = {"prompt_tokens": prompt.shape[1], "completion_tokens": 0}
        if not asked.get("stream"):
            usage["completion_tokens"] = sum(len(tokens) for tokens in streams)
            self._say(200, {"choices": [{"index": 0, "text": ""}], "usage": usage})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for tokens in streams:
            usage["completion_tokens"] += len(tokens)
            text = self.tokenizer.decode(tokens)
            # Text of random weights may be half a character: what counts is that it came.
            self._event({"choices": [{"index": 0, "text": text or " "}]})
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def _say(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body | {"created": int(time.time())}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Not one line per request."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the converted checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    pipeline = pipeline_of(args.out, args.threads)
    _Handler.stepper = Stepper(pipeline)
    _Handler.tokenizer = pipeline.get_tokenizer()
    ThreadingHTTPServer(("127.0.0.1", args.port), _Handler).serve_forever()


if __name__ == "__main__":
    main()
