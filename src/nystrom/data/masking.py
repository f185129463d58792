"""Masked language modelling: which tokens of a block are to be predicted, and what stands in their place."""

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is not to be predicted."""

Block = dict[str, Any]


def make_mask(tokenizer: "PreTrainedTokenizerBase", probability: float, seed: int) -> Callable[[Block, int], Block]:
    """Block, its place in the stream -> block with labels.

    Each word, as the block's word_starts tell them apart, is chosen with this probability; of the chosen tokens 80 %
    are masked, 10 % replaced at random, 10 % left. Special tokens are never chosen, nor do they replace another:
    transformers' collator does draw them.

    The draw depends on the seed, the block and its place, on nothing before it: so every pass has new masks, and a
    resumed run those of an uninterrupted one.
    """
    special = np.zeros(len(tokenizer), bool)
    special[[id for id in tokenizer.all_special_ids if id < len(tokenizer)]] = True
    ordinary = np.flatnonzero(~special)
    mask_id = cast(int, tokenizer.mask_token_id)

    def mask(block: Block, place: int) -> Block:
        ids = np.asarray(block["input_ids"])
        generator = generator_of(seed, ids, place)
        word = np.cumsum(block["word_starts"])  # 0: the rest of a word that the block cuts
        chosen = (generator.random(len(ids) + 1) < probability)[word] & ~special[ids]
        what = generator.random(len(ids))
        others = ordinary[generator.integers(len(ordinary), size=len(ids))]
        changed = np.where(what < 0.8, mask_id, np.where(what < 0.9, others, ids))
        return block | {"input_ids": np.where(chosen, changed, ids), "labels": np.where(chosen, ids, IGNORED)}

    return mask


def generator_of(seed: int, ids: np.ndarray, place: int) -> np.random.Generator:
    """Random numbers for the block of these ids at this place in the stream."""
    return np.random.default_rng([seed, place, zlib.crc32(np.ascontiguousarray(ids, np.int64).tobytes())])
