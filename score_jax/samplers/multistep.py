"""Multistep samplers for few evaluations: exponential Adams methods on the probability-flow ODE.

With the half log signal-to-noise ratio  l = log(alpha/sigma)  and  rho = sigma/alpha  the probability-flow ODE of
every process is linear but for the network's prediction, of the data, D = E[x_0 | x_t], or of the noise,
eps = -sigma score (Lu et al. 2022, "DPM-Solver++", Eq. 8; `deterministic`, Eq. 1):

    x_s / sigma_s = x_t / sigma_t + int_{l_t}^{l_s} exp(l) D(l) dl,         (1)
    x_s / alpha_s = x_t / alpha_t + int_{rho_t}^{rho_s} eps(rho) d rho.     (2)

A method of order k puts for D the polynomial in l, or for eps the one in rho, through its values at t and at the
k - 1 times before, and integrates: with u = l - l_s (or rho - rho_s), h = -u_t and Newton's divided differences
D[t], D[t, t'], D[t, t', t''],

    P(u) = D[t] + (u - u_t) D[t, t'] + (u - u_t) (u - u_t') D[t, t', t''] + ...,        (3)

which needs the moments of the weights,

    int_{-h}^0 a exp(a u) u^k du = -(-h)^k exp(-a h) - k/a int_{-h}^0 a exp(a u) u^(k-1) du,    (4)
    int_{-h}^0 u^k du = -(-h)^(k+1) / (k + 1).                              (5)

a is 1 for Eq. 1, and more for its SDE (`dpm_solver_pp`).  The published DPM-Solver++ of order 2 puts the polynomial's
value at -h/2 for all of it, so that its moments are

    (-h/2)^k int_{-h}^0 a exp(a u) du.                                      (6)

The first steps have fewer values.  Where a step spans much of l, as the last one to almost no noise does, the
polynomial extrapolates far beyond its values: the last step is of order 1, x_s close to E[x_0 | x_t].

Once D is known at t, the step that led there can be taken again with a polynomial through t, too, at no further
evaluation: the corrector of UniPC (Zhao et al. 2023, Eq. 9), which adds one to the order.  What it changes is added
to the state, wherever that has been moved in the meantime.  After moves of a Langevin corrector (`base.chain`) the
polynomial is through values off its path, and the law's error is of order 1.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from score_jax.batches import call_score
from score_jax.parameterization import tweedie
from score_jax.samplers.base import Sampler, State, root
from score_jax.sde import SDE, ScoreFn, probability_flow_drift

__all__ = ["adams_bashforth", "deis", "dpm_solver_pp", "sde_dpm_solver_pp", "unipc"]

# `predict(x, t)`, the variable that is a polynomial; `coordinate(t)`, in which it is one; and
# `advance(key, x, t, s, u, integrate)`, the step, with `integrate(moments)` the integral of the polynomial
# with a weight whose moments over [u, 0] are given.
Integrate = Callable[[Sequence[Array]], Array]
Advance = Callable[[Array, Array, Array, Array, Array, Integrate], Array]


def dpm_solver_pp(
    sde: SDE,
    score_fn: ScoreFn,
    *,
    order: int = 2,
    eta: float = 0.0,
    corrector: bool = False,
    lower_order_final: bool = True,
    solver_type: str = "heun",
) -> Sampler:
    """DPM-Solver++, multistep (Lu et al. 2022, Algorithm 2): Eq. 1, one evaluation a step.

    With eta > 0 it follows the SDE whose noise is eta times that of the reverse SDE, so that with a = 1 + eta^2

        x_s = exp(-eta^2 h) x_t sigma_s / sigma_t + alpha_s a int exp(a u) D du + sigma_s sqrt(1 - exp(-2 eta^2 h)) z.

    Args:
      sde: the process.
      score_fn: `score_fn(x, t)`.
      order: of convergence, 1 to 3; 1 is DDIM.
      eta: 0 for the probability-flow ODE, 1 for the reverse SDE (SDE-DPM-Solver++); k-diffusion's `eta` is eta^2.
      corrector: take the last step again once its end is evaluated, one order higher (UniPC).
      lower_order_final: take the step that arrives at t_min with order 1.
      solver_type: `heun` integrates the polynomial exactly; `midpoint` takes its value in the middle of the step for
        all of it, which is the published Algorithm 2 (Eq. 6). Both names are diffusers' and k-diffusion's, and both
        methods of order 2. In few steps of the SDE `midpoint` erred by a third of `heun` with an exact score; of the
        ODE `heun` erred as much or less (`benchmarks.solvers`).

    Raises:
      ValueError: for another order, solver type, or a negative `eta`, for a corrector of random steps, and for
        `midpoint` with order 3 or a corrector.
    """
    if solver_type not in ("heun", "midpoint"):
        raise ValueError(f"solver_type must be 'heun' or 'midpoint', got {solver_type!r}")
    if solver_type == "midpoint" and (order > 2 or corrector):
        raise ValueError("solver_type 'midpoint' is of order 2 at most and has no corrector: take 'heun'")
    if eta < 0 or (eta and corrector):
        raise ValueError(f"dpm_solver_pp needs eta >= 0, and 0 with a corrector, got {eta}")
    rate = 1 + eta**2

    def half_log_snr(t: Array) -> Array:
        return 0.5 * sde.log_snr(t)

    def advance(key: Array, x: Array, t: Array, s: Array, u: Array, integrate: Integrate) -> Array:
        moments = [-jnp.expm1(rate * u)]  # Eq. 4.
        for k in (1, 2, 3):
            exact = -(u**k) * jnp.exp(rate * u) - k / rate * moments[-1]
            moments.append(exact if solver_type == "heun" else (0.5 * u) ** k * moments[0])  # Eq. 6.
        x = sde.sigma(s) / sde.sigma(t) * jnp.exp((rate - 1) * u) * x + sde.alpha(s) * integrate(moments)
        if eta:
            spread = sde.sigma(s) * root(-jnp.expm1(2 * (rate - 1) * u))
            x = x + spread * jax.random.normal(key, x.shape, x.dtype)
        return x

    def predict(x: Array, t: Array) -> Array:
        return tweedie(sde, score_fn, x, t)

    return _adams(sde, predict, half_log_snr, advance, order, corrector, lower_order_final)


def unipc(sde: SDE, score_fn: ScoreFn, *, order: int = 2, lower_order_final: bool = True) -> Sampler:
    """UniPC in data prediction (Zhao et al. 2023): `dpm_solver_pp` with the corrector, of order `order` + 1.

    The weights solve the equations of the order exactly, and so do not depend on B(h).
    The published code fixes at 1/2 the weight of the predictor of order 2 and that of the corrector of order 1.
    """
    return dpm_solver_pp(sde, score_fn, order=order, corrector=True, lower_order_final=lower_order_final)


def sde_dpm_solver_pp(
    sde: SDE, score_fn: ScoreFn, *, order: int = 2, lower_order_final: bool = True, solver_type: str = "heun"
) -> Sampler:
    """SDE-DPM-Solver++ (Lu et al. 2022, Appendix A): `dpm_solver_pp` with the noise of the reverse SDE.

    The noise makes up for some of the network's errors.
    """
    return dpm_solver_pp(
        sde, score_fn, order=order, eta=1.0, lower_order_final=lower_order_final, solver_type=solver_type
    )


def deis(
    sde: SDE, score_fn: ScoreFn, *, order: int = 3, corrector: bool = False, lower_order_final: bool = True
) -> Sampler:
    """DEIS (Zhang & Chen 2023, rho-AB): Eq. 2, one evaluation a step.

    Args:
      sde: the process.
      score_fn: `score_fn(x, t)`.
      order: of convergence, 1 to 3; 1 is DDIM.
      corrector: as in `dpm_solver_pp`, and so the rest.
    """

    def rho(t: Array) -> Array:
        return jnp.exp(-0.5 * sde.log_snr(t))

    def advance(key: Array, x: Array, t: Array, s: Array, u: Array, integrate: Integrate) -> Array:
        return sde.alpha(s) * (x / sde.alpha(t) + integrate(_moments(u)))

    def predict(x: Array, t: Array) -> Array:
        return -sde.sigma(t) * call_score(score_fn, x, t)

    return _adams(sde, predict, rho, advance, order, corrector, lower_order_final)


def adams_bashforth(
    sde: SDE, score_fn: ScoreFn, *, order: int = 2, corrector: bool = False, lower_order_final: bool = True
) -> Sampler:
    """Adams-Bashforth on the probability-flow ODE in time, for any grid, one evaluation a step.

    x_s = x_t + int f x - g^2/2 score dt,  with the integrand a polynomial in t: no part of it is exact, which makes
    it the plain method that the exponential ones are compared with.

    Args:
      sde: the process.
      score_fn: `score_fn(x, t)`.
      order: of convergence, 1 to 3; 1 is Euler's method.
      corrector: as in `dpm_solver_pp` (the Adams-Moulton method), and so the rest.
    """

    def advance(key: Array, x: Array, t: Array, s: Array, u: Array, integrate: Integrate) -> Array:
        return x + integrate(_moments(u))

    def predict(x: Array, t: Array) -> Array:
        return probability_flow_drift(sde, score_fn, x, t)

    return _adams(sde, predict, lambda t: t, advance, order, corrector, lower_order_final)


def _moments(u: Array) -> list[Array]:
    """Eq. 5."""
    return [-(u ** (k + 1)) / (k + 1) for k in range(4)]


def _through(nodes: Sequence[Array], values: Sequence[Array], number: Array, end: Array) -> Integrate:
    """The integral up to `end` of the polynomial through the first `number` values (Eq. 3)."""
    u = [node - end for node in nodes]

    def integrate(moments: Sequence[Array]) -> Array:
        # Newton's form: each difference times the integral of (u - u_0) ... (u - u_(k-1)), by its coefficients.
        total, differences, coefficients = jnp.zeros_like(values[0]), list(values), [jnp.ones_like(end)]
        zero = jnp.zeros_like(end)
        for k, node in enumerate(u):
            weight = sum(c * moment for c, moment in zip(coefficients, moments, strict=False))
            total += jnp.where(number > k, weight, 0.0) * differences[0]
            pairs = zip(differences, differences[1:], u, u[k + 1 :], strict=False)
            differences = [(a - b) / (first - last) for a, b, first, last in pairs]
            coefficients = [low - node * c for low, c in zip([zero, *coefficients], [*coefficients, zero], strict=True)]
        return total

    return integrate


def _adams(
    sde: SDE,
    predict: Callable[[Array, Array], Array],
    coordinate: Callable[[Array], Array],
    advance: Advance,
    order: int,
    corrector: bool,
    lower_order_final: bool,
) -> Sampler:
    """Eq. 3 for any prediction, coordinate and weight, each sampler's own.

    The state is the step before, its x and time, and where it arrived; the coordinates and predictions up to it; and
    how many there are.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"a multistep sampler has order 1, 2 or 3, got {order}")
    kept = order if corrector else order - 1

    def init(x: Array, t: Array) -> State:
        # Nodes of no step, far below so that exp(u) of them, not used yet, is finite and so is its gradient.
        nodes = [coordinate(t) - 1e4 * (k + 1) for k in range(kept)]
        return x, t, x, nodes, [jnp.zeros_like(x)] * kept, jnp.zeros((), jnp.int32)

    def step(key: Array, start: Array, t: Array, s: Array, state: State) -> tuple[Array, State]:
        x = start
        before, t_before, arrived, nodes, values, count = state
        here, end = coordinate(t), coordinate(s)
        nodes, values = [here, *nodes], [predict(x, t), *values]
        if corrector:
            integrate = _through(nodes[: order + 1], values[: order + 1], count + 1, here)
            again = advance(key, before, t_before, t, nodes[1] - here, integrate)
            # What moved x since it arrived, a corrector or an observation, is kept.
            x = jnp.where(count > 0, again + (x - arrived), x)
        number = jnp.minimum(count + 1, order)
        if lower_order_final:
            number = jnp.where(s <= sde.t_min, 1, number)
        arrived = advance(key, x, t, s, here - end, _through(nodes[:order], values[:order], number, end))
        new = arrived, (x, t, arrived, nodes[:kept], values[:kept], count + 1)
        # A step of no length leaves the history alone: no two of its times are one.
        return jax.tree.map(lambda a, b: jnp.where(s == t, a, b), (start, state), new)

    return Sampler(init, step)
