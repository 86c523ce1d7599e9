"""An environment of its own for each peer, and its own form of the checkpoint: made once, kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.make_model import SIZES, make_model

REPO = Path(__file__).resolve().parents[2]
REQUIREMENTS = Path(__file__).parent / "requirements"
OURS = "stagemesh"
# optimum-intel asks for it, text needs none, and where torch is a build for the CPU the index has
# only one for CUDA, which does not load beside it.
_UNWANTED = {"openvino": ("torchvision",)}
# What a package is built with, where it is built: llama.cpp's servers for parts of a model.
_BUILD = {"llama_cpp": {"CMAKE_ARGS": "-DGGML_RPC=ON"}}
PEERS = ("transformers", "ctranslate2", "openvino", "llama_cpp")


@dataclass(frozen=True, slots=True)
class Environments:
    """Everything lies in `work`: environments, the checkpoint, and what was made of it."""

    work: Path
    size: str

    @property
    def model(self) -> Path:
        return self.work / f"llama-{self.size}"

    def converted(self, peer: str, dtype: str) -> Path:
        return self.work / f"llama-{self.size}-{peer}-{dtype}"

    def python(self, peer: str) -> Path:
        if peer == OURS:
            return Path(sys.executable)
        return self.work / "venvs" / peer / "bin" / "python"

    def command(self, peer: str, *words: str) -> list[str]:
        return [str(self.python(peer)), "-m", f"benchmarks.peers.{peer}_peer", *words]

    def make_model(self) -> None:
        """Done once: config.json is written after the weights."""
        if not (self.model / "tokenizer_config.json").exists():
            print(f"making {self.model}", file=sys.stderr)
            make_model(self.model, SIZES[self.size])

    def make_venv(self, peer: str) -> None:
        """Again when its requirements have changed. Raises CalledProcessError."""
        if peer == OURS:
            return
        wanted = (REQUIREMENTS / f"{peer}.txt").read_bytes()
        home = self.work / "venvs" / peer
        stamp = home / "requirements"
        if stamp.exists() and stamp.read_text() == _digest(wanted):
            return
        print(f"making the environment of {peer}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        install = [str(self.python(peer)), "-m", "pip", "install", "--quiet"]
        subprocess.run(
            [*install, "-r", str(REQUIREMENTS / f"{peer}.txt")],
            check=True,
            env={**os.environ, **_BUILD.get(peer, {})},
        )
        if unwanted := _UNWANTED.get(peer):
            remove = [str(self.python(peer)), "-m", "pip", "uninstall", "--quiet", "-y"]
            subprocess.run([*remove, *unwanted], check=True)
        stamp.write_text(_digest(wanted))

    def convert(self, peer: str, dtype: str) -> None:
        """Raises CalledProcessError; what was half made is removed."""
        out = self.converted(peer, dtype)
        stamp = out.with_name(f"{out.name}.done")
        if stamp.exists():
            return
        print(f"converting for {peer} {dtype}", file=sys.stderr)
        shutil.rmtree(out, ignore_errors=True)
        options = ("--model", str(self.model), "--out", str(out), "--dtype", dtype)
        subprocess.run(
            self.command(peer, "convert", *options), check=True, cwd=REPO, stdout=sys.stderr
        )
        stamp.touch()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
