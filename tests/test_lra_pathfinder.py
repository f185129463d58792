"""Pathfinder: ours against images of the original generator, the truth of its labels, files whose damage is named."""

import dataclasses
import io
import os
import re
import shutil
import tarfile
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from nystrom.data.lra.chunks import generator
from nystrom.data.lra.images import Pictures
from nystrom.data.lra.pathfinder import CHUNK, SETTINGS, Scenes, generate, render, scenes
from nystrom.data.lra.pathfinder_files import LEVEL, read
from nystrom.data.lra.pathfinder_paddles import DEGREES, Settings, paddles
from nystrom.data.lra.pathfinder_paths import long_paths, short_paths

SHARED = Path(os.environ.get("NYSTROM_DATA", Path(__file__).parents[2] / "shared" / "data")) / "pathfinder32"
needs_originals = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs Pathfinder images; NYSTROM_DATA names the folder with pathfinder32/ in it"
)
Segment = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def ours() -> Pictures:
    return generate(640, seed=3, side=32)


@pytest.fixture(scope="module")
def originals() -> Pictures:
    (archive,) = SHARED.glob("*.tar.xz")
    found = read(archive, 32)
    assert found.empty == 0
    return found.pictures


def features(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers of each image whose distribution tells how it was made."""
    images = pixels.reshape(-1, 32, 32)
    blurred = ndimage.uniform_filter(images.astype(float), (0, 3, 3))
    return {
        "grey": images.mean((1, 2)),
        "lit": (images >= 60).mean((1, 2)),
        "bright": (images > 200).mean((1, 2)),
        "components": np.array([ndimage.label(image >= 60, np.ones((3, 3)))[1] for image in images]),
        "between discs": np.array([between_discs(image) for image in blurred]),
        "brightest": blurred.max((1, 2)),
        "height": (images >= 60).any(2).sum(1),
        "width": (images >= 60).any(1).sum(1),
    }


def between_discs(blurred: np.ndarray) -> float:
    """Distance of the brightest place to the brightest that is not near it (pixels)."""
    first = np.unravel_index(blurred.argmax(), blurred.shape)
    rest = blurred.copy()
    rest[max(first[0] - 2, 0) : first[0] + 3, max(first[1] - 2, 0) : first[1] + 3] = 0
    second = np.unravel_index(rest.argmax(), rest.shape)
    return float(np.hypot(first[0] - second[0], first[1] - second[1]))


def lowest_p(one: np.ndarray, two: np.ndarray) -> float:
    first, second = features(one), features(two)
    return min(float(stats.ks_2samp(first[name], second[name]).pvalue) for name in first)


def levels_apart(one: np.ndarray, two: np.ndarray) -> float:
    """Total variation distance between the distributions of the 256 grey levels."""
    shares = [np.bincount(part.ravel(), minlength=256) / part.size for part in (one, two)]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)


def pictures_apart(one: np.ndarray, two: np.ndarray) -> float:
    """Difference of the average pictures, in standard errors of a pixel: 1 is chance."""
    error = one.var(0) / len(one) + two.var(0) / len(two)
    seen = error > 0.01
    return float(np.sqrt(((one.mean(0) - two.mean(0))[seen] ** 2 / error[seen]).mean()))


@needs_originals
def test_ours_are_as_the_originals(ours, originals):
    """Each number of an image by Kolmogorov-Smirnov; grey levels and average picture are no further from those of half
    of the originals than those of the other half are, at most, of 20 random halves.
    """
    assert originals.labels.mean() == pytest.approx(0.5155) and ours.labels.mean() == 0.5
    assert lowest_p(originals.pixels, ours.pixels) > 0.01
    rng = np.random.default_rng(0)
    halves = [np.split(originals.pixels[rng.permutation(2000)], 2) for _ in range(20)]
    for apart in (levels_apart, pictures_apart):
        spread = max(apart(*half) for half in halves)
        assert np.mean([apart(one, ours.pixels) for one, _ in halves]) < spread, apart.__name__


@needs_originals
@pytest.mark.parametrize(
    "wrong",
    [{"continuity": 1.2}, {"num_distractors": 3}, {"distractor_contrast": 1.5}, {"seed_distance": 6}, {"padding": 2}],
)
def test_wrong_settings_would_be_seen(originals, wrong):
    settings = dataclasses.replace(SETTINGS[32], **wrong)
    pixels = render(scenes(256, settings, np.random.default_rng(0)), settings)
    assert lowest_p(originals.pixels, pixels) < 1e-4 or pictures_apart(originals.pixels, pixels) > 1.3


def ends(settings: Settings, margin: int, paddle: np.ndarray) -> Segment:
    """Near and far end of a paddle, (y, x)."""
    direction, place = int(paddle[0]), paddle[1:].astype(float)
    if direction < DEGREES:  # the place is the near end
        angle = np.deg2rad(direction - 180)
        return place, place + settings.paddle_length * np.array([np.sin(angle), np.cos(angle)])
    reach = paddles(settings, margin).reach[direction - DEGREES]
    return place - settings.paddle_length * reach / np.hypot(*reach), place


def drawn(found: Scenes, settings: Settings, i: int) -> list[list[Segment]]:
    """The paths of a scene, long ones first, as the ends of their paddles."""
    paths = [*found.paths[i], *(path for path in found.distractors[i] if path[0, 0] >= 0)]
    return [[ends(settings, int(found.margins[i]), paddle) for paddle in path] for path in paths]


def disc_level(image: np.ndarray, place: np.ndarray, radius: float) -> int:
    """The darkest of the pixels near a place, which are bright where a disc lies."""
    y, x = np.ogrid[: len(image), : len(image)]
    near = (y - np.rint(place[0])) ** 2 + (x - np.rint(place[1])) ** 2 <= (0.7 * radius) ** 2
    return int(image[near].min())


@pytest.mark.parametrize(("side", "count"), [(32, 128), (64, 4), (128, 8), (256, 8)])
def test_labels_are_true(side, count):
    """Two discs are found in the image at a beginning and an end; from end to end paddles follow one another."""
    settings = SETTINGS[side]
    found = scenes(count, settings, np.random.default_rng(1))
    images = render(found, settings).reshape(count, side, side)
    labels = (found.begun == found.ended).astype(int)
    assert (labels.reshape(-1, 2).sum(1) == 1).all()
    for i, image in enumerate(images):
        paths = drawn(found, settings, i)
        margin, widest = int(found.margins[i]), 90 / settings.continuity
        for path in paths:
            for (near, far), (after_near, after_far) in pairwise(path):
                assert np.hypot(*(after_near - far)) <= 2 * margin + 3
                one, two = far - near, after_far - after_near
                cosine = one @ two / np.hypot(*one) / np.hypot(*two)
                assert np.degrees(np.arccos(np.clip(cosine, -1, 1))) <= widest + 1e-6
        tips = {("begins", n): paths[n][0][0] for n in (0, 1)} | {("ends", n): paths[n][-1][1] for n in (0, 1)}
        bright = {tip: disc_level(image, place, settings.marker_radius) for tip, place in tips.items()}
        (one, first), (two, second) = sorted(sorted(bright, key=bright.__getitem__)[2:])
        assert (one, two) == ("begins", "ends")
        assert int(first == second) == labels[i]


def test_images_are_those_of_the_scenes(ours):
    found = scenes(CHUNK, SETTINGS[32], generator(3, 0))
    assert (ours.pixels[:CHUNK] == render(found, SETTINGS[32])).all()
    assert (ours.labels[:CHUNK] == (found.begun == found.ended)).all()


@pytest.mark.parametrize(("side", "count"), [(32, 64), (128, 8)])
def test_paths_keep_clear(side, count):
    """Paddles cross next to never, but for two kinds, as in the original: the newest of the two long paths do not see
    each other, nor the short paths the last paddle of the first long one.
    """
    settings = SETTINGS[side]
    found = scenes(count, settings, np.random.default_rng(2))
    others = 0
    for i in range(count):
        paths = drawn(found, settings, i)
        path, place = np.array([(p, k) for p, path in enumerate(paths) for k in range(len(path))]).T
        a, b = (np.array([paddle[end] for path in paths for paddle in path]) for end in (0, 1))
        assert min(a.min(), b.min()) > settings.padding - 2 and max(a.max(), b.max()) < side + 1 - settings.padding
        apart = turn(a[:, None], b[:, None], a) * turn(a[:, None], b[:, None], b)
        for one, two in np.argwhere(np.triu((apart < 0) & (apart.T < 0))):
            newest = path[two] == 1 and abs(place[one] - place[two]) <= 1
            last = path[one] == 0 and place[one] == settings.path_length - 1
            others += not newest and not last
    assert others <= count / 32


@pytest.mark.parametrize("side", [32, 128])
def test_boards_hold_what_is_drawn(side):
    """And nothing of short paths that were given up; the first path's last paddle is forgotten, as in the original."""
    settings, rng = SETTINGS[side], np.random.default_rng(0)
    margin = settings.margins[-1]
    boards, paths = long_paths(16, settings, margin, rng)
    before = boards.images.copy()
    short = short_paths(boards, rng)
    for (first, second), distractors, mask, mask_before in zip(paths, short, boards.images, before, strict=True):
        there = distractors[distractors[:, 0, 0] >= 0].reshape(-1, 3)
        for paddle in (*first[:-1], *second, *there):
            y, x = np.rint(np.mean(ends(settings, margin, paddle), 0)).astype(int)
            assert mask[y, x] >= 128
        assert (mask != mask_before).any() == (len(there) > 0)
        assert (there.reshape(-1, settings.distractor_length, 3)[:, 1:, 0] >= DEGREES).all()


def turn(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Positive where a, b, c turn one way, negative where the other."""
    return (b - a)[..., 0] * (c - a)[..., 1] - (b - a)[..., 1] * (c - a)[..., 0]


def test_a_paddle_is_a_line_with_a_margin():
    for settings in SETTINGS.values():
        for margin in settings.margins:
            found = paddles(settings, margin)
            y, x = np.mgrid[-found.radius : found.radius + 1, -found.radius : found.radius + 1]
            for direction in (0, 45, 90, 123, 200, DEGREES, DEGREES + len(found.reach) - 1):
                near, far = ends(settings, margin, np.array([direction, 0, 0]))
                along = np.clip(
                    ((y - near[0]) * (far - near)[0] + (x - near[1]) * (far - near)[1]) / ((far - near) ** 2).sum(),
                    0,
                    1,
                )
                away = np.hypot(y - near[0] - along * (far - near)[0], x - near[1] - along * (far - near)[1])
                line, mask = found.lines[direction], found.masks[direction]
                assert line[away > settings.paddle_thickness / 2 + 2].max() < 20
                assert mask[away > margin + settings.paddle_thickness / 2 + 2].max() < 20
                assert mask[away < margin + settings.paddle_thickness / 2 - 1.1].min(initial=255) > 150
                assert line.astype(int).sum() == pytest.approx(
                    255 * settings.paddle_length * settings.paddle_thickness, rel=0.8
                )


def test_seeds(ours):
    for field, fewer, other in zip(ours, generate(70, 3, 32), generate(70, 4, 32), strict=True):
        assert field.dtype == np.uint8 and (field[:70] == fewer).all()
        assert (fewer != other).any()
    assert ours.pixels.shape == (640, 1024) and (ours.pixels.max(1) == 255).all()
    assert len({image.tobytes() for image in ours.pixels}) == 640
    assert (ours.labels.reshape(-1, 2).sum(1) == 1).all() and 130 < ours.labels[::2].sum() < 190


def test_processes_change_nothing(ours):
    for field, other in zip(ours, generate(200, 3, 32, processes=2), strict=True):
        assert (field[:200] == other).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 32), "count must be 1 or more: got 0"),
        ((1, -1, 32), "seed must be 0 or more: got -1"),
        ((1, 0, 48), "side must be one of 32, 64, 128, 256: got 48"),
        ((1, 0, 32, 0), "processes must be 1 or more: got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(*arguments)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def lay(folder: Path, metadata: str = "text") -> tuple[Path, Pictures]:
    """Two batches of three and two images, numbered so that they sort otherwise as text, one of them empty."""
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32)).astype(np.uint8)
    labels, level, i = [1, 0, 0, 1, 1], folder / LEVEL, 0
    for batch, count in ((2, 3), (10, 2)):
        rows = []
        (level / "imgs" / str(batch)).mkdir(parents=True)
        (level / "metadata").mkdir(exist_ok=True)
        for k in range(count):
            content = b"" if i == 2 else png(images[i])
            (level / "imgs" / str(batch) / f"sample_{k}.png").write_bytes(content)
            rows.append([f"imgs/{batch}", f"sample_{k}.png", str(k), str(labels[i]), "1.0", "14"])
            i += 1
        path = level / "metadata" / f"{batch}.npy"
        if metadata == "text":
            path.write_text("".join(" ".join(row) + "\n" for row in rows))
        else:
            np.save(path, np.array(rows))
    kept = [0, 1, 3, 4]
    return level, Pictures(images[kept].reshape(4, -1), np.array(labels, np.uint8)[kept])


def pack(folder: Path, name: str) -> Path:
    with tarfile.open(folder / name, f"w:{name.rpartition('.')[2].removeprefix('tar')}") as archive:
        for path in sorted(folder.glob("*")):
            if path.is_dir():
                archive.add(path, path.name)
    return folder / name


@pytest.mark.parametrize("metadata", ["text", "array"])
def test_files(tmp_path, metadata):
    level, expected = lay(tmp_path / "pathfinder32", metadata)
    places = [level, level.parent, tmp_path, *(pack(tmp_path, f"a.tar{packing}") for packing in ("", ".gz", ".xz"))]
    for data in places:
        found = read(data, 32)
        assert found.empty == 1
        for field, other in zip(found.pictures, expected, strict=True):
            assert field.dtype == np.uint8 and (field == other).all(), data


def test_levels_and_sizes_are_told_apart(tmp_path):
    level, expected = lay(tmp_path / "pathfinder32")
    shutil.copytree(level, tmp_path / "pathfinder64" / LEVEL)
    archive = pack(tmp_path, "a.tar.gz")
    assert (read(archive, 32).pictures.pixels == expected.pixels).all()
    shutil.copytree(level, tmp_path / "copy" / LEVEL)
    with pytest.raises(ValueError, match=f"a.tar.gz: holds {LEVEL} more than once, in 'copy/', 'pathfinder32/'"):
        read(pack(tmp_path, "a.tar.gz"), 32)
    for data in (tmp_path, archive):
        with pytest.raises(FileNotFoundError, match=rf"{data}: no curv_baseline/metadata/\*.npy in it"):
            read(data, 32, "curv_baseline")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/none: no such file or folder"):
        read(tmp_path / "none", 32)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("imgs/2 sample_1.png 1", "line 2: has 3 fields, not 6; is it cut short?"),
        ("imgs/2 sample_1.png 1 0 1.0", "line 2: has 5 fields, not 6"),
        ("", "line 2: has 1 fields, not 6"),
        ("imgs/2 sample_1.png 1 2 1.0 14", "line 2: label '2' is not 0 or 1"),
        ("imgs/2 sample_1.png 1 yes 1.0 14", "line 2: label 'yes' is not 0 or 1"),
        ("/etc passwd 1 0 1.0 14", "line 2: '/etc/passwd' names no image"),
        ("imgs/2 ../../a.png 1 0 1.0 14", "line 2: 'imgs/2/../../a.png' names no image"),
    ],
)
def test_defects_of_metadata_are_named(tmp_path, line, message):
    level, _ = lay(tmp_path)
    path = level / "metadata" / "2.npy"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[2:], ""]))
    for data in (level, pack(tmp_path, "a.tar.gz")):
        with pytest.raises(ValueError, match=re.escape(f"{LEVEL}/metadata/2.npy, {message}")):
            read(data, 32)


def test_metadata_that_are_cut_short_or_of_another_kind(tmp_path):
    level, _ = lay(tmp_path)
    path = level / "metadata" / "10.npy"
    whole = path.read_bytes()
    for place in range(1, len(whole)):
        if whole[place - 1 : place] != b"\n":
            path.write_bytes(whole[:place])
            line = whole[:place].count(b"\n") + 1
            with pytest.raises(ValueError, match=f"10.npy, line {line}: does not end; the file is cut short"):
                read(level, 32)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"10\.npy, line 1: the file is empty"):
        read(level, 32)
    np.save(path, np.array([["imgs/10", "sample_0.png", "0", "1"]]))
    whole = path.read_bytes()
    for place in range(6, len(whole), 40):
        path.write_bytes(whole[:place])
        with pytest.raises(ValueError, match=r"10\.npy: not an array of strings, or a damaged one"):
            read(level, 32)
    for wrong in (np.zeros((2, 4)), np.array(["imgs/10"])):
        np.save(path, wrong)
        with pytest.raises(ValueError, match=f"10.npy: holds an array of {wrong.dtype}, shape"):
            read(level, 32)
    np.save(path, np.array([["imgs/10", 0, None]], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"10\.npy: not an array of strings, or a damaged one: Object arrays"):
        read(level, 32)


def test_defects_of_images_are_named(tmp_path):
    level, _ = lay(tmp_path)
    path = level / "imgs" / "10" / "sample_1.png"
    whole, named = path.read_bytes(), r"sample_1.png \(named in .*/metadata/10.npy, line 2\)"
    for place in range(1, len(whole), 29):
        path.write_bytes(whole[:place])
        with pytest.raises(ValueError, match=f"{named}: not a PNG, or a damaged one"):
            read(level, 32)
    for place in (*range(0, len(whole) - 12, 23), len(whole) - 13):  # the last chunk, IEND, has nothing in it
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=f"{named}: not a PNG, or a damaged one"):
            read(level, 32)
    for wrong, what in {
        "32 x 31 pixels of mode L": np.zeros((31, 32), np.uint8),
        "64 x 64 pixels of mode L": np.zeros((64, 64), np.uint8),
        "32 x 32 pixels of mode RGB": np.zeros((32, 32, 3), np.uint8),
    }.items():
        path.write_bytes(png(what))
        with pytest.raises(ValueError, match=f"{named}: is {wrong}, not 32 x 32 grey ones"):
            read(level, 32)
    path.unlink()
    for data in (level, pack(tmp_path, "a.tar")):
        with pytest.raises(FileNotFoundError, match=r"sample_1\.png: missing, but named in .*10\.npy, line 2"):
            read(data, 32)
    for image in level.rglob("*.png"):
        image.write_bytes(b"")
    path.touch()
    with pytest.raises(ValueError, match=f"{level}: all 5 images are empty files; get them again"):
        read(level, 32)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tar.xz"])
def test_a_damaged_archive_is_refused(tmp_path, name):
    lay(tmp_path)
    whole = pack(tmp_path, name).read_bytes()
    data = tmp_path / f"damaged-{name}"
    for place in (0, 100, len(whole) // 2, len(whole) - 1 if name != "a.tar" else 512 * 14):
        data.write_bytes(whole[:place])
        with pytest.raises(ValueError, match=f"{data}: not a tar archive, or a damaged one"):
            read(data, 32)


@needs_originals
def test_real_files_unpacked(tmp_path, originals):
    """Every PNG is read as zlib and the format's own rules have it, and the text form of the metadata as the array."""
    (archive,) = SHARED.glob("*.tar.xz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    level = tmp_path / LEVEL
    for path in (level / "metadata").glob("*.npy"):
        shutil.copy(path.with_suffix(".txt"), path)
    found = read(tmp_path, 32)
    assert found.empty == 0 and len(found.pictures.labels) == 2000
    for field, other in zip(found.pictures, originals, strict=True):
        assert (field == other).all()
    assert (unfiltered((level / "imgs" / "0" / "sample_7.png").read_bytes()) == originals.pixels[7]).all()


def unfiltered(packed: bytes) -> np.ndarray:
    """Pixels of a grey PNG, by the format's rules (RFC 2083)."""
    place, data, side = 8, b"", int.from_bytes(packed[16:20])
    while place < len(packed):
        size, kind = int.from_bytes(packed[place : place + 4]), packed[place + 4 : place + 8]
        data += packed[place + 8 : place + 8 + size] if kind == b"IDAT" else b""
        place += size + 12
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(side, side + 1).astype(int)
    pixels = np.zeros((side + 1, side + 1), int)  # with a row and a column of zeros before them
    for y, (kind, *row) in enumerate(rows.tolist(), start=1):
        for x, value in enumerate(row, start=1):
            left, up, corner = pixels[y, x - 1], pixels[y - 1, x], pixels[y - 1, x - 1]
            guess = left + up - corner
            paeth = min((left, up, corner), key=lambda near: abs(guess - near))
            pixels[y, x] = (value + (0, left, up, (left + up) // 2, paeth)[kind]) % 256
    return pixels[1:, 1:].ravel()
