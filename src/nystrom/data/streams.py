"""What pretraining reads: an endless stream of masked blocks, a fixed held-out set, and batches of either."""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from nystrom.data.masking import IGNORED, Block, make_mask
from nystrom.data.packing import Packing, blocks, make_encode
from nystrom.data.sentence_order import make_order, stretches
from nystrom.data.sources import Source
from nystrom.data.text import Span, from_random_place

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("input_ids", "labels", "token_type_ids", "sentence_order_label")


@dataclass(frozen=True, kw_only=True)
class BlockMaker:
    """How documents become blocks, and what is to be predicted in them."""

    tokenizer: "PreTrainedTokenizerBase"
    length: int
    """Tokens of a block (count)."""
    packing: Packing
    """Of blocks without sentence order."""
    sentence_order: bool
    """Blocks are [CLS] A [SEP] B [SEP]."""
    mask_probability: float
    """Part of the tokens to predict."""
    whole_words: bool
    """Predict whole words."""
    seed: int
    """Of the masks, and of the order of sentences."""

    def make(self, shards: list[list[Source]]) -> Iterator[Block]:
        """Blocks before anything is drawn."""
        encode = make_encode(self.tokenizer, self.whole_words)
        if self.sentence_order:
            return stretches(shards, encode, self.length)
        return blocks(shards, encode, cast(int, self.tokenizer.sep_token_id), self.length, self.packing)

    def finisher(self) -> Callable[[Block, int], Block]:
        """Block, its place in the stream -> what the model gets: swapped or not, and masked."""
        order = make_order(self.tokenizer, self.seed)
        mask = make_mask(self.tokenizer, self.mask_probability, self.seed)

        def finish(block: Block, place: int) -> Block:
            block = mask(order(block, place) if self.sentence_order else block, place)
            return {name: block[name] for name in COLUMNS if name in block}

        return finish


def train_stream(maker: BlockMaker, sources: Sequence[Source]) -> "IterableDataset":
    """Finished blocks without end, in shuffled order; shards are what workers and ranks divide.

    One endless pass rather than epochs: then a resumed run finds its place by counting blocks from the start.

    Raises:
        ValueError: there is no text in the sources.
    """
    from datasets import IterableDataset

    files = random.Random(maker.seed).sample(sources, len(sources))
    num_shards = min(64, len(files))
    shards = [files[i::num_shards] for i in range(num_shards)]
    if next(maker.make(shards), None) is None:  # or the endless pass would look for a block for ever
        raise ValueError(f"no text to train on in {files[0].path}" + (" and others" if len(files) > 1 else ""))
    dataset = IterableDataset.from_generator(maker.make, gen_kwargs={"shards": shards}).repeat(None)
    shuffled = dataset.shuffle(seed=maker.seed, buffer_size=256)
    return shuffled.map(maker.finisher(), with_indices=True, remove_columns=["word_starts"])


def held_out_blocks(maker: BlockMaker, sources: Sequence[Source], count: int) -> tuple[list[Block], int]:
    """Finished blocks, as evenly from each source as they allow, of files from a random place on; and the sources'
    count. There are fewer blocks than asked for where all of the text has no more.

    Raises:
        ValueError: so little text that no token is masked.
    """
    generator, finish = random.Random(maker.seed), maker.finisher()
    files = generator.sample(sources, min(len(sources), count))
    per_file = -(-count // len(files))
    pending = deque((source, _from_random_place(maker, source, per_file, generator)) for source in files)
    chosen = [(block, source) for source, found in pending for block in islice(found, per_file)]
    if len(chosen) < count:  # some are short: the others give more
        others = [source for source in sources if source not in files]
        pending += [(source, _from_random_place(maker, source, per_file, generator)) for source in others]
    while len(chosen) < count and pending:
        source, found = pending.popleft()
        if (block := next(found, None)) is not None:
            chosen.append((block, source))
            pending.append((source, found))
    finished = [finish(block, place) for place, (block, _) in enumerate(chosen[:count])]
    if not any((block["labels"] != IGNORED).any() for block in finished):
        raise ValueError(
            f"held-out text of {len(finished)} blocks is too short to mask a token; pass more with --eval-data, or "
            "--dataset-eval-split"
        )
    return finished, len({source for _, source in chosen[:count]})


def _from_random_place(maker: BlockMaker, source: Source, blocks: int, generator: random.Random) -> Iterator[Block]:
    """A file's blocks from a random place on, then those before it; other sources' from the first on."""
    if not isinstance(source, Span):
        return maker.make([[source]])
    end = from_random_place(source, blocks * maker.length, generator)
    parts = (end, source._replace(stop=end.start))
    return chain.from_iterable(maker.make([[part]]) for part in parts if part.size)


def commonest_token(train_set: "IterableDataset", held_out: list[Block]) -> dict[str, Any]:
    """What always answering the commonest token of the training text (its first 256 blocks) would score."""
    answers = np.concatenate([block["labels"] for block in train_set.take(256)])
    commonest = int(np.bincount(answers[answers != IGNORED]).argmax())
    labels = np.concatenate([block["labels"] for block in held_out])
    return {"token": commonest, "accuracy": float((labels[labels != IGNORED] == commonest).mean())}


def make_collate(pad: int) -> Callable[[list[Block]], dict[str, torch.Tensor]]:
    """Finished blocks -> the model's arguments, padded on the right; attention_mask only where there is padding."""
    padding = {"input_ids": pad, "labels": IGNORED, "token_type_ids": 0}

    def collate(examples: list[Block]) -> dict[str, torch.Tensor]:
        batch = {
            name: pad_sequence([torch.as_tensor(e[name]) for e in examples], True, value)
            for name, value in padding.items()
            if name in examples[0]
        }
        if "sentence_order_label" in examples[0]:
            batch["sentence_order_label"] = torch.as_tensor([e["sentence_order_label"] for e in examples])
        lengths = torch.tensor([len(e["input_ids"]) for e in examples])
        if lengths.min() < lengths.max():
            batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return batch

    return collate
