"""Pathfinder (Linsley et al. 2018) at Long Range Arena's sizes: are the two discs on one dashed path? Made anew.

Two paths of 14 paddles grow from near the middle, in turn, each paddle turned at random a little from the last and
clear of what is there; where either is stuck, both are begun anew. Then come some short paths. One disc lies on the
beginning of a long path, the other on the end of the same one (label 1) or of the other one (label 0).

The law is that of the generator whose images Long Range Arena has (github.com/drewlinsley/pathfinder, snakes2.py), with
its pixel grid and its rounding; but here thousands of pairs grow together, and what a paddle looks like is looked up.
Its oddities are kept: where paddles are small it begins paths in few directions, so that few short paths are found a
place (about one of five at 32 x 32); the newest paddles of the two long paths do not see each other, so that they cross
in one image of fifteen; and a short path may cross the last paddle of the first long one. Ours is that labels are
balanced.
"""

from contextlib import closing
from functools import partial
from typing import NamedTuple

import numpy as np

from nystrom.data.lra.chunks import generator, in_order, progress
from nystrom.data.lra.images import Pictures
from nystrom.data.lra.pathfinder_paddles import Settings, marker, paddles
from nystrom.data.lra.pathfinder_paths import long_paths, short_paths

SETTINGS = {
    32: Settings(
        side=32,
        margins=(1,),
        padding=1,
        seed_distance=7,
        marker_radius=1.5,
        paddle_length=2,
        paddle_thickness=0.5,
        continuity=1.0,
        num_distractors=5,
        contrast=1.5,
        distractor_contrast=2.0,
    ),
    64: Settings(
        side=64,
        margins=(1,),
        padding=1,
        seed_distance=12,
        marker_radius=2.5,
        paddle_length=5,
        paddle_thickness=1.0,
        continuity=1.8,
        num_distractors=5,
        contrast=0.8,
        distractor_contrast=0.8,
    ),
    128: Settings(
        side=128,
        margins=(2, 3),
        padding=1,
        seed_distance=20,
        marker_radius=3.0,
        paddle_length=5,
        paddle_thickness=1.5,
        continuity=1.8,
        num_distractors=8,
        contrast=0.9,
        distractor_contrast=0.9,
    ),
    256: Settings(
        side=256,
        margins=(3,),
        padding=22,
        seed_distance=27,
        marker_radius=5.0,
        paddle_length=5,
        paddle_thickness=2.0,
        continuity=1.8,
        num_distractors=7,
        contrast=1.0,
        distractor_contrast=1.0,
    ),
}
"""Long Range Arena's, by side: lra_benchmarks/data/pathfinder.py, and what it does not say as in snakes2_wrapper.py."""
CHUNK = 64
"""Images that are made together (count)."""


class Scenes(NamedTuple):
    """What is on images. A paddle is three numbers: its direction, a row of the tables of `Paddles`, and the place (y,
    x) of the end that is in the middle of its stamp: of a path's first paddle where the path begins, else the far end.
    """

    margins: np.ndarray
    """int (count,): see `Settings`."""
    paths: np.ndarray
    """int (count, 2, path_length, 3)."""
    distractors: np.ndarray
    """int (count, num_distractors, distractor_length, 3); -1 where there was no room."""
    begun: np.ndarray
    """int (count,): the path, 0 or 1, on whose beginning a disc lies."""
    ended: np.ndarray
    """int (count,): the path on whose end the other one lies."""


def generate(count: int, seed: int, side: int, processes: int = 1) -> Pictures:
    """Images, (count, side * side), of which the first and second, the third and fourth … have different labels.

    Fewer are the beginning of more; the number of processes changes nothing.

    Args:
        count: of images.
        seed: of everything that is random, 0 or more.
        side: of an image: 32, 64, 128 or 256 (pixels).
        processes: to work in; more than one are new ones, each of which imports this package.

    Raises:
        ValueError: an argument is out of range.
    """
    if count < 1:
        raise ValueError(f"count must be 1 or more: got {count}")
    if side not in SETTINGS:
        raise ValueError(f"side must be one of {', '.join(map(str, SETTINGS))}: got {side}")
    parts, missing = list[Pictures](), count
    make = partial(_chunk, seed, SETTINGS[side])
    with progress(f"Pathfinder{side}", count) as advance, closing(in_order(make, processes)) as chunks:
        while missing:
            parts.append(Pictures(*(array[:missing] for array in next(chunks))))
            missing -= len(parts[-1].labels)
            advance(len(parts[-1].labels))
    return Pictures(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _chunk(seed: int, settings: Settings, number: int) -> Pictures:
    found = scenes(CHUNK, settings, generator(seed, number))
    return Pictures(render(found, settings), (found.begun == found.ended).astype(np.uint8))


def scenes(count: int, settings: Settings, rng: np.random.Generator) -> Scenes:
    """An even number of scenes, of which every second one has the other label than that before it."""
    margins = rng.choice(settings.margins, count)
    paths = np.zeros((count, 2, settings.path_length, 3), np.int64)
    distractors = np.zeros((count, settings.num_distractors, settings.distractor_length, 3), np.int64)
    for margin in np.unique(margins):
        rows = np.flatnonzero(margins == margin)
        boards, paths[rows] = long_paths(len(rows), settings, int(margin), rng)
        distractors[rows] = short_paths(boards, rng)
    begun = rng.integers(0, 2, count)
    is_other = rng.integers(0, 2, count // 2)
    return Scenes(margins, paths, distractors, begun, begun ^ np.stack([is_other, 1 - is_other], 1).ravel())


def render(found: Scenes, settings: Settings) -> np.ndarray:
    """The images, uint8 (count, side * side): 0 is black, the brightest pixel of each is 255."""
    rows, disc = np.arange(len(found.margins)), marker(settings)
    room = max(len(disc) // 2, *(paddles(settings, margin).radius for margin in settings.margins))
    canvas = np.zeros((len(rows), settings.side + 2 * room, settings.side + 2 * room), np.float32)
    for margin in settings.margins:
        lines = paddles(settings, margin).lines
        for drawn, contrast in ((found.paths, settings.contrast), (found.distractors, settings.distractor_contrast)):
            for paddle in drawn.reshape(len(rows), -1, 3).transpose(1, 0, 2):
                there = np.flatnonzero((found.margins == margin) & (paddle[:, 0] >= 0))
                direction, place = paddle[there, 0], paddle[there, 1:]
                _stamp(canvas, there, place + room, lines[direction], contrast)
    for path, place in ((found.begun, 0), (found.ended, -1)):
        _stamp(canvas, rows, found.paths[rows, path, place, 1:] + room, disc[None], 1.0)
    images = canvas[:, room:-room, room:-room].reshape(len(rows), -1).astype(np.float64)
    images /= images.max(1, keepdims=True)
    return (images * 255.0 + 0.5).astype(np.uint8)


def _stamp(canvas: np.ndarray, rows: np.ndarray, places: np.ndarray, stamps: np.ndarray, contrast: float) -> None:
    """Lighten the canvases `rows` by stamps with their middles at these places."""
    radius = stamps.shape[-1] // 2
    y, x = (places.T[:, :, None] + np.arange(-radius, radius + 1))[..., None]
    pixels = rows[:, None, None], y, x.transpose(0, 2, 1)
    light = stamps.astype(np.float32) / 255 * np.float32(contrast)
    canvas[pixels] = np.maximum(canvas[pixels], light)
