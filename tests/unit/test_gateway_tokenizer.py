"""Tokens of text and text of tokens: golden ids, transformers' ids, exact incremental decoding."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import DEMO_MODEL, SHARED, shared

from gateway.detokenizer import Detokenizer
from gateway.token_text import TokenText
from gateway.tokenizer import Tokenizer
from stagemesh.errors import CheckpointError, UnsupportedModel

DIRECTORIES = [
    directory
    for directory in (
        DEMO_MODEL,
        SHARED / "models" / "stories260K",
        SHARED / "tokenizers" / "gpt-2",
        SHARED / "tokenizers" / "qwen2",
    )
    if (directory / "tokenizer.json").exists()
]
IDS = [directory.name for directory in DIRECTORIES]


@cache
def load(directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(directory)


@cache
def library(directory: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


def pieces(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer.token_text)
    return [*map(detokenizer.push, token_ids), detokenizer.flush()]


@pytest.mark.parametrize("name", ["gpt-2", "qwen2"])
def test_golden_ids(name: str) -> None:
    directory = shared(f"tokenizers/{name}")
    tokenizer = load(directory)
    for case in json.loads((directory / "golden.json").read_text(encoding="utf-8")):
        assert list(tokenizer.encode(case["text"])) == case["ids"]
        if name == "gpt-2":  # qwen2 normalises
            assert tokenizer.decode(case["ids"]) == case["text"]


def test_reference_prompts_have_the_ids_of_transformers() -> None:
    directory = shared("models/stories260K")
    tokenizer = load(directory)
    for case in json.loads((directory / "reference.json").read_text())["cases"]:
        assert list(tokenizer.encode(case["prompt"])) == case["prompt_ids"]
        assert tokenizer.decode(case["output_ids"]).strip() == case["text"].strip()


@pytest.mark.parametrize("directory", DIRECTORIES, ids=IDS)
@pytest.mark.parametrize("add", [True, False])
def test_special_tokens_are_those_of_transformers(directory: Path, add: bool) -> None:
    if not (directory / "tokenizer_config.json").exists():
        pytest.skip("only a tokenizer.json")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(directory))
    for text in ("Once upon a time", "", "  two  spaces ", "naïve 🦙"):
        expected = theirs(text, add_special_tokens=add).input_ids
        assert list(load(directory).encode(text, add_special_tokens=add)) == expected


@pytest.mark.parametrize("directory", DIRECTORIES, ids=IDS)
@given(text=st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_deltas_of_a_text_are_its_decoding(directory: Path, text: str) -> None:
    """Against the tokenizers library, which decodes all tokens at once."""
    tokenizer = load(directory)
    token_ids = list(tokenizer.encode(text))
    assert "".join(pieces(tokenizer, token_ids)) == library(directory).decode(token_ids)


@pytest.mark.parametrize("directory", DIRECTORIES, ids=IDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_tokens_decode_alike_at_once_and_one_by_one(
    directory: Path, data: st.DataObject
) -> None:
    tokenizer = load(directory)
    token_ids = data.draw(st.lists(st.integers(0, 500), max_size=30))
    parts = pieces(tokenizer, token_ids)
    assert "".join(parts) == tokenizer.decode(token_ids)
    hidden = [i for i in token_ids if not tokenizer.is_special(i)]
    everything = b"".join(map(tokenizer.token_text.bytes_of, hidden))
    if tokenizer.token_text.strips_first_space:
        everything = everything.removeprefix(b" ")
    assert "".join(parts) == everything.decode("utf-8", errors="replace")


@pytest.mark.parametrize("directory", DIRECTORIES, ids=IDS)
def test_no_half_character_is_shown(directory: Path) -> None:
    tokenizer = load(directory)
    text = "llama 🦙, 漢字, Ärger 🏳️‍🌈"
    parts = pieces(tokenizer, list(tokenizer.encode(text)))
    assert not any("�" in part for part in parts)


def test_the_space_of_a_first_word_stays_where_text_comes_before() -> None:
    tokenizer = load(shared("models/stories260K"))
    (word,) = tokenizer.encode("Once", add_special_tokens=False)
    first = Detokenizer(tokenizer.token_text)
    assert first.push(word) + first.push(word) == "Once Once"
    assert Detokenizer(tokenizer.token_text, at_start=False).push(word) == " Once"


def test_special_tokens_are_shown_where_asked_for() -> None:
    tokenizer = load(DEMO_MODEL)
    bos = tokenizer.encode("")[0]
    assert tokenizer.decode([bos]) == ""
    assert tokenizer.decode([bos], skip_special=False) == tokenizer.bos_token
    assert Detokenizer(tokenizer.token_text).push(bos, show_special=True) == tokenizer.bos_token


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)


def test_an_unknown_decoder_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="WordPiece"):
        TokenText({"type": "WordPiece"}, lambda _: None, {})
