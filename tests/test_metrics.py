"""The measures against hand-computed values and against formulae written here; nothing undefined escapes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nystrom.metrics import NAMES, main, score

# 2 true positives, 1 false positive, 1 false negative, 4 true negatives
PREDICTIONS = np.asarray([1, 1, 1, 0, 0, 0, 0, 0])
LABELS = np.asarray([1, 1, 0, 1, 0, 0, 0, 0])


def test_by_hand():
    found = score(("accuracy", "f1", "matthews", "macro_f1"), PREDICTIONS, LABELS)
    assert found == pytest.approx(
        {
            "accuracy": 6 / 8,
            "f1": 2 * 2 / (2 * 2 + 1 + 1),
            "matthews": (2 * 4 - 1 * 1) / math.sqrt(3 * 3 * 5 * 5),
            "macro_f1": (2 / 3 + 4 / 5) / 2,
        }
    )
    assert all(type(value) is float for value in found.values())


def test_by_hand_of_three_classes():
    predictions, labels = np.asarray([0, 0, 1, 1, 2, 2]), np.asarray([0, 1, 1, 1, 2, 0])
    found = score(("accuracy", "macro_f1"), predictions, labels)
    assert found == pytest.approx({"accuracy": 4 / 6, "macro_f1": (2 / 4 + 4 / 5 + 2 / 3) / 3})


def test_by_hand_of_scores():
    predictions, labels = np.asarray([1.0, 2.0, 3.0, 4.0]), np.asarray([1.0, 4.0, 9.0, 7.0])
    found = score(("pearson", "spearman"), predictions, labels)
    # deviations (-1.5, -.5, .5, 1.5) and (-4.25, -1.25, 3.75, 1.75); ranks 1 2 3 4 and 1 2 4 3
    assert found == pytest.approx({"pearson": 11.5 / math.sqrt(5 * 36.75), "spearman": 1 - 6 * 2 / (4 * 15)})


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_two_classes_by_the_formulae(pairs):
    predictions, labels = (np.asarray(column) for column in zip(*pairs, strict=True))
    tp, tn = sum(p == y == 1 for p, y in pairs), sum(p == y == 0 for p, y in pairs)
    fp, fn = sum(p > y for p, y in pairs), sum(p < y for p, y in pairs)
    below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    wanted = {
        "accuracy": (tp + tn) / len(pairs),
        "f1": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0,
        "matthews": (tp * tn - fp * fn) / math.sqrt(below) if below else 0.0,
    }
    assert score(("accuracy", "f1", "matthews"), predictions, labels) == pytest.approx(wanted, abs=1e-12)


def ranks(x: np.ndarray) -> np.ndarray:
    """1 for the smallest; equal values share the mean of their ranks."""
    return np.asarray([(x < value).sum() + ((x == value).sum() + 1) / 2 for value in x])


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    below = math.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / below) if below else 0.0


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=30))
def test_correlations_by_the_formulae(pairs):
    predictions, labels = (np.asarray(column, float) for column in zip(*pairs, strict=True))
    wanted = {"pearson": pearson(predictions, labels), "spearman": pearson(ranks(predictions), ranks(labels))}
    assert score(("pearson", "spearman"), predictions, labels) == pytest.approx(wanted, abs=1e-12)


def test_what_is_undefined_is_nought_and_draws_no_warning():
    same, other = np.ones(3), np.asarray([1.0, 2.0, 3.0])
    nearly = np.asarray([1.0, 1.0 + 1e-15, 1.0])
    for predictions, labels in ((same, other), (other, same), (same, same)):
        assert score(("pearson", "spearman"), predictions, labels) == {"pearson": 0.0, "spearman": 0.0}
    assert abs(score(("pearson",), nearly, other)["pearson"]) <= 1
    zeros, ones = np.zeros(4, int), np.ones(4, int)
    assert score(("f1", "matthews"), zeros, zeros) == {"f1": 0.0, "matthews": 0.0}
    assert score(("f1", "matthews"), ones, ones) == {"f1": 1.0, "matthews": 0.0}
    assert score(("macro_f1",), np.asarray([2, 2]), np.asarray([0, 1])) == {"macro_f1": 0.0}


def test_main_is_the_mean_of_the_tasks_measures():
    scores = {"accuracy": 0.8, "f1": 0.9, "loss": 7.0}
    assert main(scores, ("accuracy", "f1")) == pytest.approx(0.85)
    assert main(scores, ("f1",)) == 0.9


WRONG = {
    "no measure is called 'mcc'; there are accuracy, f1,": (("mcc",), PREDICTIONS, LABELS),
    r"got shapes \(7,\) and \(8,\)": (("f1",), PREDICTIONS[1:], LABELS),
    r"got shapes \(8, 1\) and \(8, 1\)": (("f1",), PREDICTIONS[:, None], LABELS[:, None]),
    r"got shapes \(0,\) and \(0,\)": (("accuracy",), PREDICTIONS[:0], LABELS[:0]),
    "every prediction must be finite: got nan": (("pearson",), np.asarray([1.0, np.nan]), np.asarray([1.0, 2.0])),
    "every label must be finite: got -inf": (("pearson",), np.asarray([1.0, 2.0]), np.asarray([1.0, -np.inf])),
    "spearman is a correlation, which needs two samples or more: got 1": (("spearman",), LABELS[:1], LABELS[:1]),
    "f1 is of two classes, 0 and 1: got class 2; use macro_f1": (("f1",), LABELS * 2, LABELS),
}


@pytest.mark.parametrize(("message", "arguments"), WRONG.items(), ids=list(range(len(WRONG))))
def test_what_cannot_be_measured_is_refused(message, arguments):
    with pytest.raises(ValueError, match=message):
        score(*arguments)


def test_each_measure_is_one_where_all_is_right():
    for name in NAMES:
        assert score((name,), LABELS, LABELS)[name] == pytest.approx(1.0)
