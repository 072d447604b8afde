"""Samplers and likelihoods against the bare network called as often, on the digits U-Net at batch 64."""

import jax
import jax.numpy as jnp

import score_jax as sj
from benchmarks import subjects
from benchmarks.timing import alternate, ratio
from score_jax import timesteps

SDE = sj.VP()
X = jax.random.normal(jax.random.key(0), subjects.DIGITS)


def noise(network, params, y=None):
    """The prediction of a network at time t, of x_t = x."""
    return lambda x, t: network.apply(params, x, jnp.broadcast_to(999 * t, x.shape[:1]), y)


def sampled(sampler, score_fn, steps: int):
    """Samples from x by so many scanned steps."""
    ts = timesteps.uniform(SDE, steps)
    return jax.jit(lambda x: sj.sample(jax.random.key(0), sampler(SDE, score_fn), x, ts))


def called(net, n: int, x=X):
    """A network called so often, each time on what it said before."""
    net = jax.jit(net)

    def run():
        h = x
        for _ in range(n):
            h = net(h, 0.5)
        return h

    return run


def corrected(sde, score_fn):
    return sj.chain(sj.reverse_diffusion(sde, score_fn), sj.annealed_langevin_corrector(sde, score_fn))


def loop(it: subjects.Subject, steps: int, rounds: int) -> dict[str, float]:
    """One evaluation a step, and two of predictor and corrector in a tenth as many."""
    net = noise(it.network, it.state.params)
    score_fn, few = sj.from_noise(SDE, net), steps // 10
    ddim, both = sampled(sj.ddim, score_fn, steps), sampled(corrected, score_fn, few)
    runs = {"ddim": lambda: ddim(X), "calls": called(net, steps)}
    times = alternate(runs | {"both": lambda: both(X), "few calls": called(net, 2 * few)}, rounds)
    return {
        "scanned step / network call": ratio(times, "ddim", "calls"),
        "predictor and corrector / two network calls": ratio(times, "both", "few calls"),
    }


def guidance(it: subjects.Subject, steps: int, rounds: int) -> dict[str, float]:
    """Classifier-free guidance against a network called once a step on twice the batch, and twice on the batch."""
    network, y = it.network.clone(num_classes=10), jnp.arange(len(X)) % 10
    params = subjects.random_params(network, X.shape, y)
    nets = noise(network, params, y), noise(network, params, jnp.full_like(y, 10))
    guided = sampled(sj.ddim, sj.classifier_free_guidance(*(sj.from_noise(SDE, net) for net in nets), scale=2.0), steps)
    double = noise(network, params, jnp.concatenate([y, y]))
    calls = {"double": called(double, steps, jnp.concatenate([X, X])), "calls": called(nets[0], 2 * steps)}
    times = alternate({"guided": lambda: guided(X)} | calls, rounds)
    return {
        "guided step / network call of twice the batch": ratio(times, "guided", "double"),
        "guided step / two network calls": ratio(times, "guided", "calls"),
    }


def likelihood(it: subjects.Subject, rounds: int) -> dict[str, float]:
    """An evaluation of `log_prob` against the bare Jacobian-vector product of the flow."""
    net = noise(it.network, it.state.params)
    # A random network makes a stiff equation; the smaller, the fewer evaluations.
    score_fn = sj.from_noise(SDE, lambda x, t: 0.01 * net(x, t))
    log_prob = jax.jit(lambda x: sj.log_prob(jax.random.key(0), SDE, score_fn, x, rtol=1e-4, atol=1e-4))
    evaluations = int(log_prob(X).num_evaluations)

    def product(x, t):
        # The sum keeps XLA from leaving out either.
        return sum(jax.jvp(lambda x: sj.probability_flow_drift(SDE, score_fn, x, t), (x,), (X,)))

    times = alternate({"log_prob": lambda: log_prob(X).log_prob, "products": called(product, evaluations)}, rounds)
    return {"evaluation of log_prob / product": ratio(times, "log_prob", "products"), "evaluations": evaluations}
