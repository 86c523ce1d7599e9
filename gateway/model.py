"""What the gateway knows of the model it serves, read from the model's directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.chat_template import ChatTemplate, find_chat_template
from gateway.tokenizer import Tokenizer, read_json
from stagemesh.errors import CheckpointError, InvalidRequest
from stagemesh.model_spec import ModelSpec
from stagemesh.sampling import SamplingSpec

# What a request may leave to generation_config.json; named alike there and in SamplingParams.
SAMPLING_NUMBERS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """`default_sampling` is what a request that says nothing gets; its seed means nothing."""

    name: str
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    chat_template_problem: str
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    default_sampling: SamplingSpec

    @classmethod
    def from_directory(cls, directory: Path, name: str = "") -> ServedModel:
        """Raises CheckpointError or UnsupportedModel; a bad chat template only concerns chats."""
        spec = ModelSpec.from_directory(directory)
        tokenizer = Tokenizer.from_directory(directory)
        template, problem = _chat_template(directory, tokenizer)
        return cls(
            name=name or directory.resolve().name,
            tokenizer=tokenizer,
            chat_template=template,
            chat_template_problem=problem,
            vocab_size=spec.vocab_size,
            context_length=spec.context_length,
            eos_token_ids=spec.eos_token_ids,
            default_sampling=_default_sampling(directory / "generation_config.json"),
        )

    def template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise InvalidRequest(self.chat_template_problem, param="messages")
        return self.chat_template


def _chat_template(directory: Path, tokenizer: Tokenizer) -> tuple[ChatTemplate | None, str]:
    """The template, or why there is none."""
    source = find_chat_template(directory)
    if source is None:
        return None, "the model has no chat template; send a text or token prompt"
    variables = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    try:
        return ChatTemplate(source, variables), ""
    except CheckpointError as error:
        return None, error.message


def _default_sampling(path: Path) -> SamplingSpec:
    config = read_json(path)
    found = {name: config[name] for name in SAMPLING_NUMBERS if config.get(name) is not None}
    try:
        return SamplingSpec(**_as_numbers(found))
    except (InvalidRequest, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _as_numbers(found: Mapping[str, Any]) -> dict[str, Any]:
    """-1 is another way to say that all tokens are candidates."""
    numbers: dict[str, Any] = {name: float(value) for name, value in found.items()}
    if "top_k" in numbers:
        numbers["top_k"] = max(0, int(numbers["top_k"]))
    return numbers
