"""How Pathfinder's paths grow: many images at once, one paddle after the other, none in another's way."""

from typing import NamedTuple

import numpy as np

from nystrom.data.lra.pathfinder_paddles import DEGREES, Paddles, Settings, paddles, walk

BOARD_PIXELS = 1 << 24
"""At most, of the boards on which pairs of paths grow together (count)."""
TAKEN = 77
"""Level of a mask, 255 at most, from which on no first paddle is put there: more than 0.3."""
CLASH = 459
"""Two masks that add up to this level, 1.8, are in each other's way."""
STUCK = 1e-4 * 255
"""Where a next paddle's weights add up to less, there is none."""


class Tips(NamedTuple):
    """The last paddles of paths, one on each of some boards."""

    direction: np.ndarray
    """int (paths,): row of the tables of `Paddles`."""
    place: np.ndarray
    """int (paths, 2): y and x of the end that is in the middle of its stamp."""
    joint: np.ndarray
    """int (paths, 2): the middle of the gap before it."""

    def of(self, chosen: np.ndarray) -> "Tips":
        """Those of the chosen paths."""
        return Tips(*(field[chosen] for field in self))

    def paddles(self) -> np.ndarray:
        """int (paths, 3): direction, y, x."""
        return np.concatenate([self.direction[:, None], self.place], 1)


class Boards:
    """What lies on images, as masks; a board is an image with room around it, so that stamps may hang over."""

    def __init__(self, count: int, settings: Settings, stamps: Paddles) -> None:
        self.settings, self.stamps = settings, stamps
        self.width = settings.side + 2 * stamps.radius
        self.masks = np.zeros((count, self.width, self.width), np.uint8)
        self.images = self.masks[:, stamps.radius : -stamps.radius, stamps.radius : -stamps.radius]
        self.images[:] = 255
        self.images[:, settings.padding : -settings.padding, settings.padding : -settings.padding] = 0
        self.disc = stamps.disc @ (self.width, 1)
        reach = np.arange(-stamps.radius, stamps.radius + 1)
        self.window = (reach[:, None] * self.width + reach).ravel()

    def at(self, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Numbers of pixels, for `masks` as one flat array."""
        inner = places + self.stamps.radius
        return (rows * self.width + inner[..., 0]) * self.width + inner[..., 1]

    def put(self, rows: np.ndarray, tips: Tips) -> None:
        """Add the masks of paddles, one on each of the boards `rows`."""
        pixels = self.at(rows, tips.place)[:, None] + self.window
        stamps = self.stamps.masks[tips.direction].reshape(len(rows), len(self.window))
        flat = self.masks.reshape(-1)
        flat[pixels] = np.maximum(flat[pixels], stamps)

    def extend(self, rows: np.ndarray, tips: Tips, rng: np.random.Generator) -> tuple[np.ndarray, Tips]:
        """The next paddle of each path: which of the paths have one, bool, and the paddles of these."""
        stamps, side = self.stamps, self.settings.side
        joint = walk(tips.joint, stamps.stride[tips.direction])
        heads = joint[:, None] + stamps.reach
        inside = ((heads >= 0) & (heads < side)).all(-1)
        pixels = self.at(rows[:, None], np.clip(heads, 0, side - 1))
        flat = self.masks.reshape(-1)
        taken = flat[np.add.outer(pixels, self.disc)].max(-1)
        total = np.cumsum((255 - taken) * inside * stamps.turn[tips.direction], 1)
        chosen = np.full(len(rows), -1)
        for _ in range(self.settings.trials):
            todo = np.flatnonzero((chosen < 0) & (total[:, -1] >= STUCK))
            choice = (total[todo] > rng.random((len(todo), 1)) * total[todo, -1:]).argmax(1)
            window = flat[pixels[todo, choice][:, None] + self.window].astype(np.int16)
            clear = (window + stamps.masks[DEGREES + choice].reshape(len(todo), len(self.window)) < CLASH).all(1)
            chosen[todo[clear]] = choice[clear]
        found = chosen >= 0
        place = heads[found, chosen[found]]
        return found, Tips(DEGREES + chosen[found], place, joint[found])


def long_paths(count: int, settings: Settings, margin: int, rng: np.random.Generator) -> tuple[Boards, np.ndarray]:
    """Pairs of paths, each pair on a board of its own: boards, and paddles as int (count, 2, path_length, 3)."""
    stamps = paddles(settings, margin)
    most = BOARD_PIXELS // (settings.side + 2 * stamps.radius) ** 2
    masks, paths, begun, found = list[np.ndarray](), list[np.ndarray](), 0, 0
    while found < count:
        tries = int(np.clip(1.2 * (count - found) * (begun + 16) / (found + 1), 64, most))
        boards = Boards(tries, settings, stamps)
        rows, pairs = _pairs(boards, rng)
        masks.append(boards.masks[rows])
        paths.append(pairs)
        begun, found = begun + tries, found + len(rows)
    whole = Boards(count, settings, stamps)
    whole.masks[:] = np.concatenate(masks)[:count]
    return whole, np.concatenate(paths)[:count]


def _pairs(boards: Boards, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Begin a pair on every board: which boards have a whole one, and its paddles (pairs, 2, path_length, 3)."""
    rows, pair = np.arange(len(boards.masks)), _begin_pair(boards, rng)
    paths = np.zeros((len(boards.masks), 2, boards.settings.path_length, 3), np.int64)
    for which, tips in enumerate(pair):
        paths[rows, which, 0] = tips.paddles()
    for place in range(1, boards.settings.path_length):
        for which in (0, 1):
            found, tips = boards.extend(rows, pair[which], rng)
            rows = rows[found]
            boards.put(rows, pair[which].of(found))  # a path need not keep clear of its own last paddle
            pair[1 - which] = pair[1 - which].of(found)
            pair[which] = tips
            paths[rows, which, place] = tips.paddles()
    boards.put(rows, pair[1])  # the mask of the first path's last paddle is left out, as in the original
    return rows, paths[rows]


def _begin_pair(boards: Boards, rng: np.random.Generator) -> list[Tips]:
    """First paddles: one near the middle, one at a distance from it."""
    settings, stamps, count = boards.settings, boards.stamps, len(boards.masks)
    lowest, highest = 2 * settings.seed_distance, settings.side - 1 - 2 * settings.seed_distance
    degrees = np.array(list(stamps.room))
    low = lowest - np.stack([room.min(0) for room in stamps.room.values()])
    high = highest - np.stack([room.max(0) for room in stamps.room.values()])
    chosen = rng.choice(np.flatnonzero((low <= high).all(1)), count)
    place = rng.integers(low[chosen], high[chosen] + 1)
    around = np.deg2rad(rng.integers(0, 360, count))
    away = np.stack([np.sin(around), np.cos(around)], -1) * settings.seed_distance
    other = place + np.rint(np.round(away, 9)).astype(np.int64)
    firsts = (degrees[chosen], place), (rng.integers(0, DEGREES, count), other)
    return [_first(stamps, direction, end)[1] for direction, end in firsts]


def short_paths(boards: Boards, rng: np.random.Generator) -> np.ndarray:
    """Paddles of the distractors, int (boards, num_distractors, distractor_length, 3); -1 where there was no room."""
    settings = boards.settings
    paths = np.full((len(boards.masks), settings.num_distractors, settings.distractor_length, 3), -1)
    for which in range(settings.num_distractors):
        missing = np.arange(len(boards.masks))
        for _ in range(settings.distractor_trials):
            rows, found = _short(boards, missing, rng)
            paths[rows, which] = found
            missing = np.setdiff1d(missing, rows)
    return paths


def _short(boards: Boards, tried: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Try one short path on each of these boards: which have it, and its paddles."""
    before = boards.masks[tried]
    rows, tips = _begin_short(boards, tried, rng)
    paddles = [tips.paddles()]
    for _ in range(1, boards.settings.distractor_length):
        found, after = boards.extend(rows, tips, rng)
        rows = rows[found]
        boards.put(rows, tips.of(found))
        tips = after
        paddles = [part[found] for part in paddles] + [tips.paddles()]
    boards.put(rows, tips)
    failed = ~np.isin(tried, rows)
    boards.masks[tried[failed]] = before[failed]
    return rows, np.stack(paddles, 1)


def _begin_short(boards: Boards, tried: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Tips]:
    """A first paddle at any place where its mask is clear of what is there, the padding at the edges included."""
    settings, stamps, side = boards.settings, boards.stamps, boards.settings.side
    direction, place = np.zeros(len(tried), np.int64), np.zeros((len(tried), 2), np.int64)
    found = np.zeros(len(tried), bool)
    for i, row in enumerate(tried):
        taken = boards.masks[row] >= TAKEN
        for _ in range(settings.trials):
            direction[i] = rng.integers(0, DEGREES)
            if direction[i] not in stamps.room:
                break
            blocked = np.zeros((side, side), bool)
            for y, x in stamps.room[direction[i]] + stamps.radius:
                blocked |= taken[y : y + side, x : x + side]
            free = np.flatnonzero(~blocked)
            if not len(free):
                break
            place[i] = np.unravel_index(free[rng.integers(0, len(free))], blocked.shape)
            head, tips = _first(stamps, direction[[i]], place[[i]])
            if all(((end >= 0) & (end < side)).all() for end in (head, tips.joint)):
                found[i] = True
                break
    return tried[found], _first(stamps, direction[found], place[found])[1]


def _first(stamps: Paddles, direction: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, Tips]:
    """First paddles from their near ends: their far ends, and the paddles."""
    head = walk(place, stamps.ahead[direction])
    return head, Tips(direction, place, walk(head, stamps.back[direction]))
