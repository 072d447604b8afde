"""What made samples or a table: said in captions, stored beside them, and in the names of files where it differs."""

import hashlib
import json
import math
from typing import Any

import jax

__all__ = ["caption", "count_calls", "of_editing", "of_likelihood", "of_parameters", "of_samples", "variant"]

Made = dict[str, Any]


def _named(section: dict[str, Any]) -> str:
    """What a part of a config names, with its arguments: `ddim(eta=0.5)`."""
    arguments = ", ".join(f"{k}={v}" for k, v in sorted(section.items()) if k != "name" and v not in ("", None))
    return section.get("name", "") + (f"({arguments})" if arguments else "")


def of_parameters(config: dict[str, Any], step: int, pretrained: str = "") -> Made:
    """The parameters of the network and the seed, as all that is made with them shares."""
    averaged = "averaged" if config.get("training", {}).get("ema_decay") else "raw"
    source = f"those of {pretrained}" if pretrained and not step else f"{averaged}, step {step}"
    return {"seed": config.get("seed"), "parameters": source}


def of_samples(config: dict[str, Any], step: int, pretrained: str = "", *, evaluations: int | None = None) -> Made:
    """What decides a sample, by its words in captions; the samples' number and how many are made at once do not.

    Args:
      config: of the run, resolved; a record of it may lack sections.
      step: of the checkpoint.
      pretrained: the file whose parameters are taken at step 0.
      evaluations: of the score, for one sample; None where they are not known.
    """
    sampling = json.loads(json.dumps(config.get("sampling", {})))  # Without tuples, as a record has it.
    made: Made = {name: _named(sampling.get(name, {})) for name in ("sampler", "corrector", "guidance")}
    made |= {"grid": sampling.get("grid"), "steps": sampling.get("num_steps"), "t_min": sampling.get("t_min")}
    made |= {
        "evaluations": evaluations,
        "step size": sampling.get("step_size"),
        "last step": sampling.get("denoise") and "denoising",
    }
    return {k: v for k, v in made.items() if v} | of_parameters(config, step, pretrained)


def of_editing(mode: str, config: dict[str, Any], step: int, pretrained: str = "") -> Made:
    """What decides an edited image."""
    editing = config["editing"]
    if mode == "interpolate":
        made = {name: config["evaluation"]["likelihood"][name] for name in ("solver", "rtol", "atol")}
        return made | {"temperature": editing["temperature"]} | of_parameters(config, step, pretrained)
    uses_mask = mode == "inpaint" or (mode == "restore" and editing["operator"]["name"] == "mask")
    made = {"mask": editing["mask"]} if uses_mask else {}
    if mode == "restore":
        made |= {name: _named(editing[name]) for name in ("operator", "method")}
        made |= {"noise_std": editing["noise_std"]}
    return made | of_samples(config, step, pretrained)


def of_likelihood(config: dict[str, Any], step: int, pretrained: str = "") -> Made:
    """What decides a table of likelihoods."""
    return config["evaluation"]["likelihood"] | of_parameters(config, step, pretrained)


def caption(made: Made) -> str:
    """One line for people."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in made.items())


def count_calls(jaxpr: Any, name: str) -> float:
    """How often a `jaxpr` calls the jitted function of that name; NaN where a loop of unknown length does."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.params.get("name") == name:
            total += 1
            continue
        values = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr"))
        inside = sum(
            count_calls(getattr(v, "jaxpr", v), name) for v in values if hasattr(getattr(v, "jaxpr", v), "eqns")
        )
        times = {"scan": equation.params.get("length", 1), "while": math.nan}.get(equation.primitive.name, 1)
        total += inside and inside * times
    return total


def variant(made: Made) -> str:
    """A part of a file's name that tells samples from others of the same step, `ddim_50_1f3a5c` say."""
    short = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:6]
    return f"{made.get('sampler', '').partition('(')[0]}_{made.get('steps')}_{short}"
