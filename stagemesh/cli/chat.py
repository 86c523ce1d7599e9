"""`stagemesh chat`: a talk with the model. Ctrl-C stops an answer, Ctrl-D leaves."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console

from protos import text_generation_pb2 as pb
from stagemesh.cli.client import RPC_TIMEOUT_S, connection, text_generation
from stagemesh.cli.generate import stream_text, write_text
from stagemesh.cli.sampling_options import SamplingOptions
from stagemesh.errors import ConfigError, StageMeshError
from stagemesh.options import option, parse_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    system: str = option("", help="what the model is told before the talk begins")


@dataclass(slots=True)
class Talk:
    """What was said so far; a question that got no answer is not kept."""

    messages: list[pb.ChatMessage] = field(default_factory=list)

    def request(self, sampling: SamplingOptions, question: str) -> pb.GenerateRequest:
        request = sampling.request()
        asked = pb.ChatMessage(role="user", content=question)
        request.chat.messages.extend([*self.messages, asked])
        return request

    def keep(self, question: str, answer: str) -> None:
        self.messages.append(pb.ChatMessage(role="user", content=question))
        self.messages.append(pb.ChatMessage(role="assistant", content=answer))


def run(argv: Sequence[str]) -> int:
    options, sampling = parse_groups(
        (ChatOptions, SamplingOptions),
        argv,
        prog="stagemesh chat",
        description="A talk with the model. Ctrl-C stops an answer, Ctrl-D leaves.",
    )
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() editing and history
    talk = Talk()
    if options.system:
        talk.messages.append(pb.ChatMessage(role="system", content=options.system))
    console = Console(highlight=False)
    with asyncio.Runner() as runner:
        runner.run(_check_model(sampling))
        console.print("Ctrl-C stops an answer, Ctrl-D leaves.", style="dim")
        while (question := _ask(console)) is not None:
            if question:
                _answer(runner, console, talk, sampling, question)
    return 0


def _ask(console: Console) -> str | None:
    """The next question; empty after Ctrl-C, None at the end of the input."""
    try:
        return console.input("[bold cyan]> [/]").strip()
    except KeyboardInterrupt:
        console.print()
        return ""
    except EOFError:
        console.print()
        return None


def _answer(
    runner: asyncio.Runner,
    console: Console,
    talk: Talk,
    sampling: SamplingOptions,
    question: str,
) -> None:
    said: list[str] = []
    try:
        runner.run(_stream(sampling.target, talk.request(sampling, question), said))
    except StageMeshError as error:
        console.print(f"\n{error}", style="red")
        return
    console.print()
    talk.keep(question, "".join(said))


async def _stream(target: str, request: pb.GenerateRequest, said: list[str]) -> None:
    """Writes the answer as it comes, and returns when it is complete or Ctrl-C stopped it."""

    def on_text(text: str) -> None:
        said.append(text)
        write_text(text)

    async with connection(target, "gateway") as channel:
        answer = asyncio.ensure_future(stream_text(channel, request, on_text))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, answer.cancel)
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await answer
        finally:
            loop.remove_signal_handler(signal.SIGINT)


async def _check_model(sampling: SamplingOptions) -> None:
    """Raises ModelNotFound, or ConfigError where the model knows no talks."""
    asked = pb.GetModelRequest(model=sampling.model)
    async with connection(sampling.target, "gateway") as channel:
        model = await text_generation(channel).GetModel(asked, timeout=RPC_TIMEOUT_S)
    if not model.has_chat_template:
        raise ConfigError(
            f"{model.model} has no chat template: it continues text, see stagemesh generate"
        )
