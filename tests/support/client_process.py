"""A client as a process: `python client_process.py grpc|http ADDRESS MAX_TOKENS`.

Prints a line when its request was sent, and one for each message of the answer.
"""

from __future__ import annotations

import http.client
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import grpc

from protos import text_generation_pb2 as pb
from protos import text_generation_pb2_grpc as pb_grpc


def over_grpc(address: str, max_tokens: int) -> None:
    request = pb.GenerateRequest(
        text="Once", stopping=pb.StoppingCriteria(max_tokens=max_tokens, ignore_eos=True)
    )
    with grpc.insecure_channel(address) as channel:
        call = pb_grpc.TextGenerationStub(channel).Generate(request)
        print("sent", flush=True)
        for _ in call:
            print("answer", flush=True)


def over_http(address: str, max_tokens: int) -> None:
    body = {"prompt": "Once", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    connection = http.client.HTTPConnection(address)
    connection.request("POST", "/v1/completions", json.dumps(body))
    print("sent", flush=True)
    for line in connection.getresponse():
        if line.strip():
            print("answer", flush=True)


if __name__ == "__main__":
    kind, where, length = sys.argv[1:]
    {"grpc": over_grpc, "http": over_http}[kind](where, int(length))
