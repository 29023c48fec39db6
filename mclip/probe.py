"""Linear probe: logistic regression on frozen features, as CLIP evaluates representations."""

import warnings
from collections.abc import Sequence

import joblib
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor


def probes(
    train: Sequence[Tensor],
    train_labels: Sequence[int],
    test: Sequence[Tensor],
    test_labels: Sequence[int],
    *,
    c: Sequence[float] = (0.01, 0.1, 1.0, 10.0, 100.0),
    seed: int = 0,
    max_iter: int = 200,
) -> list[tuple[float, float]]:
    """Linear probe of several models' (n, d) features: top-1 and the C that was chosen, a pair a model.

    Multinomial logistic regression on frozen features as in CLIP (Radford et al., 2021, section 3.2 and appendix
    A.3): L-BFGS, the strength of the L2 penalty found on a validation split (20 % of the train split, drawn with
    `seed`), then a fit on the whole train split. Features are the unit-norm embeddings times sqrt(d), so that a
    coordinate's mean square is 1 and one grid of C suits every width; they are not standardised one by one, and
    nor are CLIP's. Each fit of the search starts from the solution for the C before.
    """
    y, y_test = np.asarray(train_labels), np.asarray(test_labels)
    if len(np.unique(y)) < 2:
        raise ValueError("linear probe: the train split holds one class only")
    order = np.random.default_rng(seed).permutation(len(y))
    held, rest = np.split(order, [max(1, len(y) // 5)])

    def one(x: np.ndarray, x_test: np.ndarray) -> tuple[float, float]:
        x, x_test = x * x.shape[1] ** 0.5, x_test * x.shape[1] ** 0.5  # float32 still: half the time
        regression = LogisticRegression(solver="lbfgs", max_iter=max_iter, warm_start=True)
        scores = [regression.set_params(C=value).fit(x[rest], y[rest]).score(x[held], y[held]) for value in sorted(c)]
        best = sorted(c)[int(np.argmax(scores))]  # of equals the first, so the strongest penalty
        final = LogisticRegression(solver="lbfgs", max_iter=max_iter, C=best).fit(x, y)
        return float(final.score(x_test, y_test)), best

    # One BLAS thread a fit: the products are small, and two threads that wait for each other took ten times as long.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # bounded on purpose; accuracy is flat by then
        return joblib.Parallel(n_jobs=-1, prefer="threads")(
            joblib.delayed(one)(a.numpy(), b.numpy()) for a, b in zip(train, test, strict=True)
        )
