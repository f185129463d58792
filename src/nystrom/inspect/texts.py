"""What the model reads for a report: pieces of equal length, cut from the user's files."""

import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from nystrom.data.text import text_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LETTERS = 32
"""Read at most this many characters of a file per token that is wanted from it."""


def pieces(tokenizer: "PreTrainedTokenizerBase", path: Path, length: int, count: int) -> Int[Tensor, "t n"]:
    """`count` texts of exactly `length` tokens, special ones included, and none of them padded.

    First the beginning of each file, in a shuffled order that is always the same; where there are too few files, what
    follows in them.

    Raises:
        ValueError: there are too few such pieces, or a file is not UTF-8 text.
        FileNotFoundError: there is no such path.
    """
    files = text_files([path])
    random.Random(0).shuffle(files)
    before, after = special_tokens(tokenizer)
    body = length - len(before) - len(after)
    if body < 1:
        raise ValueError(f"length must leave room beside {len(before) + len(after)} special tokens: got {length}")
    firsts: list[list[int]] = []
    others: list[list[int]] = []
    found: list[int] = []
    for file in files:
        text = _read(file, LETTERS * length * count)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        found.append(len(ids))
        first, *rest = [before + ids[i : i + body] + after for i in range(0, len(ids) - body + 1, body)] or [[]]
        firsts += [first] if first else []
        others += rest[:count]
        if len(firsts) == count:
            break
    chosen = (firsts + others)[:count]
    if len(chosen) < count:
        special = len(before) + len(after)
        longest = sorted(found, reverse=True)[:count]
        fits = next(n for n in range(body, -1, -1) if n == 0 or sum(ids // n for ids in longest) >= count)
        fixes = [f"--length {fits + special}"] * (fits > 0) + [f"--texts {len(chosen)}"] * (len(chosen) > 0)
        raise ValueError(
            f"{path}: too short for {count} texts of {length} tokens: the longest of {len(files)} files has "
            f"{longest[0] + special}, which makes {len(chosen)} texts in all; pass {' or '.join(fixes) or 'more text'}"
        )
    return torch.tensor(chosen)


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    at = next(i for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare)
    return whole[:at], whole[at + len(bare) :]


def _read(path: Path, most: int) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(most)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at offset {error.start}; convert it first") from None
