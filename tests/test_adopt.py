"""Published checkpoints as the start of a run, and out again."""

import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from test_experiment import get_config, tiny, untrained

from score_jax import adopt, experiment, pretrained
from score_jax.errors import UserError

DATA = pathlib.Path(__file__).parent / "data"


def small_vp():
    """The network of the small published files."""
    config = get_config("vp_cifar")
    config.network.update(features=8, multipliers=(1, 2), num_blocks=1, attention_at=(8,))
    config.data.image_size = 16
    return config


def opened(tmp_path, config, file):
    return experiment.Run(config, tmp_path, str(DATA / file))


@pytest.mark.parametrize("file", ["ddpmpp_vp.checkpoint", "torch_ddpmpp_vp.pth"])
def test_a_file_fills_the_network_of_the_config(tmp_path, file):
    """Without the data set, which only its shape is needed of."""
    run = opened(tmp_path, small_vp(), file)
    step, state = run.restore()
    published = json.loads(str(np.load(DATA / "ddpmpp_vp.npz")["config"]))
    expected = pretrained.load_score_sde(DATA / file, published)
    assert step == 0
    jax.tree.map(np.testing.assert_array_equal, state.ema, expected.params)
    assert type(run.sde) is type(expected.sde)
    with pytest.raises(UserError, match="not on disk"):
        run.dataset.read(np.arange(1))


def test_a_directory_says_what_the_network_is(tmp_path):
    config = get_config("ddpm_cifar")
    config.sampling.update(num_samples=2, num_steps=2)
    experiment.run(config, "sample", tmp_path, pretrained=str(DATA / "diffusers_ddpm"))
    assert np.load(tmp_path / "samples/step_0.npz")["arr_0"].shape == (2, 16, 16, 3)
    run = opened(tmp_path, config, "diffusers_ddpm")
    assert run.network == pretrained.load_diffusers(DATA / "diffusers_ddpm").network
    assert (run.config.conditioning, run.config.parameterization.name) == ("step", "from_noise")


def test_a_run_goes_into_diffusers(tmp_path):
    config = get_config("ddpm_digits")
    config.network.update(features=4)
    run = experiment.Run(config, untrained(config, tmp_path))
    experiment.run(config, "export", tmp_path)
    model = pretrained.load_diffusers(tmp_path / "diffusers")
    assert model.network == run.network
    jax.tree.map(np.testing.assert_array_equal, model.params, run.restore()[1].ema)


def test_files_of_the_ncsn_releases(tmp_path, monkeypatch):
    """A list of network, optimiser, counters and, of NCSNv2, the average, which is taken."""
    tensors = {n.removeprefix("params/"): v for n, v in np.load(DATA / "ncsnv2_original.npz").items() if "params/" in n}
    config = get_config("ncsnv2_cifar")
    model = pretrained.from_ncsn(tensors)
    config.num_levels = model.network.num_levels
    config.network.update(features=model.network.features, multipliers=model.network.multipliers)
    average = {n: 2 * v for n, v in tensors.items() if n != "sigmas"}
    content = [{f"module.{n}": v for n, v in tensors.items()}, {}, 3, 4, average]
    monkeypatch.setattr("score_jax.pytorch.read_torch", lambda path: content)
    (tmp_path / "v2.pth").touch()
    state = experiment.Run(config, tmp_path / "run", str(tmp_path / "v2.pth")).restore()[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b), state.ema, model.params)
    config.network.multipliers = (*model.network.multipliers, 2)
    with pytest.raises(UserError, match=r"with multipliers=\(.*\), the config names a NCSNv2 with \(.*, 2\)"):
        experiment.Run(config, tmp_path / "more", str(tmp_path / "v2.pth"))
    config.network.multipliers = model.network.multipliers
    config.num_levels = 7
    with pytest.raises(UserError, match="is of a NCSNv2 with num_levels=20, the config names a NCSNv2 with 7"):
        experiment.Run(config, tmp_path / "other", str(tmp_path / "v2.pth"))


def test_a_file_of_weights_needs_its_config(tmp_path):
    """It is as good as its directory; alone it says what is missing, and what is there."""
    file = DATA / "diffusers_ddpm/diffusion_pytorch_model.safetensors"
    assert (
        adopt.adopt(get_config("ddpm_cifar"), file).network
        == adopt.adopt(get_config("ddpm_cifar"), DATA / "diffusers_ddpm").network
    )
    shutil.copy(file, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"config.json is missing, which says .* holds a.safetensors$"):
        adopt.adopt(get_config("ddpm_cifar"), tmp_path / "a.safetensors")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe is neither a file nor a directory"):
        adopt.adopt(get_config("ddpm_cifar"), tmp_path / "pipe")
    with pytest.raises(UserError, match=r"--pretrained: there is no a{300}"):
        adopt.adopt(get_config("ddpm_cifar"), pathlib.Path("a" * 300))


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"--pretrained: there is no .*nothing"):
        opened(tmp_path / "0", small_vp(), "nothing")
    with pytest.raises(UserError, match=r"has shape .* where .* is expected"):
        opened(tmp_path / "1", get_config("vp_cifar"), "ddpmpp_vp.checkpoint").restore()
    with pytest.raises(UserError, match=r"no published file is of a UNet"):
        opened(tmp_path / "2", tiny(), "ddpmpp_vp.checkpoint").restore()
    with pytest.raises(UserError, match=r"on DDPM's chain, the config on VP: take ddpm_cifar"):
        opened(tmp_path / "3", tiny(), "diffusers_ddpm")
    with pytest.raises(UserError, match=r"for images of 3 channels, config.data has 1"):
        opened(tmp_path / "4", tiny("ddpm_digits"), "diffusers_ddpm")
    with pytest.raises(UserError, match=r"--mode=export writes .*'step', this has 'from_noise' and 'time'"):
        experiment.run(tiny(), "export", untrained(tiny(), tmp_path / "run"))
    shutil.copytree(DATA / "diffusers_ddpm", tmp_path / "model/unet")
    (tmp_path / "model/scheduler").mkdir()
    scheduler = {"beta_schedule": "squaredcos_cap_v2"}
    (tmp_path / "model/scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    with pytest.raises(UserError, match=r"a chain other than the default of DDPM"):
        experiment.Run(get_config("ddpm_cifar"), tmp_path, str(tmp_path / "model"))
