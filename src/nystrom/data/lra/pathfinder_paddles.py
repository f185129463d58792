"""The paddles that Pathfinder's paths are made of: every way one can lie, drawn once and kept as small stamps."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

DEGREES = 360
"""Directions that the first paddle of a path can have; the later ones lead from one pixel to another."""
CORE = 255
"""Level of a mask where a paddle, or the margin around it, is beyond doubt."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How images of one size are made."""

    side: int
    """Of the image (pixels)."""
    margins: tuple[int, ...]
    """Kept free around a paddle, so that the gaps in a path are twice as wide (pixels); each image draws one."""
    padding: int
    """Kept free along the edges, 1 or more (pixels)."""
    seed_distance: int
    """Between the beginnings of the two long paths; the first is twice this from the edges, or more (pixels)."""
    marker_radius: float
    """Of the two discs (pixels)."""
    paddle_length: int
    """Pixels."""
    paddle_thickness: float
    """Pixels."""
    continuity: float
    """How straight paths are: a turn by angle a is as likely as cos(continuity * a) squared."""
    num_distractors: int
    """Short paths that are tried (count); where there is no room, some are left out."""
    contrast: float
    """Brightness of the long paths; a marker's is 1."""
    distractor_contrast: float
    """Brightness of the short ones."""
    path_length: int = 14
    """Paddles in each of the two long paths (count)."""
    distractor_length: int = 4
    """Paddles in a short one (count)."""
    trials: int = 3
    """Times that a paddle is drawn anew where it would hit another (count)."""
    distractor_trials: int = 5
    """Times that a short path is begun anew (count)."""
    fineness: int = 2
    """Pixels are drawn so many times smaller, and then averaged (count)."""


class Paddles(NamedTuple):
    """All paddles with one margin. Directions 0 to 359 are the whole degrees from -180; the others are the reaches."""

    radius: int
    """A stamp is 2 radius + 1 pixels wide. In its middle is the near end of a first paddle, the far end of others."""
    lines: np.ndarray
    """uint8 (directions, stamp, stamp): the paddles, white on black."""
    masks: np.ndarray
    """uint8, the same: paddles with the margin around them."""
    stride: np.ndarray
    """float (directions, 2), down and right as all: from the joint before a paddle to that behind it; for `walk`."""
    reach: np.ndarray
    """int (reaches, 2): from a joint to the far end of the next paddle."""
    turn: np.ndarray
    """float (directions, reaches): how likely the reach is after a paddle in this direction; not normalised."""
    ahead: np.ndarray
    """float (degrees, 2): from the near end of a first paddle to its far end; for `walk`."""
    back: np.ndarray
    """float (degrees, 2): from its far end to the joint before it; for `walk`."""
    room: dict[int, np.ndarray]
    """By degree, int (n, 2): pixels, seen from its near end, that must be free where a first paddle is to lie. First
    paddles have these degrees alone."""
    disc: np.ndarray
    """int (n, 2): pixels, seen from the middle, that a margin reaches."""


@lru_cache(maxsize=8)
def paddles(settings: Settings, margin: int) -> Paddles:
    """Draw them, which takes a few tenths of a second."""
    length, reach = settings.paddle_length, settings.paddle_length + margin
    radius = length + int(np.ceil(settings.paddle_thickness)) + margin
    degrees = np.deg2rad(np.arange(DEGREES) - 180)
    around = np.arange(0, 2 * np.pi, 1 / reach)  # a pixel apart
    targets = np.unique(np.floor(reach * _unit(around) + 1e-9).astype(int), axis=0)
    headings = np.arctan2(*targets.T)
    facing = np.concatenate([degrees, headings])
    angle = np.abs(facing[:, None] - headings)
    angle = np.minimum(angle, 2 * np.pi - angle)
    turn = np.cos(np.minimum(angle * settings.continuity, np.pi / 2)) ** 2
    # a first paddle leads away from its own end, a later one back to the joint
    drawn = [_paddle(settings, margin, radius, a) for a in np.concatenate([degrees, headings + np.pi])]
    masks = np.stack([mask for _, mask in drawn])
    return Paddles(
        radius=radius,
        lines=np.stack([line for line, _ in drawn]),
        masks=masks,
        stride=_steps(facing, length + 2 * margin),
        reach=targets,
        turn=turn,
        ahead=_steps(degrees, length),
        back=_steps(degrees + np.pi, reach),
        room={d: room for d in range(DEGREES) if _surrounds(room := _room(masks[d], radius, reach))},
        disc=_disc(margin),
    )


def walk(places: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Places after steps, int (n, 2): whole pixels, rounded up."""
    return np.ceil(places + steps).astype(np.int64)


def marker(settings: Settings) -> np.ndarray:
    """A disc as a stamp, uint8 (stamp, stamp), white on black."""
    fine, radius = settings.fineness, int(np.ceil(settings.marker_radius)) + 3
    y, x = np.mgrid[: (2 * radius + 1) * fine, : (2 * radius + 1) * fine] - radius * fine
    return _shrink((y**2 + x**2 <= (settings.marker_radius * fine) ** 2) * 255.0, 2 * radius + 1)


def _paddle(settings: Settings, margin: int, radius: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """A line that begins in the middle, and the same with the margin around it."""
    fine = settings.fineness
    size = radius * fine
    end = np.ceil(np.round(settings.paddle_length * fine * _unit(np.array(angle)), 9))
    line = _line(size, end, settings.paddle_thickness * fine)
    around, mask = np.pad(line, margin * fine), np.zeros_like(line)
    for y, x in _disc(margin * fine) + margin * fine:
        mask |= around[y : y + len(line), x : x + len(line)]
    return _shrink(line * 255.0, 2 * radius + 1), _shrink(mask * 255.0, 2 * radius + 1)


def _line(size: int, end: np.ndarray, width: float) -> np.ndarray:
    """Pixels from the middle to `end`, bool (2 size + 1, 2 size + 1)."""
    places = np.mgrid[-size : size + 1, -size : size + 1]
    major = int(np.abs(end[1]) >= np.abs(end[0]))
    length = np.hypot(*end)
    along = np.tensordot(end, places, 1) / length
    aside = places[1 - major] - places[major] * end[1 - major] / end[major]
    aside *= np.sign(end[1 - major]) or 1
    half = (width - 1) / 2 * length / np.abs(end[major]) + 0.5
    return (along >= -0.5) & (along <= length + 0.5) & (aside > -half + 1e-9) & (aside <= half + 1e-9)


def _shrink(image: np.ndarray, size: int) -> np.ndarray:
    """A square image made smaller by Lanczos' filter of order 3, uint8 (size, size)."""
    scale = len(image) / size
    distance = (np.arange(len(image)) + 0.5) / scale - (np.arange(size)[:, None] + 0.5)
    weights = np.sinc(distance) * np.sinc(distance / 3) * (np.abs(distance) < 3)
    weights /= weights.sum(1, keepdims=True)
    across = np.clip(np.rint(np.round(image @ weights.T, 6)), 0, 255)  # rounded twice: the same on every machine
    return np.clip(np.rint(np.round(weights @ across, 6)), 0, 255).astype(np.uint8)


def _room(mask: np.ndarray, radius: int, reach: int) -> np.ndarray:
    # one pixel down and right of where the mask will be, and cut off behind it, as in the original generator
    places = np.argwhere(mask == CORE) - radius
    return places[(places < reach).all(1)] + 1


def _surrounds(room: np.ndarray) -> bool:
    """Whether part of the room is on the image wherever on the image the paddle's end is.

    The original generator means to use all degrees, but finds no place for the others: it looks for a highest level in
    the room, OpenCV answers with the lowest of all numbers where all of the room is off the image, and one such answer
    makes it give up. So most degrees are never used where paddles are small, and few short paths are begun.
    """
    down, right = room.T
    return all(((down * y >= 0) & (right * x >= 0)).any() for y in (-1, 1) for x in (-1, 1))


def _disc(radius: int) -> np.ndarray:
    """Pixels within the radius of the middle one, int (n, 2)."""
    places = np.mgrid[-radius : radius + 1, -radius : radius + 1].reshape(2, -1).T
    return places[(places**2).sum(1) <= radius**2]


def _unit(angle: np.ndarray) -> np.ndarray:
    return np.stack([np.sin(angle), np.cos(angle)], -1)


def _steps(angle: np.ndarray, length: int) -> np.ndarray:
    """Steps of this length (n, 2), the same on every machine.

    What rounding makes of no step at all, 2e-16 pixels, is left: where a place is rounded up it is a pixel near the
    upper and left edge, as it is in the original generator.
    """
    steps = length * _unit(angle)
    return np.where(np.abs(steps) < 1e-9, steps, np.round(steps, 9))
