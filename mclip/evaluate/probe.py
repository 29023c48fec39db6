"""Linear probe: logistic regression on frozen features, as CLIP evaluates representations.

Why C is searched over twelve decades: on features of this scale the default's teachers do best at
0.001 to 0.01, their students at 0.01 to 0.1. A grid that began at 1 gave the largest teacher 61.6 %
on CIFAR-10 with 1,000 pictures, below its own zero-shot 68.0 %; C = 0.001 gives 68.0 %, 0.01 68.4
%.
"""

import warnings
from collections.abc import Callable, Sequence

import joblib
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor

from mclip.system.progress import bar

GRID = tuple(10.0**i for i in range(-6, 7, 2))  # CLIP's: seven from 1e-6 to 1e6
HALVINGS = 4  # of the two decades between them: eight steps a decade, CLIP's 96 in all


def probes(
    train: Sequence[Tensor],
    train_labels: Sequence[int],
    test: Sequence[Tensor],
    test_labels: Sequence[int],
    *,
    c: Sequence[float] = GRID,
    halvings: int = HALVINGS,
    seed: int = 0,
    max_iter: int = 1000,
) -> list[tuple[float, float]]:
    """Linear probe of several models' features.

    Multinomial logistic regression on frozen features as in CLIP (Radford et al., 2021, section 3.2
    and appendix A.3): L-BFGS, at most 1,000 iterations, the strength of the L2 penalty found by
    `search` on a validation split (20 % of the train split, drawn with `seed`), then a fit on the
    whole train split. Features are the unit-norm embeddings times sqrt(d), so that a coordinate's
    mean square is 1 and one grid of C suits every width; they are not standardised one by one, and
    nor are CLIP's.

    Parameters
    ----------
    train : sequence of Tensor, each (n, d)
        A model's unit-norm embeddings of the train split.
    train_labels : sequence of int, (n,)
    test : sequence of Tensor, each (m, d)
        The same models' embeddings of the test split.
    test_labels : sequence of int, (m,)
    c : sequence of float
        The grid of C, see `search`.
    halvings : int
        See `search`.
    seed : int
        Draws the validation split.
    max_iter : int
        Of L-BFGS.

    Returns
    -------
    list of (float, float)
        Top-1 on the test split, 0 to 1, and the C that was chosen, a pair a model.

    Raises
    ------
    ValueError
        The train split holds one class only.

    References
    ----------
    Radford et al., 2021: Learning Transferable Visual Models From Natural Language Supervision
    (arXiv 2103.00020).

    Examples
    --------
    >>> import torch
    >>> from mclip.evaluate import probe
    >>> labels = [0, 1] * 20
    >>> features = torch.eye(4)[labels]
    >>> probe.probes([features], labels, [features], labels, c=(0.01, 1.0), halvings=0)
    [(1.0, 0.01)]
    """
    y, y_test = np.asarray(train_labels), np.asarray(test_labels)
    held, rest = validation(len(y), seed)
    if len(np.unique(y[rest])) < 2:
        raise ValueError("linear probe: the train split holds one class only")

    def one(x: np.ndarray, x_test: np.ndarray) -> tuple[float, float]:
        # float32 still: half the time
        x, x_test = x * x.shape[1] ** 0.5, x_test * x.shape[1] ** 0.5
        # each fit of the search starts from the solution of the one before and stops ten times
        # earlier than the last: a quarter of the iterations, the same peak
        regression = LogisticRegression(
            solver="lbfgs", max_iter=max_iter, warm_start=True, tol=1e-3
        )

        def score(value: float) -> float:
            going.update()
            return regression.set_params(C=value).fit(x[rest], y[rest]).score(x[held], y[held])

        best = search(score, c, halvings)
        going.update()
        final = LogisticRegression(solver="lbfgs", max_iter=max_iter, tol=1e-4, C=best).fit(x, y)
        return float(final.score(x_test, y_test)), best

    most = len(train) * (len(c) + 2 * halvings + 1)  # a search that passed its peak stops earlier
    # One BLAS thread a fit: the products are small, and two threads that wait for each other took
    # ten times as long.
    with (
        warnings.catch_warnings(),
        threadpool_limits(1),
        bar(desc="linear probe", unit="fit", total=most) as going,
    ):
        # bounded on purpose; accuracy is flat by then
        warnings.simplefilter("ignore", ConvergenceWarning)
        return joblib.Parallel(n_jobs=-1, prefer="threads")(
            joblib.delayed(one)(a.numpy(), b.numpy()) for a, b in zip(train, test, strict=True)
        )


def validation(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a train split that validate (20 %), and the others, both shuffled by seed."""
    order = np.random.default_rng(seed).permutation(rows)
    held, rest = np.split(order, [max(1, rows // 5)])
    return held, rest


def search(
    score: Callable[[float], float], c: Sequence[float] = GRID, halvings: int = HALVINGS
) -> float:
    """The C of the highest score by CLIP's search: the grid, then its steps around the peak halved
    again and again.

    The grid is walked upwards and left once two values in a row score below the best: the weaker
    the penalty, the slower the fit. Of equals the smallest C, so the strongest penalty.

    Parameters
    ----------
    score : callable
        C -> accuracy on a validation split.
    c : sequence of float
        The grid, in any order.
    halvings : int
        How often the step around the peak is halved.

    Returns
    -------
    float

    Examples
    --------
    >>> from mclip.evaluate import probe
    >>> probe.search(lambda c: -abs(c - 1.0))
    1.0
    """
    grid = sorted(c)
    scores: dict[float, float] = {}
    best = grid[0]
    for i, value in enumerate(grid):
        scores[value] = score(value)
        best = max(scores, key=lambda v: (scores[v], -v))
        if i - grid.index(best) >= 2 and scores[grid[i - 1]] < scores[best]:
            break
    step = (grid[1] / grid[0]) if len(grid) > 1 else 1.0
    for _ in range(halvings if step > 1 else 0):
        step **= 0.5
        for value in (best / step, best * step):
            scores[value] = score(value)
        best = max(scores, key=lambda v: (scores[v], -v))
    return best
