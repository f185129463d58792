"""Which of two papers cites the other? Long Range Arena's retrieval task, and a smaller one that we build.

Long Range Arena's own files are new_aan_pairs.{train,eval,test}.tsv: label, two ids and two texts, without a header,
tabs between, no quoting. They cannot be had everywhere; `build` makes a task of the same kind, called "aan-subset" and
not to be compared with published numbers, of papers in XML and a list of citations.

What differs: ours is divided by citing paper, so that none is in two parts (theirs is divided by pair); and a paper is
as often the second one of a negative pair as of a positive one, so that how often it is cited tells nothing.
"""

import random
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import numpy as np

from nystrom.data import archives
from nystrom.data.lra.sequences import Sequences
from nystrom.data.lra.text import tokens

FILES = {"train": "new_aan_pairs.train.tsv", "dev": "new_aan_pairs.eval.tsv", "test": "new_aan_pairs.test.tsv"}
CITATIONS = "acl.txt"
PARTS = {"train": 0.8, "dev": 0.1, "test": 0.1}
"""Of the citing papers."""
LEAST = 1000
"""Characters of a paper's text; shorter ones are left out."""
_CUT = "the file ends within the line, as one that was cut short does"
PAPER = re.compile(r"(?:.*/)?([A-Z]\d\d-\d{4})\.xml")


def read(data: Path, split: str, length: int) -> Sequences:
    """A split of Long Range Arena's files.

    Args:
        data: the folder that holds them.
        split: train, dev or test.
        length: bytes of a text that are read.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: a row has other than five columns, another label than 0 or 1, or an empty text, or does not end; the
            message names file and line.
    """
    path = data / FILES[split]
    first, second, labels = [], [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                raise ValueError(f"{path}, line {number}: {_CUT}; get it again, or end the line if it is whole")
            columns = line.rstrip(b"\r\n").split(b"\t")
            if len(columns) != 5:
                raise ValueError(f"{path}, line {number}: got {len(columns)} columns, not label, two ids and two texts")
            if columns[0] not in (b"0", b"1", b"0.0", b"1.0"):
                raise ValueError(f"{path}, line {number}: label {columns[0][:20].decode('latin-1')!r} is not 0 or 1")
            if not columns[3].strip() or not columns[4].strip():
                raise ValueError(f"{path}, line {number}: an empty text; delete the row")
            labels.append(columns[0][:1] == b"1")
            first.append(tokens(columns[3], length))
            second.append(tokens(columns[4], length))
    if not labels:
        raise ValueError(f"{path}: no pairs in this file")
    return Sequences(np.array(labels, np.uint8), first, second)


def build(data: Path, split: str, length: int, seed: int = 0) -> Sequences:
    """A split of our own task.

    Args:
        data: folder with a tar archive (or files) of papers in XML, named by their id, as ScisummNet's, and acl.txt,
            the citation network: "citing , cited" on each line.
        split: train, dev or test: four fifths, a tenth and a tenth of the citing papers.
        length: bytes of a text that are read.
        seed: of the division and of the negative pairs.

    Raises:
        FileNotFoundError: papers or citations are missing.
        ValueError: a line of acl.txt is not two ids, not UTF-8, or does not end; a paper does not end in </PAPER>; an
            archive is damaged; too few citations between the papers.
    """
    texts = dict(_papers(data))
    if not texts:
        raise FileNotFoundError(f"{data}: no papers in it: neither ID.xml, nor a tar archive of such files")
    cited = _citations(data / CITATIONS, texts)
    citing = sorted({one for one, _ in cited})
    random.Random(seed).shuffle(citing)
    begin, mine = 0.0, set[str]()
    for name, part in PARTS.items():
        if name == split:
            mine = set(citing[round(begin * len(citing)) : round((begin + part) * len(citing))])
        begin += part
    positive = [pair for pair in cited if pair[0] in mine]
    if len(positive) < 2:
        raise ValueError(f"{data}: {len(positive)} citations between its papers are too few to {split} on")
    pairs = positive + _negatives(positive, cited, random.Random(f"{seed} {split}"))
    content = {name: tokens(texts[name], length) for pair in pairs for name in pair}
    labels = np.repeat(np.array([1, 0], np.uint8), [len(positive), len(pairs) - len(positive)])
    return Sequences(labels, [content[one] for one, _ in pairs], [content[two] for _, two in pairs])


def _papers(data: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(data.rglob("*.xml")):
        if match := PAPER.fullmatch(path.name):
            yield from _paper(match[1], path.read_bytes(), str(path))
    for path in sorted(data.glob("*.tar*")):
        for file, content in archives.read(path, lambda name: PAPER.fullmatch(name) is not None):
            yield from _paper(file.rpartition("/")[2].removesuffix(".xml"), content, f"{path}: {file}")


def _paper(name: str, content: bytes, where: str) -> Iterator[tuple[str, str]]:
    """Its sentences, a line each."""
    try:
        xml = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error.reason}); get it again") from None
    if not xml.rstrip().endswith("</PAPER>"):
        raise ValueError(f"{where}: ends in {xml[-20:]!r}, not in </PAPER>: cut short; get it again")
    text = "\n".join(unescape(unescape(part)) for part in re.findall(r"<S\b[^>]*>([^<]*)</S>", xml))
    if len(text) >= LEAST:
        yield name, text


def _citations(path: Path, known: dict[str, str]) -> list[tuple[str, str]]:
    """Those between the papers, each once, sorted."""
    found = set()
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                raise ValueError(f"{path}, line {number}: {_CUT}; get it again, or end the line if it is whole")
            try:
                ids = [part.strip() for part in line.decode().split(",")]
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 text ({error.reason}); get it again") from None
            if len(ids) != 2 or not all(ids):
                raise ValueError(f"{path}, line {number}: got {line.decode().rstrip()!r:.60}, not 'citing , cited'")
            one, two = ids
            if one in known and two in known and one != two:
                found.add((one, two))
    return sorted(found)


def _negatives(
    positive: list[tuple[str, str]], cited: list[tuple[str, str]], generator: random.Random
) -> list[tuple[str, str]]:
    """As many pairs of the same first and the same second papers, none of which cites the other."""
    taken = set(cited) | {(two, one) for one, two in cited}
    second = [two for _, two in positive]
    generator.shuffle(second)
    pairs = [(one, two) for (one, _), two in zip(positive, second, strict=True)]
    for _ in range(100):  # exchange the second papers of bad pairs with those of others
        bad = _bad(pairs, taken)
        for i in bad:
            j = generator.randrange(len(pairs))
            (one, two), (three, four) = pairs[i], pairs[j]
            pairs[i], pairs[j] = (one, four), (three, two)
        if not bad:
            break
    left_out = set(_bad(pairs, taken))
    return [pair for i, pair in enumerate(pairs) if i not in left_out]


def _bad(pairs: list[tuple[str, str]], taken: set[tuple[str, str]]) -> list[int]:
    """Places of pairs that are no negative ones, or there already."""
    seen = set[tuple[str, str]]()
    found = []
    for i, pair in enumerate(pairs):
        if pair[0] == pair[1] or pair in taken or pair in seen:
            found.append(i)
        seen.add(pair)
    return found
