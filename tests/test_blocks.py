"""Blocks of pretraining: words, masks, the order of sentences, and batches."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertTokenizerFast, PerceiverTokenizer, PreTrainedTokenizerFast

from nystrom.data.masking import make_mask
from nystrom.data.packing import make_encode
from nystrom.data.sentence_order import make_order, sentences, stretches
from nystrom.data.streams import BlockMaker, commonest_token, held_out_blocks, make_collate, train_stream
from nystrom.data.text import check_text

BYTES = PerceiverTokenizer()
TEXT = "Unbelievable!  The foxes were jumping, jumping.\nOver it."


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of the kind, that cuts most of TEXT's words into several tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=45, special_tokens=special)
    elif kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=special, initial_alphabet=alphabet)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=45, special_tokens=special, unk_token="[UNK]")
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def block_of(ids: torch.Tensor | np.ndarray) -> dict[str, np.ndarray]:
    return {"input_ids": np.asarray(ids), "word_starts": np.ones(len(ids), np.int64)}


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_words_are_those_of_the_tokenizer(kind):
    tokenizer = trained(kind)
    ids, starts = make_encode(tokenizer, whole_words=True)(TEXT)
    groups = np.split(ids, np.flatnonzero(starts)[1:])
    words = ["".join(tokenizer.convert_ids_to_tokens(group)) for group in groups]
    words = [word.replace("##", "").strip("▁ĠĊ") for word in words]
    assert {"Unbelievable", "foxes", "jumping"} <= {word.strip("!,.") for word in words}, words
    assert len(ids) > len(groups) + 5
    if kind == "wordpiece":
        assert all(
            token.startswith("##") != start
            for token, start in zip(tokenizer.convert_ids_to_tokens(ids), starts, strict=True)
        )
    assert make_encode(tokenizer)(TEXT)[1].all()


def test_words_of_bytes_stand_between_white_space():
    ids, starts = make_encode(BYTES, whole_words=True)("né à\n b")
    assert bytes((ids - 6).astype(np.uint8)) == "né à\n b".encode()
    assert starts.tolist() == [1, 0, 0, 1, 1, 0, 1, 1, 1]


def test_a_tokenizer_that_knows_no_words_is_refused():
    from transformers import CanineTokenizer

    with pytest.raises(ValueError, match="whole words need a fast tokenizer, which knows them: got CanineTokenizer"):
        make_encode(CanineTokenizer(), whole_words=True)


def test_masking_rates():
    """15 % chosen; of them 80 % masked, 10 % random, 10 % left: counted, within five standard errors."""
    mask = make_mask(BYTES, 0.15, seed=0)
    original = torch.randint(6, 262, (2000,))
    original[::10] = BYTES.sep_token_id
    finished = [mask(block_of(original), place) for place in range(100)]
    ids, labels = (torch.from_numpy(np.stack([block[name] for block in finished])) for name in ("input_ids", "labels"))
    original = original.expand(100, -1)
    chosen = labels != -100
    assert (labels == original)[chosen].all()
    assert not chosen[:, ::10].any()
    assert (ids == original)[~chosen].all()
    assert ((ids >= 6) | (ids == BYTES.mask_token_id))[chosen].all()  # no other special token comes in

    def close(part: torch.Tensor, of: torch.Tensor, rate: float) -> bool:
        count = int(of.sum())
        return abs(int((part & of).sum()) / count - rate) < 5 * (rate * (1 - rate) / count) ** 0.5

    eligible = torch.ones_like(chosen)
    eligible[:, ::10] = False
    assert close(chosen, eligible, 0.15)
    assert close(ids == BYTES.mask_token_id, chosen, 0.8)
    assert close(ids == original, chosen, 0.1 + 0.1 / 256)


def test_whole_words_are_masked_whole():
    """Every word is chosen or not as one; 15 % of the tokens, within five standard errors over the words."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 6, 400)
    starts = np.zeros(lengths.sum(), np.int64)
    starts[np.cumsum(lengths) - lengths] = 1
    block = {"input_ids": generator.integers(6, 262, len(starts)), "word_starts": starts}
    mask = make_mask(BYTES, 0.15, seed=0)
    chosen = np.stack([mask(block, place)["labels"] != -100 for place in range(100)])
    per_word = np.add.reduceat(chosen, np.flatnonzero(starts), axis=1)
    assert ((per_word == 0) | (per_word == lengths)).all()
    error = (0.15 * 0.85 * (lengths**2).sum() / 100) ** 0.5 / lengths.sum()
    assert abs(chosen.mean() - 0.15) < 5 * error


def test_the_rest_of_a_cut_word_is_a_word():
    block = {"input_ids": np.arange(6, 12), "word_starts": np.asarray([0, 0, 1, 0, 1, 0])}
    mask = make_mask(BYTES, 0.5, seed=0)
    found = {tuple(mask(block, place)["labels"] != -100) for place in range(200)}
    assert found == {tuple(np.repeat(choice, 2)) for choice in np.ndindex(2, 2, 2)}


def test_masks_depend_on_place_and_seed_alone():
    block = block_of(torch.randint(6, 262, (500,)))

    def draw(place: int, seed: int = 0) -> list[int]:
        return make_mask(BYTES, 0.15, seed)(block, place)["labels"].tolist()

    state = torch.get_rng_state()
    assert draw(3) == draw(3)
    assert draw(3) != draw(4) and draw(3) != draw(3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


@given(st.text(alphabet="ab.!? \n\"'é", max_size=60))
@settings(max_examples=200, deadline=None)
def test_sentences_are_the_text(text):
    found = sentences(text)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(sentence[0] == " " and sentence[1:] == sentence.strip() for sentence in found)


def test_sentences_end_where_a_reader_would_say():
    text = 'He said "No." Then he left.\nA list:\n\n1.5 metres? Yes!'
    assert sentences(text) == [' He said "No."', " Then he left.", " A list:", " 1.5 metres?", " Yes!"]


DOCUMENTS = ["One here. Two now! Three?\nFour.", "No end", "x" * 100 + ". Short. Shorter."]


def ordered(tmp_path, length: int, places: range) -> list[list[dict]]:
    """The blocks of DOCUMENTS, at several places of the stream."""
    for i, document in enumerate(DOCUMENTS):
        (tmp_path / f"{i}.txt").write_text(document)
    spans = [check_text(tmp_path / f"{i}.txt") for i in range(len(DOCUMENTS))]
    found = list(stretches([spans[:2], spans[2:]], make_encode(BYTES), length))
    order = make_order(BYTES, seed=0)
    return [[order(block, place) for block in found] for place in places]


def text_of(ids: np.ndarray) -> str:
    return bytes((ids - 6).astype(np.uint8)).decode()


def test_pairs_hold_every_document_once_in_order(tmp_path):
    """Put back in order, the blocks' texts are the documents; no block holds two of them, and none is too long."""
    for blocks in ordered(tmp_path, 40, range(30)):
        told = []
        for block in blocks:
            ids = block["input_ids"]
            assert len(ids) <= 40 and len(ids) == len(block["word_starts"]) and "token_type_ids" not in block
            assert ids[0] == BYTES.cls_token_id and ids[-1] == BYTES.sep_token_id
            stops = np.flatnonzero(ids == BYTES.sep_token_id)
            first, second = ids[1 : stops[0]], ids[stops[0] + 1 : -1]
            if block["sentence_order_label"] == -100:
                assert len(stops) == 1
            else:
                assert len(stops) == 2  # and neither side's beginning tells the order
                assert [text_of(part[:2]).index(" ") for part in (first, second)] == [0, 0]
                assert " " not in (text_of(first)[1], text_of(first)[-1], text_of(second)[1], text_of(second)[-1])
            told.append(
                text_of(np.concatenate([second, first] if block["sentence_order_label"] == 1 else [first, second]))
            )
        assert "".join(told) == "".join(sentence for document in DOCUMENTS for sentence in sentences(document))
        assert " No end" in told


def test_half_of_the_pairs_are_swapped(tmp_path):
    """Within five standard errors; and where they are cut is drawn anew."""
    drawn = [blocks[0] for blocks in ordered(tmp_path, 60, range(1000))]
    labels = Counter(block["sentence_order_label"] for block in drawn)
    assert set(labels) == {0, 1} and abs(labels[1] - 500) < 5 * 250**0.5
    assert len({block["input_ids"].tolist().index(BYTES.sep_token_id) for block in drawn}) > 3


def test_types_of_tokens_are_those_of_the_tokenizers_pairs(tmp_path):
    letters = [chr(i) for i in range(33, 127)]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    (tmp_path / "a.txt").write_text("a! b?")
    (block,) = stretches([[check_text(tmp_path / "a.txt")]], make_encode(tokenizer), 16)
    for place in range(10):
        made = make_order(tokenizer, seed=0)(block, place)
        pair = ("b?", "a!") if made["sentence_order_label"] == 1 else ("a!", "b?")
        assert made["input_ids"].tolist() == tokenizer(*pair)["input_ids"]
        assert made["token_type_ids"].tolist() == tokenizer(*pair)["token_type_ids"]


def test_a_sentence_alone_has_no_order(tmp_path):
    labels = [block["sentence_order_label"] for blocks in ordered(tmp_path, 40, range(20)) for block in blocks]
    assert -100 in labels
    alone = [blocks[1] for blocks in ordered(tmp_path, 40, range(20))]
    assert {text_of(block["input_ids"][1:-1]) for block in alone} == {" No end"}
    assert {block["sentence_order_label"] for block in alone} == {-100}


def maker(**changes) -> BlockMaker:
    settings = dict(packing="stream", sentence_order=False, mask_probability=0.15, whole_words=False, seed=0)
    return BlockMaker(tokenizer=BYTES, **{"length": 64, **settings, **changes})


def test_evaluation_spreads_over_the_held_out_files(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"{i} " * (50 if i else 5000))
    spans = [check_text(path) for path in sorted(tmp_path.iterdir())]
    finished, files = held_out_blocks(maker(), spans, 10)
    assert files == 5 and len(finished) == 10
    again, _ = held_out_blocks(maker(), spans, 10)
    assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(finished, again, strict=True))


def test_longer_files_make_up_for_short_ones(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("".join(chr(97 + i) for _ in range(64 * (20 if i == 3 else 2))))
    spans = [check_text(path) for path in sorted(tmp_path.iterdir())]
    for count, num_files in ((3, 3), (10, 5), (20, 5), (28, 5)):
        finished, files = held_out_blocks(maker(), spans, count)
        assert len(finished) == count and files >= num_files
        texts = [tuple(np.where(b["labels"] == -100, b["input_ids"], b["labels"]).tolist()) for b in finished]
        assert max(texts.count(text) for text in texts if text[0] != ord("d") + 6) <= 2  # no block is taken twice
    assert len(held_out_blocks(maker(), spans, 60)[0]) < 60  # there are no more


def test_the_commonest_token_is_found(tmp_path):
    (tmp_path / "a.txt").write_text("aaab" * 500)
    span = check_text(tmp_path / "a.txt")
    held_out, _ = held_out_blocks(maker(), [span], 20)
    found = commonest_token(train_stream(maker(), [span]), held_out)
    labels = np.concatenate([block["labels"] for block in held_out])
    assert found["token"] == ord("a") + 6
    assert found["accuracy"] == pytest.approx((labels[labels != -100] == ord("a") + 6).mean())


def test_a_stream_without_text_is_refused_not_waited_for(tmp_path):
    from nystrom.data.rows import Rows

    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 3)
    with pytest.raises(ValueError, match=r"no text to train on in .*a\.jsonl"):
        train_stream(maker(), [Rows(str(tmp_path / "a.jsonl"), "text", 0, 0, 1)])


def test_padding_is_masked_out_of_the_batch():
    blocks = [
        {"input_ids": np.arange(6, 6 + n), "labels": np.arange(6, 6 + n), "token_type_ids": np.ones(n, np.int64)}
        for n in (50, 20)
    ]
    for label, block in enumerate(blocks):
        block["sentence_order_label"] = label
    batch = make_collate(pad=3)(blocks)
    assert batch["attention_mask"].sum(1).tolist() == [50, 20]
    assert (batch["labels"][1, 20:] == -100).all() and (batch["input_ids"][1, 20:] == 3).all()
    assert batch["sentence_order_label"].tolist() == [0, 1]
    assert batch["token_type_ids"].sum(1).tolist() == [50, 20]
    assert "attention_mask" not in make_collate(pad=3)(blocks[:1])
