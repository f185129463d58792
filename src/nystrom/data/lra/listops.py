"""ListOps (Nangia & Bowman 2018) at Long Range Arena's lengths: nested MIN, MAX, MED and SM of digits. Made anew.

`[MAX 2 9 [MIN 4 7 ] 0 ]` is 9. MED is the median, rounded down; SM the sum modulo 10.

The law is that of Long Range Arena's own generator. A tree is drawn from the root: a node above the deepest level is an
operator with probability 0.25, with 2 to 10 arguments, else a digit; operators, numbers of arguments and digits are
equally likely; a tree is kept if its length is between the limits and it has not been kept before. What makes ours fast
changes nothing of it: roots that are digits, of which none is long enough, are not drawn; a tree is given up as soon as
it is too long; and a thousand trees grow together, level by level: their shapes first and then, of those that are kept,
the symbols.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import numpy as np

from nystrom.data.lra.chunks import generator, in_order, progress

SYMBOLS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
"""Token n + 1 is symbol n, so that the token of digit d is d + 1; 0 is padding."""
PAD, ZERO, MIN, MAX, MED, SM, CLOSE = 0, 1, 11, 12, 13, 14, 15
VOCAB_SIZE = 16
SIZES = {"train": 96_000, "dev": 2_000, "test": 2_000}
"""Expressions of Long Range Arena's splits (count)."""

P_OPERATOR = 0.25
ROOTS = 1024
"""Trees that are begun in a chunk; of Long Range Arena's lengths about a third are kept."""
PATIENCE = 100
"""Chunks without a new expression after which there are taken to be no more."""


class Expressions(NamedTuple):
    """Expressions as tokens, end to end, and their values."""

    tokens: np.ndarray
    """uint8 (total,)."""
    offsets: np.ndarray
    """int64 (count + 1,): expression i is tokens[offsets[i] : offsets[i + 1]]."""
    labels: np.ndarray
    """uint8 (count,): 0 to 9."""

    def expression(self, i: int) -> np.ndarray:
        """Tokens of expression i, uint8 (length,)."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def between(self, start: int, stop: int) -> "Expressions":
        """Expressions start to stop - 1."""
        offsets = self.offsets[start : stop + 1]
        return Expressions(self.tokens[offsets[0] : offsets[-1]], offsets - offsets[0], self.labels[start:stop])


class Limits(NamedTuple):
    """What bounds a tree; the defaults are Long Range Arena's."""

    max_depth: int = 10
    """Levels, of which the deepest has digits alone (count)."""
    max_args: int = 10
    """Arguments of an operator; the fewest are 2 (count)."""
    min_length: int = 500
    """Expressions are longer than this (tokens: digits, operators and closing brackets)."""
    max_length: int = 2000
    """They are shorter than this (tokens)."""


LRA = Limits()


class Level(NamedTuple):
    """The nodes of all trees at one depth, in order, so that the arguments of an operator are side by side."""

    tree: np.ndarray
    """Number of the tree, ascending."""
    arity: np.ndarray
    """Arguments; 0 of a digit."""


def splits(
    seed: int, sizes: Mapping[str, int] = SIZES, limits: Limits = LRA, processes: int = 1
) -> dict[str, Expressions]:
    """Expressions of `generate` cut into named parts of these sizes, so that none is in two of them."""
    found, start = generate(sum(sizes.values()), seed, limits, processes), 0
    parts = {}
    for name, size in sizes.items():
        parts[name] = found.between(start, start := start + size)
    return parts


def generate(count: int, seed: int, limits: Limits = LRA, processes: int = 1) -> Expressions:
    """Expressions, all distinct. Fewer are the beginning of more; the number of processes changes nothing.

    Args:
        count: of expressions.
        seed: of everything that is random, 0 or more.
        limits: on each tree.
        processes: to work in; more than one are new ones, each of which imports this package.

    Raises:
        ValueError: an argument is out of range; the limits let fewer than `count` expressions through.
    """
    if count < 1:
        raise ValueError(f"count must be 1 or more: got {count}")
    if min(limits.max_depth, limits.max_args) < 2 or limits.min_length < 1:
        raise ValueError(f"max_depth and max_args must be 2 or more, and min_length 1 or more: got {limits}")
    seen, parts, missing, idle = set[bytes](), list[Expressions](), count, 0
    with progress("ListOps", count) as advance, closing(in_order(partial(_chunk, seed, limits), processes)) as chunks:
        while missing:
            part = _unseen(next(chunks), seen, missing)
            parts.append(part)
            advance(len(part.labels))
            missing -= len(part.labels)
            idle = 0 if len(part.labels) else idle + 1
            if missing and idle == PATIENCE:
                raise ValueError(f"asked for {count} distinct expressions; found {count - missing} within {limits}")
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    tokens, labels = (np.concatenate([part[field] for part in parts]) for field in (0, 2))
    return Expressions(tokens, _offsets(lengths), labels)


def evaluate(tokens: Sequence[int] | np.ndarray) -> int:
    """The value of an expression, read from left to right; uses nothing of the generator.

    Raises:
        ValueError: the tokens are not one whole expression.
    """
    operators, arguments = list[int](), [list[int]()]  # of those that are open, the innermost last
    for place, token in enumerate(tokens):
        if ZERO <= token < MIN:
            arguments[-1].append(int(token) - ZERO)
        elif MIN <= token < CLOSE:
            operators.append(int(token))
            arguments.append([])
        elif token == CLOSE and operators and arguments[-1]:
            operator, values = operators.pop(), sorted(arguments.pop())
            if operator == MED:
                value = (values[(len(values) - 1) // 2] + values[len(values) // 2]) // 2
            else:
                value = {MIN: values[0], MAX: values[-1], SM: sum(values) % 10}[operator]
            arguments[-1].append(value)
        else:
            what = repr(SYMBOLS[token - 1]) if token == CLOSE else f"number {token}"
            raise ValueError(f"token {what} at place {place} is out of place")
    if operators or len(arguments[0]) != 1:
        raise ValueError(f"{len(operators)} brackets are not closed; {len(arguments[0])} values at the top, not 1")
    return arguments[0][0]


def _unseen(found: Expressions, seen: set[bytes], most: int) -> Expressions:
    """The first `most` whose digests were not seen, which now are."""
    keep = []
    for i in range(len(found.labels)):
        digest = hashlib.blake2b(found.expression(i).tobytes(), digest_size=16).digest()
        if len(keep) < most and digest not in seen:
            seen.add(digest)
            keep.append(i)
    lengths = np.diff(found.offsets)
    tokens = found.tokens[np.repeat(np.isin(np.arange(len(lengths)), keep), lengths)]
    return Expressions(tokens, _offsets(lengths[keep]), found.labels[keep])


def _chunk(seed: int, limits: Limits, number: int) -> Expressions:
    rng = generator(seed, number)
    levels = _grow(rng, limits)
    symbols = [
        np.where(level.arity > 0, rng.integers(MIN, CLOSE, len(level.arity)), rng.integers(ZERO, MIN, len(level.arity)))
        for level in levels
    ]
    return _write(levels, symbols)


def _grow(rng: np.random.Generator, limits: Limits) -> list[Level]:
    """Shapes of the trees that are kept."""
    levels, arity = list[Level](), rng.integers(2, limits.max_args + 1, ROOTS)
    tree, length = np.arange(ROOTS), np.zeros(ROOTS, np.int64)
    for depth in range(1, limits.max_depth + 1):
        if depth > 1:
            operator = (rng.random(len(tree)) < P_OPERATOR) & (depth < limits.max_depth)
            arity = np.where(operator, rng.integers(2, limits.max_args + 1, len(tree)), 0)
        length += np.bincount(tree, 1 + (arity > 0), minlength=ROOTS).astype(np.int64)
        arity[length[tree] >= limits.max_length] = 0  # given up
        levels.append(Level(tree, arity))
        tree = np.repeat(tree, arity)
    kept = (length > limits.min_length) & (length < limits.max_length)
    place = np.cumsum(kept) - 1
    return [Level(place[level.tree[kept[level.tree]]], level.arity[kept[level.tree]]) for level in levels]


def _write(levels: list[Level], symbols: list[np.ndarray]) -> Expressions:
    """Trees as tokens in reading order, with their values."""
    values, sizes = [symbols[-1] - ZERO], [np.ones(len(symbols[-1]), np.int64)]
    for level, symbol in zip(levels[-2::-1], symbols[-2::-1], strict=True):
        operator = level.arity > 0
        arity, value, size = level.arity[operator], symbol - ZERO, np.ones(len(symbol), np.int64)
        value[operator] = _apply(symbol[operator], values[0], arity)
        size[operator] = 2 + np.add.reduceat(sizes[0], _offsets(arity)[:-1])
        values.insert(0, value)
        sizes.insert(0, size)
    offsets = _offsets(sizes[0])
    tokens, starts = np.zeros(offsets[-1], np.uint8), offsets[:-1]
    for i, (level, symbol, size) in enumerate(zip(levels, symbols, sizes, strict=True)):
        tokens[starts] = symbol
        operator = level.arity > 0
        tokens[(starts + size - 1)[operator]] = CLOSE
        if i + 1 < len(levels):
            arity, before = level.arity[operator], _offsets(sizes[i + 1])[:-1]
            first = before[_offsets(arity)[:-1]]
            starts = np.repeat(starts[operator] + 1 - first, arity) + before
    return Expressions(tokens, offsets, values[0].astype(np.uint8))


def _apply(operators: np.ndarray, values: np.ndarray, arity: np.ndarray) -> np.ndarray:
    """Each operator on its own stretch of the values, `arity` of them."""
    first = _offsets(arity)[:-1]
    ascending = values[np.lexsort((values, np.repeat(np.arange(len(arity)), arity)))]
    median = (ascending[first + (arity - 1) // 2] + ascending[first + arity // 2]) // 2
    sums = np.add.reduceat(values, first) % 10
    lowest, highest = ascending[first], ascending[first + arity - 1]
    return np.select([operators == MIN, operators == MAX, operators == MED], [lowest, highest, median], sums)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """Where each stretch begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)])
