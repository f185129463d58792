"""What the numbers say: a setting for each layer, and the answer in words."""

from math import ceil

from nystrom.inspect.measure import Numbers
from nystrom.inspect.settings import EXACT, Setting, paste

RECOMMENDED = "recommended"
"""The id of the recommendation among the options, beside those of the settings."""
AS_FAST = 1.05
"""A ratio of times that is noise."""


def recommend(error: dict[str, float], cost: dict[str, float], target: float) -> str:
    """The fastest of the attentions, exact among them, whose error meets the target.

    Of those that are as fast within what timing can tell, the one with the least error.
    """
    met = {EXACT: 0.0} | {choice: found for choice, found in error.items() if found <= target}
    least = min(cost[choice] for choice in met)
    return min((choice for choice in met if cost[choice] <= AS_FAST * least), key=met.__getitem__)


def reason(choice: str, layer: Numbers, target: float, longest: int) -> str:
    """Why a layer gets it."""
    if choice != EXACT:
        return f"the cheapest setting with an error of at most {target:g}"
    if min(layer["error"].values()) <= target:
        return f"what meets the target is slower than exact attention at {longest:,} tokens"
    return f"no setting has an error of at most {target:g}"


def answer(report: Numbers, known: dict[str, Setting]) -> Numbers:
    """The verdict, its numbers in words, and the Python to paste."""
    choices = [layer["recommended"] for layer in report["layers"]]
    swapped = sum(choice != EXACT for choice in choices)
    option = RECOMMENDED if swapped else min(known, key=lambda name: report["options"][name]["hidden_error"])
    offered = choices if swapped else [option] * len(choices)
    return {
        "verdict": "yes" if swapped == len(choices) else "in part" if swapped else "no",
        "headline": headline(report, swapped),
        "option": option,
        "sentences": [*fidelity_words(report, option, known), *speed_words(report, option), *limits(report, option)],
        "code": paste(offered, known),
    }


def headline(report: Numbers, swapped: int) -> str:
    """Yes or no, first."""
    layers, longest = report["layers"], report["speed"]["lengths"][-1]
    within = f"an error of at most {report['target_error']:g}"
    if not swapped and any(min(layer["error"].values()) <= report["target_error"] for layer in layers):
        return f"No: up to {longest:,} tokens exact attention is faster than every setting with {within}."
    if not swapped:
        return f"No: no setting keeps {within} in any layer."
    start = faster_from(report, RECOMMENDED)
    when = "" if start in (None, report["speed"]["lengths"][0]) else f", from {start:,} tokens on"
    if swapped == len(layers):
        return f"Yes{when}: approximate attention keeps {within} in all {swapped} layers."
    return f"In part{when}: approximate attention keeps {within} in {swapped} of {len(layers)} layers."


def faster_from(report: Numbers, option: str) -> int | None:
    """The length from which on it is faster than exact attention, at all lengths asked for; None: not at the last."""
    start = None
    for n, ratio in zip(report["speed"]["lengths"], report["options"][option]["attention_speed_up"], strict=True):
        start = None if ratio <= 1 else start or n
    return start


def fidelity_words(report: Numbers, option: str, known: dict[str, Setting]) -> list[str]:
    """What it costs, and which target would let every layer go."""
    found, texts, layers = report["options"][option], report["texts"], report["layers"]
    what = "With the recommended settings in the whole model"
    if option != RECOMMENDED:
        what = f"The closest setting for all layers is {known[option].label}: with it in the whole model"
    words = [
        f"{what}, embeddings of your {texts['count']} texts of {texts['length']} tokens keep a cosine of "
        f"{cosine(found['cosine_mean'])} with the original ones (least {cosine(found['cosine_min'])}), and the last "
        f"hidden states differ by {percent(found['hidden_error'])}."
    ]
    left = [layer["index"] for layer in layers if layer["recommended"] == EXACT]
    if option == RECOMMENDED and left:
        words.append(f"Exact attention stays in layer{'s' * (len(left) > 1)} {', '.join(map(str, left))}.")
    needed = max(min(layer["error"].values()) for layer in layers)
    if needed > report["target_error"]:
        words.append(
            f"For a setting in every layer, an error of {ceil(1000 * needed) / 1000:g} would have to be accepted."
        )
    return words


def speed_words(report: Numbers, option: str) -> list[str]:
    """From which length on it pays, and how much at the longest."""
    lengths, found = report["speed"]["lengths"], report["options"][option]
    start = faster_from(report, option)
    if start is None:
        return [f"On this machine its attention is not faster than the exact one at {lengths[-1]:,} tokens."]
    where = "at every length asked for" if start == lengths[0] else f"from {start:,} tokens on"
    return [
        f"On this machine its attention is faster than the exact one {where}: {times(found['attention_speed_up'][-1])} "
        f"at {lengths[-1]:,} tokens, where the whole encoder becomes {times(found['model_speed_up'][-1])} faster."
    ]


def limits(report: Numbers, option: str) -> list[str]:
    """What the numbers do not say."""
    reach, n, longest = report["model"]["positions"], report["texts"]["length"], report["speed"]["lengths"][-1]
    words = []
    if reach is not None and longest > reach:
        start = faster_from(report, option)
        pays = "times beyond are what its attention would take if it read more"
        if start is None or start > reach:
            pays = "to gain anything it has to be made to read more"
        words.append(f"The model itself reads at most {reach:,} tokens; {pays}.")
    if longest > n:
        words.append(f"Errors were measured at {n:,} tokens and may differ at other lengths.")
    return words


def percent(part: float) -> str:
    """Two digits or more, and a space that does not break."""
    return f"{100 * part:.{0 if part >= 0.0995 else 1}f}\N{NO-BREAK SPACE}%"


def cosine(x: float) -> str:
    """To four places, and not rounded up to 1."""
    return "1" if x >= 1 else f"{min(x, 0.9999):.4f}"


def times(ratio: float) -> str:
    """A ratio as a reader says it."""
    return f"{ratio:.0f}×" if ratio >= 100 else f"{ratio:.1f}×" if ratio >= 2 else f"{ratio:.2f}×"
