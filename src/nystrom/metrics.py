"""How good predictions are, by the measures that the benchmarks use; computed by scikit-learn and scipy."""

import warnings
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

NAMES = ("accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman")


def score(names: tuple[str, ...], predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The named measures of predictions against labels; more is better, 1 is best.

    Where a measure is undefined it is 0: F1 where no example is positive nor called so, a correlation where all
    predictions or all labels are equal. So the numbers are always finite.

    Args:
        names: "accuracy"; "f1" (two classes, 1 is the positive one) or "macro_f1" (the mean of F1 over the classes that
            occur); "matthews"; for scores "pearson", "spearman".
        predictions: one a sample: number of the class, or score.
        labels: the same.

    Raises:
        ValueError: no such measure; not one prediction for each label, none at all, or one for a correlation; a value
            that is not finite; F1 of more than two classes.
    """
    if unknown := set(names) - set(NAMES):
        raise ValueError(f"no measure is called {min(unknown)!r}; there are {', '.join(NAMES)}")
    if predictions.shape != labels.shape or predictions.ndim != 1 or len(labels) == 0:
        raise ValueError(
            f"predictions and labels must be one for each sample: got shapes {predictions.shape} and {labels.shape}"
        )
    for what, values in (("prediction", predictions), ("label", labels)):
        if not np.isfinite(values).all():
            raise ValueError(f"every {what} must be finite: got {values[~np.isfinite(values)][0]}")
    return {name: _measure(name, predictions, labels) for name in names}


def main(scores: Mapping[str, float], names: tuple[str, ...]) -> float:
    """The one number of a task: the mean of its measures, as GLUE averages F1 with accuracy, Pearson with Spearman."""
    return sum(scores[name] for name in names) / len(names)


def _measure(name: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    from scipy import stats
    from sklearn import metrics

    if name in ("pearson", "spearman"):
        if len(labels) < 2:
            raise ValueError(f"{name} is a correlation, which needs two samples or more: got 1")
        correlate = stats.pearsonr if name == "pearson" else stats.spearmanr
        with warnings.catch_warnings():  # that the correlation is undefined: told by the 0
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            warnings.simplefilter("ignore", stats.NearConstantInputWarning)
            value = float(cast(Any, correlate(predictions, labels)).statistic)
        return value if np.isfinite(value) else 0.0
    if name == "accuracy":
        return float(metrics.accuracy_score(labels, predictions))
    if name == "matthews":
        # over all classes at once, so that a single one in the data draws no warning
        return float(metrics.matthews_corrcoef(labels, predictions)) if np.ptp(labels) or np.ptp(predictions) else 0.0
    if name == "macro_f1":
        return float(metrics.f1_score(labels, predictions, average="macro"))
    if other := set(np.union1d(predictions, labels)) - {0, 1}:
        raise ValueError(f"f1 is of two classes, 0 and 1: got class {min(other)}; use macro_f1 for more")
    return float(metrics.f1_score(labels, predictions, zero_division=cast(Any, 0.0)))
