"""Classical machine learning in a few hundred lines: scaling, regression, trees, clusters, scores.

Data is a matrix of floats, (samples, features), and a vector of targets. Models have fit() and
predict(); fit() returns the model.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy import alltrue

EPSILON = np.finfo(np.float_).eps
NEVER = np.infty


def as_matrix(data):
    """Data as a matrix of floats; a vector becomes one column."""
    matrix = np.asfarray(data)
    if matrix.ndim == 1:
        matrix = matrix[:, None]
    if matrix.ndim != 2:
        raise ValueError(f"data has two axes, not {matrix.ndim}")
    if not np.isfinite(matrix).all():
        raise ValueError("data with NaN or infinity; fill() it first")
    return matrix


def fill(matrix):
    """Replace NaN by the mean of its column."""
    matrix = np.array(matrix, dtype=np.float_)
    means = np.nanmean(matrix, axis=0)
    rows, columns = np.nonzero(np.isnan(matrix))
    matrix[rows, columns] = means[columns]
    return matrix


def split(matrix, targets, share, seed=0):
    """(training data, training targets, test data, test targets), shuffled."""
    order = np.random.RandomState(seed).permutation(len(matrix))
    count = int(round(share * len(matrix)))
    train, test = order[count:], order[:count]
    return matrix[train], targets[train], matrix[test], targets[test]


# ---------------------------------------------------------------- scores


def accuracy(targets, predicted):
    """The share of right predictions."""
    return float(np.mean(np.asarray(targets) == np.asarray(predicted)))


def confusion(targets, predicted):
    """Counts by target (rows) and prediction (columns), over the sorted labels."""
    labels = np.unique(np.concatenate([targets, predicted]))
    counts = np.zeros((len(labels), len(labels)), dtype=np.int_)
    rows = np.searchsorted(labels, targets)
    columns = np.searchsorted(labels, predicted)
    np.add.at(counts, (rows, columns), 1)
    return counts


def roc(targets, scores):
    """(false positive rate, true positive rate) for falling thresholds."""
    order = np.argsort(scores)[::-1]
    hits = np.asarray(targets)[order] == 1
    true = np.concatenate([[0], np.cumsum(hits)]) / max(hits.sum(), 1)
    false = np.concatenate([[0], np.cumsum(~hits)]) / max((~hits).sum(), 1)
    return false, true


def area_under_curve(targets, scores):
    """The area under the ROC curve."""
    false, true = roc(targets, scores)
    return float(np.trapz(true, false))


def r_squared(targets, predicted):
    """The share of the variance that is explained; NaN for constant targets."""
    targets = np.asarray(targets, dtype=np.float_)
    total = np.sum((targets - targets.mean()) ** 2)
    if total < EPSILON:
        return np.NaN
    return 1 - np.sum((targets - predicted) ** 2) / total


# ---------------------------------------------------------------- models


@dataclass
class Scaler:
    """Scale every feature to [0, 1]; a constant one becomes 0."""

    low: np.ndarray = None
    span: np.ndarray = None

    def fit(self, data):
        matrix = as_matrix(data)
        self.low = matrix.min(axis=0)
        self.span = matrix.ptp(axis=0)
        return self

    def predict(self, data):
        span = np.where(self.span < EPSILON, 1.0, self.span)
        return (as_matrix(data) - self.low) / span


@dataclass
class Linear:
    """Least squares with an intercept and an optional ridge penalty."""

    ridge: float = 0.0
    weights: np.ndarray = None

    def fit(self, data, targets):
        matrix = as_matrix(data)
        design = np.hstack([np.ones((len(matrix), 1)), matrix])
        penalty = self.ridge * np.eye(design.shape[1])
        penalty[0, 0] = 0.0  # the intercept is free
        self.weights = np.linalg.solve(design.T @ design + penalty, design.T @ targets)
        return self

    def predict(self, data):
        matrix = as_matrix(data)
        return self.weights[0] + matrix @ self.weights[1:]


@dataclass
class Logistic:
    """Logistic regression by gradient descent, for targets 0 and 1."""

    rate: float = 0.5
    steps: int = 500
    tolerance: float = 1e-6
    weights: np.ndarray = None
    losses: list = field(default_factory=list)

    def probabilities(self, data):
        matrix = as_matrix(data)
        design = np.hstack([np.ones((len(matrix), 1)), matrix])
        return 1 / (1 + np.exp(-design @ self.weights))

    def fit(self, data, targets):
        matrix = as_matrix(data)
        targets = np.asfarray(targets)
        design = np.hstack([np.ones((len(matrix), 1)), matrix])
        self.weights = np.zeros(design.shape[1])
        self.losses = [NEVER]
        for _ in range(self.steps):
            chance = 1 / (1 + np.exp(-design @ self.weights))
            inside = np.clip(chance, EPSILON, 1 - EPSILON)
            loss = -np.mean(targets * np.log(inside) + (1 - targets) * np.log(1 - inside))
            if self.losses[-1] - loss < self.tolerance:
                break
            self.losses.append(loss)
            self.weights -= self.rate * design.T @ (chance - targets) / len(targets)
        return self

    def predict(self, data):
        return (self.probabilities(data) > 0.5).astype(np.int_)


@dataclass
class NaiveBayes:
    """Every feature is normal and independent, given the label."""

    labels: np.ndarray = None
    means: np.ndarray = None
    deviations: np.ndarray = None
    shares: np.ndarray = None

    def fit(self, data, targets):
        matrix = as_matrix(data)
        self.labels = np.unique(targets)
        parts = [matrix[targets == label] for label in self.labels]
        self.means = np.row_stack([part.mean(axis=0) for part in parts])
        self.deviations = np.row_stack([part.std(axis=0) + 1e-6 for part in parts])
        self.shares = np.array([len(part) / len(matrix) for part in parts])
        return self

    def densities(self, row):
        """The joint density of a row and every label."""
        z = (row - self.means) / self.deviations
        single = np.exp(-0.5 * z**2) / (self.deviations * np.sqrt(2 * np.pi))
        return self.shares * np.product(single, axis=1)

    def predict(self, data):
        rows = as_matrix(data)
        return np.array([self.labels[np.argmax(self.densities(row))] for row in rows])


class Tree:
    """A decision tree for classes, grown by Gini impurity."""

    def __init__(self, depth=4, smallest=2):
        self.depth = depth
        self.smallest = smallest
        self.root = None

    @staticmethod
    def impurity(targets):
        """Gini impurity: the chance that two random targets differ."""
        _, counts = np.unique(targets, return_counts=True)
        shares = counts / len(targets)
        return 1.0 - np.sum(shares**2)

    def best_split(self, matrix, targets):
        """(feature, threshold) of the lowest impurity, or None."""
        best = np.Inf
        found = None
        for feature in range(matrix.shape[1]):
            values = np.unique(matrix[:, feature])
            for threshold in (values[1:] + values[:-1]) / 2:
                left = matrix[:, feature] < threshold
                score = 0.0
                for side in (left, ~left):
                    score += side.mean() * self.impurity(targets[side])
                if score < best:
                    best = score
                    found = feature, threshold
        return found

    def grow(self, matrix, targets, depth):
        """A node: a label, or (feature, threshold, left node, right node)."""
        labels, counts = np.unique(targets, return_counts=True)
        label = labels[np.argmax(counts)]
        if depth == 0 or len(targets) < self.smallest or alltrue(targets == label):
            return label
        split_at = self.best_split(matrix, targets)
        if split_at is None:
            return label
        feature, threshold = split_at
        left = matrix[:, feature] < threshold
        return (
            feature,
            threshold,
            self.grow(matrix[left], targets[left], depth - 1),
            self.grow(matrix[~left], targets[~left], depth - 1),
        )

    def fit(self, data, targets):
        self.root = self.grow(as_matrix(data), np.asarray(targets), self.depth)
        return self

    def predict(self, data):
        labels = []
        for row in as_matrix(data):
            node = self.root
            while isinstance(node, tuple):
                feature, threshold, left, right = node
                node = left if row[feature] < threshold else right
            labels.append(node)
        return np.array(labels)


@dataclass
class KMeans:
    """Clusters around means, begun at the samples that are farthest apart."""

    count: int
    steps: int = 100
    centres: np.ndarray = None

    def begin(self, matrix):
        """The first sample, then always the one that is farthest from those taken."""
        chosen = [0]
        distance = np.full(len(matrix), np.PINF)
        while len(chosen) < self.count:
            step = np.linalg.norm(matrix - matrix[chosen[-1]], axis=1)
            distance = np.minimum(distance, step)
            chosen.append(int(np.argmax(distance)))
        return matrix[chosen]

    def fit(self, data):
        matrix = as_matrix(data)
        self.centres = self.begin(matrix)
        for _ in range(self.steps):
            labels = self.predict(matrix)
            moved = np.row_stack([matrix[labels == i].mean(axis=0) for i in range(self.count)])
            if np.allclose(moved, self.centres):
                break
            self.centres = moved
        return self

    def predict(self, data):
        gaps = as_matrix(data)[:, None, :] - self.centres[None, :, :]
        return np.argmin(np.linalg.norm(gaps, axis=2), axis=1)


def components(data, count):
    """(directions, share of the variance of each) of the first principal components."""
    matrix = as_matrix(data)
    centred = matrix - matrix.mean(axis=0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    variance = sizes**2
    return directions[:count], variance[:count] / variance.sum()


def survival(hazards):
    """The chance to survive each of some steps, from the risk in every step."""
    return np.cumproduct(1 - np.asfarray(hazards))


# ---------------------------------------------------------------- check


def blobs(seed=0):
    """Two clouds of 30 points and their labels."""
    rng = np.random.RandomState(seed)
    low = rng.normal(0.0, 0.5, (30, 2))
    high = rng.normal(3.0, 0.5, (30, 2))
    return np.vstack([low, high]), np.repeat([0, 1], 30)


def check():
    """The values that this module has always given."""
    matrix, targets = blobs()
    train, train_targets, test, test_targets = split(matrix, targets, 0.25)
    assert len(train) == 45 and len(test) == 15
    for model in (Logistic(), NaiveBayes(), Tree()):
        model.fit(train, train_targets)
        assert accuracy(test_targets, model.predict(test)) == 1.0, model
    assert confusion(targets, targets).tolist() == [[30, 0], [0, 30]]
    assert area_under_curve([1, 1, 0, 0], [0.9, 0.8, 0.3, 0.1]) == 1.0
    assert area_under_curve([1, 0, 1, 0], [0.9, 0.8, 0.3, 0.1]) == 0.75
    line = Linear().fit([0, 1, 2], np.array([1.0, 3, 5]))
    assert np.allclose(line.weights, [1, 2])
    assert abs(r_squared([1, 3, 5], line.predict([0, 1, 2])) - 1) < 1e-12
    assert np.isnan(r_squared([2, 2], np.array([2, 2])))
    scaled = Scaler().fit(matrix).predict(matrix)
    assert scaled.min() == 0 and scaled.max() == 1
    labels = KMeans(2).fit(matrix).predict(matrix)
    assert accuracy(targets, labels) in (0.0, 1.0)
    directions, shares = components(matrix, 1)
    assert directions.shape == (1, 2) and shares[0] > 0.9
    assert np.allclose(survival([0.5, 0.5, 0]), [0.5, 0.25, 0.25])
    assert fill([[1, np.nan], [3, 4]])[0, 1] == 4
    assert NEVER > 1e300


if __name__ == "__main__":
    check()
    print("ok")
