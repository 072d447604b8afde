"""A call of every pure function of the core, by module and name: `(key, x) -> arrays`, x `[n, 2]`."""

import jax
import jax.numpy as jnp

import score_jax as sj
from score_jax import losses, mcmc, operators, samplers, timesteps
from score_jax.ode import ode_solve
from score_jax.replacement import inpainting

SDE = sj.VP(t_min=1e-2)
MIXTURE = sj.GaussianMixture(
    [0.7, 0.3], [[1.5, 0.5], [-1.5, -1.0]], [[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]]]
)
SCORE = MIXTURE.score_fn(SDE)
TS = timesteps.quadratic(SDE, 3)
SIGMAS = jnp.array([1.0, 0.1])
T = 0.3


def fn(x):
    return MIXTURE.score(x)


def by_sigma(x, sigma):
    return -x / (1 + sj.sde.expand(sigma, x) ** 2)


def energy(x):
    return jnp.sum(x**2, axis=-1) / 2


def likelihood_of_class(x, t):
    return -jnp.sum(x, axis=1)


def first(x):
    return x[:, :1]


def image(x):
    return x.reshape(-1, 1, 1, 2) * jnp.ones((1, 4, 4, 1))


def color_score(x, t):
    return -x


def bits(key, x):
    images = jnp.clip(image(x) * 40 + 128, 0, 255).astype(jnp.uint8)
    return sj.bits_per_dim(key, SDE, color_score, images, centered=True, dequantized=True, rtol=1e-2, atol=1e-2)


def adapted(name):
    return lambda key, x: getattr(sj, name)(SDE, lambda x, t: 0.5 * x)(x, T)


def sampled(make, **options):
    return lambda key, x: sj.sample(key, make(SDE, SCORE, **options), x, TS)


PREDICTORS = set(samplers.__all__) - {"Sampler", "chain", "sample"}
PREDICTORS -= {"annealed_langevin", "inpaint_langevin", "unadjusted_langevin"}
CHAINS = {"num_samples": 4, "num_warmup": 8}

CASES = {
    "sde": {
        "expand": lambda key, x: sj.sde.expand(x[:, 0], x),
        "perturb": lambda key, x: sj.perturb(SDE, x, x[::-1], T),
        "prior_log_prob": lambda key, x: sj.prior_log_prob(SDE, x),
        "probability_flow_drift": lambda key, x: sj.probability_flow_drift(SDE, SCORE, x, T),
        "reverse_drift": lambda key, x: sj.reverse_drift(SDE, SCORE, x, T),
        "sample_prior": lambda key, x: sj.sample_prior(key, SDE, x.shape),
    },
    "parameterization": {
        **{n: adapted(n) for n in ("from_denoiser", "from_flow", "from_noise", "from_score", "from_velocity")},
        "preconditioned": adapted("preconditioned"),
        "from_energy": lambda key, x: sj.from_energy(energy)(x),
        "tweedie": lambda key, x: sj.tweedie(SDE, SCORE, x, T),
        "tweedie_covariance": lambda key, x: sj.tweedie_covariance(SDE, SCORE, x, T, x[::-1]),
    },
    "divergence": {
        "exact_divergence": lambda key, x: sj.exact_divergence(fn, x),
        "hutch_pp_divergence": lambda key, x: sj.hutch_pp_divergence(key, fn, x),
        "hutchinson_divergence": lambda key, x: sj.hutchinson_divergence(key, fn, x),
    },
    "losses": {
        "cross_entropy": lambda key, x: losses.cross_entropy(key, SDE, likelihood_of_class, x, T),
        "denoising_score_matching": lambda key, x: sj.denoising_score_matching(key, SDE, SCORE, x, T),
        "edm_weighting": lambda key, x: losses.edm_weighting(SDE, T + 0 * x[:, 0]),
        "exact_score_matching": lambda key, x: sj.exact_score_matching(fn, x),
        "finite_difference_score_matching": lambda key, x: sj.finite_difference_score_matching(key, fn, x),
        "likelihood_weighting": lambda key, x: losses.likelihood_weighting(SDE, T + 0 * x[:, 0]),
        "ncsn_score_matching": lambda key, x: sj.ncsn_score_matching(key, by_sigma, x, SIGMAS),
        "perturbed_sliced_score_matching": lambda key, x: sj.perturbed_sliced_score_matching(key, SDE, SCORE, x, T),
        "sliced_score_matching": lambda key, x: sj.sliced_score_matching(key, fn, x),
        "variance_weighting": lambda key, x: losses.variance_weighting(SDE, T + 0 * x[:, 0]),
        "vincent_score_matching": lambda key, x: sj.vincent_score_matching(key, fn, x, sigma=0.1),
    },
    "distillation": {
        "consistency_distillation": lambda key, x: sj.consistency_distillation(key, SDE, SCORE, color_score, x, TS),
        "consistency_training": lambda key, x: sj.consistency_training(key, SDE, SCORE, x, TS),
        "progressive_distillation": lambda key, x: sj.progressive_distillation(key, SDE, SCORE, color_score, x, TS[:3]),
    },
    "timesteps": {
        "curvature": lambda key, x: timesteps.curvature(SDE, SCORE, x, 4, num_points=10),
        "draw_importance": lambda key, x: timesteps.draw_importance(key, SDE, len(x)),
        "draw_levels": lambda key, x: timesteps.draw_levels(key, SDE, len(x), num_levels=10),
        "draw_lognormal": lambda key, x: timesteps.draw_lognormal(key, SDE, len(x)),
        "draw_steps": lambda key, x: timesteps.draw_steps(key, sj.DDPM(), len(x)),
        "draw_stratified": lambda key, x: timesteps.draw_stratified(key, SDE, len(x)),
        "draw_uniform": lambda key, x: timesteps.draw_uniform(key, SDE, len(x)),
        "level_of_time": lambda key, x: timesteps.level_of_time(sj.VE(), jax.nn.sigmoid(x[:, 0]), 10),
        "time_of_log_snr": lambda key, x: timesteps.time_of_log_snr(SDE, x[:, 0]),
        **{
            n: lambda key, x, n=n: x[0, 0] * getattr(timesteps, n)(SDE, 4)
            for n in ("karras", "ladder", "log_snr", "quadratic", "uniform")
        },
    },
    "samplers": {
        **{name: sampled(getattr(samplers, name)) for name in sorted(PREDICTORS)},
        "picard": sampled(samplers.picard, num_points=2),
        "adaptive_sde": sampled(samplers.adaptive_sde, rtol=0.2, atol=0.2),
        "chain": lambda key, x: sj.sample(
            key, sj.chain(sj.euler(SDE, SCORE), sj.langevin_corrector(SDE, SCORE)), x, TS, trajectory=True
        ),
        "annealed_langevin": lambda key, x: sj.annealed_langevin(key, by_sigma, x, SIGMAS, step_size=1e-2, num_steps=2),
        "inpaint_langevin": lambda key, x: sj.inpaint_langevin(
            key, by_sigma, x, SIGMAS, observed=x, mask=jnp.array([[True, False]]), step_size=1e-2, num_steps=2
        ),
        "unadjusted_langevin": lambda key, x: sj.unadjusted_langevin(key, fn, x, step_size=1e-2, num_steps=2),
    },
    "ode": {
        "ode_encode": lambda key, x: sj.ode_encode(SDE, SCORE, x, rtol=1e-2, atol=1e-2),
        "ode_sample": lambda key, x: sj.ode_sample(SDE, SCORE, x, rtol=1e-2, atol=1e-2),
        "ode_solve": lambda key, x: ode_solve(SDE, SCORE, x, 0.5, 0.2, rtol=1e-2, atol=1e-2),
        "spherical": lambda key, x: sj.spherical(x, x[::-1], 0.3),
    },
    "likelihood": {
        "bits_per_dim": bits,
        "chain_elbo": lambda key, x: sj.chain_elbo(key, SDE, SCORE, x, TS),
        "elbo": lambda key, x: sj.elbo(key, SDE, SCORE, x),
        "log_prob": lambda key, x: sj.log_prob(key, SDE, SCORE, x, rtol=1e-2, atol=1e-2),
        "place_in_cells": lambda key, x: sj.likelihood.place_in_cells(
            image(x).astype(jnp.uint8), 0.5, centered=True, dequantized=True
        )[0],
    },
    "guidance": {
        "autoguidance": lambda key, x: sj.autoguidance(SCORE, color_score, scale=1.5)(x, T),
        "classifier_free_guidance": lambda key, x: sj.classifier_free_guidance(SCORE, color_score, scale=1.5)(x, T),
        "classifier_guidance": lambda key, x: sj.classifier_guidance(SCORE, likelihood_of_class, scale=1.5)(x, T),
        "dynamic_thresholding": lambda key, x: sj.dynamic_thresholding(SDE, SCORE)(x, T),
        "mixture_of_densities": lambda key, x: sj.mixture_of_densities(
            [SCORE, color_score], [likelihood_of_class, likelihood_of_class]
        )(x, T),
        "product_of_densities": lambda key, x: sj.product_of_densities([SCORE, color_score])(x, T),
    },
    "inverse": {
        "dps_steps": lambda key, x: sj.sample(
            key, sj.dps_steps(SDE, SCORE, sj.ancestral(SDE, SCORE), first(x), first, step_size=0.5), x, TS
        ),
        **{
            n: lambda key, x, n=n: getattr(sj, n)(SDE, SCORE, first(x), first, noise_std=0.5)(x, T)
            for n in ("dps", "mmps", "pigdm")
        },
    },
    "replacement": {
        "colorize": lambda key, x: sj.colorize(
            key,
            SDE,
            color_score,
            sj.ancestral(SDE, color_score),
            image(x).repeat(2, -1)[..., :3],
            TS,
            image(x)[..., :1],
        ),
        "inpaint": lambda key, x: sj.inpaint(
            key, SDE, SCORE, sj.ancestral(SDE, SCORE), x, TS, x[::-1], jnp.array([[True, False]])
        ),
        "inpainting": lambda key, x: sj.sample(
            key,
            inpainting(SDE, sj.euler(SDE, SCORE), x[::-1], jnp.array([[True, False]]), num_resamples=2),
            x,
            TS,
        ),
    },
    "smc": {"twisted_smc": lambda key, x: sj.twisted_smc(key, SDE, SCORE, first(x)[0], first, x, TS, noise_std=0.5)},
    "operators": {
        "blur": lambda key, x: operators.blur()(image(x)),
        "decolorize": lambda key, x: operators.decolorize()(image(x)),
        "downsample": lambda key, x: operators.downsample()(image(x)),
        "mask": lambda key, x: operators.mask(jnp.array([[True, False]]))(x),
    },
    "mcmc": {
        "annealed_importance_sampling": lambda key, x: mcmc.annealed_importance_sampling(
            key, energy, x.shape, jnp.linspace(0, 1, 4)
        ),
        "hmc": lambda key, x: mcmc.hmc(key, energy, x, num_integration_steps=2, **CHAINS),
        "mala": lambda key, x: mcmc.mala(key, energy, x, **CHAINS),
        "nuts": lambda key, x: mcmc.nuts(key, energy, x, **CHAINS),
    },
}
