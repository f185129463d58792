"""Documents to blocks of token ids, streamed.

shards of sources -> documents -> pieces of text -> token ids -> blocks of `length`
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from nystrom.data.sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Packing = Literal["stream", "documents"]
Encode = Callable[[str], np.ndarray]
"""Text -> (2, tokens): ids, and 1 where a word begins."""

SPACE = np.isin(np.arange(256), list(b" \t\n\r\f\v"))


def load_tokenizer(name: str, needed: Iterable[str]) -> "PreTrainedTokenizerBase":
    """A tokenizer to pretrain with.

    Args:
        name: "bytes" for the built-in one, 256 bytes after 6 special ids; a folder or hub name of a Hugging Face one.
        needed: special tokens that it must have beside mask, sep and pad.

    Raises:
        ValueError: it lacks one.
        OSError: there is no such tokenizer.
    """
    from transformers import AutoTokenizer, PerceiverTokenizer

    from nystrom.hf.files import check_tokenizer

    if name == "bytes":
        return PerceiverTokenizer()
    if (folder := Path(name)).is_dir():
        check_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(name)
    for token in ("mask", "sep", "pad", *needed):
        if getattr(tokenizer, f"{token}_token_id") is None:
            raise ValueError(f"{name}: this tokenizer has no {token} token; pretraining needs one")
    return tokenizer


def make_encode(tokenizer: "PreTrainedTokenizerBase", whole_words: bool = False) -> Encode:
    """Of this tokenizer, without special tokens: "[MASK]" written in a text stays those six characters.

    Args:
        tokenizer: the built-in byte tokenizer, or any Hugging Face one.
        whole_words: a word is what the tokenizer's own word_ids say, for bytes what stands between white space;
            False: every token is a word of its own.

    Raises:
        ValueError: whole_words and a tokenizer that knows no words, as those written in Python.
    """
    from transformers import PerceiverTokenizer

    if isinstance(tokenizer, PerceiverTokenizer):
        return _encode_words if whole_words else _encode_bytes
    if whole_words and not tokenizer.is_fast:
        raise ValueError(f"whole words need a fast tokenizer, which knows them: got {type(tokenizer).__name__}")

    def encode(text: str) -> np.ndarray:
        encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids = np.asarray(encoded["input_ids"], np.int64)
        starts = np.ones_like(ids)
        if whole_words:
            words = np.asarray(encoded.word_ids(0), np.float64)  # None, of a token that is in no word, becomes NaN
            starts[1:] = words[1:] != words[:-1]
        return np.stack([ids, starts])

    return encode


def _encode_bytes(text: str) -> np.ndarray:
    """The same ids as PerceiverTokenizer's, bytes after 6 special ids, 100 times faster."""
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int64) + 6
    return np.stack([ids, np.ones_like(ids)])


def _encode_words(text: str) -> np.ndarray:
    found = np.frombuffer(text.encode(), np.uint8)
    space = SPACE[found]
    starts = space.copy()
    starts[1:] |= space[:-1]
    starts[:1] = True
    return np.stack([found.astype(np.int64) + 6, starts.astype(np.int64)])


def blocks(
    shards: list[list[Source]], encode: Encode, separator: int, length: int, packing: Packing = "stream"
) -> Iterator[dict[str, np.ndarray]]:
    """End each document with `separator` and cut into blocks.

    Args:
        shards: groups of sources; no block holds text of two.
        encode: as `make_encode` makes it.
        separator: id of the token that ends a document.
        length: tokens of a block (count); the last of a shard, or of a document, may be shorter.
        packing: "stream" joins a shard's documents, so that a block may hold parts of several; with "documents" none
            does.

    Yields:
        input_ids (length,) and word_starts (length,), 1 where a word begins.
    """
    for sources in shards:
        documents = (document for source in sources for document in source.documents())
        if packing == "documents":
            for document in documents:
                yield from _pack([document], encode, separator, length)
        else:
            yield from _pack(documents, encode, separator, length)


def _pack(
    documents: Iterable[Iterable[str]], encode: Encode, separator: int, length: int
) -> Iterator[dict[str, np.ndarray]]:
    end = np.asarray([[separator], [1]], np.int64)
    parts: list[np.ndarray] = []
    held = 0
    for document in documents:
        empty = True
        for piece in document:
            tokens = encode(piece)
            empty &= tokens.shape[1] == 0
            parts.append(tokens)
            held += tokens.shape[1]
            if held >= length:
                joined = np.concatenate(parts, 1)
                whole = held - held % length
                yield from map(_block, np.split(joined[:, :whole], whole // length, 1))
                parts, held = [joined[:, whole:]], held - whole
        if not empty:
            parts.append(end)
            held += 1
    rest = np.concatenate(parts, 1) if parts else np.empty((2, 0), np.int64)
    while rest.shape[1]:
        block, rest = rest[:, :length], rest[:, length:]
        if (block[0] != separator).any():
            yield _block(block)


def _block(tokens: np.ndarray) -> dict[str, np.ndarray]:
    return {"input_ids": tokens[0], "word_starts": tokens[1]}
