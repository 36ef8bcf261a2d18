"""The linear probe: multinomial logistic regression on frozen features.

N examples, D features, C classes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sslx.config import Count, Part, Positive
from sslx.evals import Evaluation, Subject, binomial_stderr

CURVATURE = 0.1  # p (1 - p) of a class, typically: the Hessian's share of the covariance


class Fit(NamedTuple):
    """weights_DC and bias_C at the end of L-BFGS, its iterations, and the gradient's greatest entry there."""

    weights_DC: jax.Array
    bias_C: jax.Array
    iterations: jax.Array
    gradient: jax.Array


def make(*, l2: tuple[Positive, ...] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4), select: Part = 0.2, tolerance: Positive = 1e-5,
         max_iterations: Count = 500) -> Evaluation:
    """Accuracy on `test` of a logistic regression fitted on `train`.

    Features are standardized by the training part. `l2` is chosen by accuracy on a share `select`
    of the training examples (the strongest of equals), then the fit is repeated on all of them.
    Returns probe/accuracy, probe/stderr (binomial), probe/l2, and probe/iterations only if L-BFGS
    stopped there with a gradient entry above `tolerance`.
    """
    penalties = sorted(l2, reverse=True)

    def evaluate(subject: Subject) -> dict[str, float]:
        (train_ND, train_N), (test_ND, test_N) = subject.features("train"), subject.features("test")
        n_classes = int(max(train_N.max(), test_N.max())) + 1
        mean_D, std_D = train_ND.mean(0), train_ND.std(0)
        varies_D = std_D > 1e-6 * np.abs(mean_D)  # a constant tells nothing
        x_ND, x_test_ND = (jnp.asarray(((split_ND - mean_D) / np.where(varies_D, std_D, 1))[:, varies_D])
                           for split_ND in (train_ND, test_ND))
        y_N = jnp.asarray(train_N)
        held_N = np.random.default_rng(0).permutation(len(train_N)) < round(select * len(train_N))

        principal = principal_axes(x_ND)

        def fit_from(start, penalty, used_N):
            weight_N = jnp.asarray(used_N / used_N.sum(), jnp.float32)
            return fit(x_ND, y_N, weight_N, penalty, *start, *principal, tolerance=tolerance,
                       max_iterations=max_iterations)

        best, best_accuracy = None, -1.0
        start = (jnp.zeros((x_ND.shape[1], n_classes)), jnp.zeros(n_classes))
        for penalty in penalties if len(penalties) > 1 else ():
            candidate = fit_from(start, penalty, ~held_N)
            start = candidate[:2]
            accuracy = float((predict(candidate, x_ND) == y_N)[held_N].mean())
            if accuracy > best_accuracy:
                best, best_accuracy = (penalty, start), accuracy
        penalty, start = best or (penalties[0], start)
        final = fit_from(start, penalty, np.ones(len(train_N), bool))
        accuracy = float(np.mean(np.asarray(predict(final, x_test_ND)) == test_N))
        metrics = {"probe/accuracy": accuracy, "probe/stderr": binomial_stderr(accuracy, len(test_N)),
                   "probe/l2": penalty}
        return metrics if final.gradient <= tolerance else metrics | {"probe/iterations": float(final.iterations)}

    return Evaluation(evaluate, {"train": 2, "test": 1})


def logistic_loss(weights_DC: jax.Array, bias_C: jax.Array, x_ND: jax.Array, y_N: jax.Array, weight_N: jax.Array,
                  l2: jax.Array | float) -> jax.Array:
    """sum_n w_n (-log softmax(x_n W + b)[y_n]) + l2 / 2 |W|^2, in nats."""
    logits_NC = jnp.matmul(x_ND, weights_DC, precision="highest") + bias_C
    nll_N = optax.softmax_cross_entropy_with_integer_labels(logits_NC, y_N)
    return weight_N @ nll_N + l2 / 2 * jnp.sum(weights_DC**2)


@jax.jit
def principal_axes(x_ND: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(E [D], U [D, D]) of the covariance U E U^T of standardized features."""
    return tuple(jnp.linalg.eigh(jnp.matmul(x_ND.T, x_ND, precision="highest") / len(x_ND)))


@jax.jit(static_argnames=("max_iterations",))
def fit(x_ND: jax.Array, y_N: jax.Array, weight_N: jax.Array, l2: jax.Array | float, weights_DC: jax.Array,
        bias_C: jax.Array, spread_D: jax.Array, axes_DD: jax.Array, *, tolerance: float, max_iterations: int) -> Fit:
    """Minimizes `logistic_loss` by L-BFGS from (weights, bias) until no gradient entry exceeds `tolerance`.

    It works on V with W = P V, P = U (CURVATURE E + l2)^(-1/2) of the covariance U E U^T (`spread_D`, `axes_DD`), in
    which the Hessian is near the identity: correlated features (raw pixels) converge in tens of iterations rather
    than thousands.
    """
    root_D = jnp.sqrt(CURVATURE * jnp.maximum(spread_D, 0) + l2)

    def loss(params):
        return logistic_loss(axes_DD @ (params[0] / root_D[:, None]), params[1], x_ND, y_N, weight_N, l2)

    def greatest(gradient):
        return optax.tree.norm(gradient, ord=np.inf)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry):
        params, state, _, i = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state, greatest(optax.tree.get(state, "grad")), i + 1

    def going(carry):
        _, _, gradient, i = carry
        return (gradient > tolerance) & (i < max_iterations)

    params = (root_D[:, None] * (axes_DD.T @ weights_DC), bias_C)
    first = greatest(jax.grad(loss)(params))
    carry = (params, solver.init(params), first, jnp.array(0))
    (v_DC, bias_C), _, gradient, iterations = jax.lax.while_loop(going, step, carry)
    return Fit(axes_DD @ (v_DC / root_D[:, None]), bias_C, iterations, gradient)


@jax.jit
def predict(fit: Fit, x_ND: jax.Array) -> jax.Array:
    """The likeliest class of each row, [N]."""
    return jnp.argmax(jnp.matmul(x_ND, fit.weights_DC, precision="highest") + fit.bias_C, -1)
