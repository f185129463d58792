"""Sentence order prediction: blocks of two consecutive stretches of a document, swapped or not.

The official generator labels a chunk of a single segment swapped, always; its labels are not balanced. Here a block is
swapped with probability 1/2, whatever is in it, and one that cannot be divided has no label.
"""

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from nystrom.data.masking import IGNORED, generator_of
from nystrom.data.packing import Encode
from nystrom.data.sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL = 3
"""Tokens beside the text: [CLS] A [SEP] B [SEP]."""
BOUNDARY = re.compile(r"""(?<=[.!?])\s|(?<=[.!?]["')\]’”])\s|\n""")


def sentences(text: str) -> list[str]:
    """The text cut after sentences and at line ends. Each begins with one space, the first as well, and ends without
    one: else what a block begins with would tell whether it has been swapped.
    """
    return [" " + sentence for part in BOUNDARY.split(text) if (sentence := part.strip())]


def stretches(shards: list[list[Source]], encode: Encode, length: int) -> Iterator[dict[str, np.ndarray]]:
    """Whole sentences of one document, as many as fit into `length` tokens beside the special ones.

    A sentence that does not fit is cut into stretches of its own.

    Yields:
        input_ids, word_starts and sentence_starts, each (tokens,).
    """
    room = length - SPECIAL
    for sources in shards:
        for document in (document for source in sources for document in source.documents()):
            held: list[np.ndarray] = []
            for sentence in (encode(sentence) for piece in document for sentence in sentences(piece)):
                if held and sum(part.shape[1] for part in held) + sentence.shape[1] > room:
                    yield _stretch(held)
                    held = []
                if sentence.shape[1] > room:
                    yield from (
                        _stretch([part]) for part in np.split(sentence, range(room, sentence.shape[1], room), 1)
                    )
                elif sentence.shape[1]:
                    held.append(sentence)
            if held:
                yield _stretch(held)


def _stretch(parts: list[np.ndarray]) -> dict[str, np.ndarray]:
    ids, word_starts = np.concatenate(parts, 1)
    starts = np.zeros_like(ids)
    starts[np.cumsum([0] + [part.shape[1] for part in parts[:-1]])] = 1
    return {"input_ids": ids, "word_starts": word_starts, "sentence_starts": starts}


def make_order(tokenizer: "PreTrainedTokenizerBase", seed: int) -> Callable[[dict[str, Any], int], dict[str, Any]]:
    """Stretch, its place in the stream -> block [CLS] A [SEP] B [SEP] with sentence_order_label: 0 in order, 1 swapped,
    -100 where there is one sentence only, in a block [CLS] A [SEP]. Where the tokenizer makes token_type_ids of pairs,
    as BERT's does, so does this: 0 up to the first [SEP].

    Where A ends, and whether the two are swapped, is drawn anew at each place, from the seed and the block alone.
    """
    before = np.asarray([cast(int, tokenizer.cls_token_id)])
    after = np.asarray([cast(int, tokenizer.sep_token_id)])
    one, with_types = np.ones(1, np.int64), "token_type_ids" in tokenizer.model_input_names

    def order(block: dict[str, Any], place: int) -> dict[str, Any]:
        ids, words = np.asarray(block["input_ids"]), np.asarray(block["word_starts"])
        generator = generator_of(seed, ids, place)
        bounds = np.flatnonzero(block["sentence_starts"])[1:]
        if len(bounds) == 0:
            pairs, label = [(ids, words)], IGNORED
        else:
            cut, label = bounds[generator.integers(len(bounds))], int(generator.integers(2))
            pairs = list(zip(np.split(ids, [cut]), np.split(words, [cut]), strict=True))[:: -1 if label else 1]
        made = {
            "input_ids": np.concatenate([before, *(part for a, _ in pairs for part in (a, after))]),
            "word_starts": np.concatenate([one, *(part for _, w in pairs for part in (w, one))]),
            "sentence_order_label": label,
        }
        if with_types:
            lengths = [len(a) + (2 if i == 0 else 1) for i, (a, _) in enumerate(pairs)]
            made["token_type_ids"] = np.repeat(np.arange(len(pairs)), lengths)
        return made

    return order
