"""A2C without a reverse loss against Stable-Baselines3's, and RMSprop against TensorFlow's rule."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import SA2C_ATARI, SA2C_CONTINUOUS, checkpoint
from stable_baselines3 import A2C
from stable_baselines3.common.logger import configure
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.vec_env import DummyVecEnv

UPDATES, T, N = 3, 5, 2


def sb3_model(setting, space, learning_rate):
    """Stable-Baselines3's A2C for the spaces of an environment, which it need not step."""

    class Spaces(gym.Env):
        observation_space, action_space = space

        def reset(self, seed=None, options=None):
            return self.observation_space.sample(), {}

    policy, settings = "MlpPolicy", {"rms_prop_eps": 0.1}
    if setting.atari:
        policy, settings = "CnnPolicy", {"vf_coef": 0.25, "ent_coef": 0.01}
        settings["policy_kwargs"] = {
            "optimizer_class": RMSpropTFLike,
            "optimizer_kwargs": {"eps": 0.1},
        }
    envs = DummyVecEnv([Spaces] * N)
    model = A2C(policy, envs, n_steps=T, learning_rate=learning_rate, device="cpu", **settings)
    model.set_logger(configure(None, []))
    return model


def sb3_parameters(setting, policy):
    """Stable-Baselines3's parameters in the order of our agent's."""
    if setting.atari:
        extractor, first = policy.features_extractor, []
        modules = extractor.cnn, extractor.linear, policy.action_net, policy.value_net
    else:
        extractor, first = policy.mlp_extractor, [policy.log_std]
        modules = extractor.policy_net, policy.action_net, extractor.value_net, policy.value_net
    return first + [parameter for module in modules for parameter in module.parameters()]


@pytest.mark.parametrize("setting", [SA2C_CONTINUOUS, SA2C_ATARI], ids=str)
def test_without_reverse_loss_an_update_is_stable_baselines3s(setting, tmp_path, monkeypatch):
    """From the same weights and the same rollouts: three updates, so that RMSprop has a past."""
    flags = {
        "num_envs": N,
        "num_steps": T,
        "total_timesteps": UPDATES * T * N,
        "alpha": 1.0,
        "beta": 0.0,
    }
    flags |= {"rmsprop_eps": 0.1}  # so that it matters
    if setting.atari:  # in Pong no lives are lost, so that all actions are the agent's
        flags |= {"env_id": "Pong", "learning_rate": 0.1}
        space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), gym.spaces.Discrete(6)
    else:
        flags |= {"env_id": "Hopper-v4", "policy": "gaussian", "learning_rate": 0.1}
        space = gym.spaces.Box(-10, 10, (11,), np.float32), gym.spaces.Box(-1, 1, (3,), np.float32)
    recorded, original = [], setting.script.gradient_and_metrics

    def gradient_and_metrics(agent, args, obs, action, advantage, returns, *mask):
        assert all((m == 1).all() for m in mask)
        weights = [parameter.detach().clone() for parameter in agent.parameters()]
        recorded.append((weights, obs.clone(), action.clone(), advantage.clone(), returns.clone()))
        return original(agent, args, obs, action, advantage, returns, *mask)

    monkeypatch.setattr(setting.script, "gradient_and_metrics", gradient_and_metrics)
    _, folder = setting.run(tmp_path, **flags)
    recorded = recorded[-UPDATES:]  # a call before is on zeros, to compile

    model, after = sb3_model(setting, space, flags["learning_rate"]), checkpoint(folder)["agent"]
    before = dict(zip(after, recorded[0][0]))
    theirs = sb3_parameters(setting, model.policy)
    assert len(theirs) == len(before) == len(list(model.policy.parameters()))
    with torch.no_grad():
        for parameter, weights in zip(theirs, before.values()):
            parameter.copy_(weights)
    buffer = model.rollout_buffer
    for _, obs, action, advantage, returns in recorded:
        buffer.reset()
        batch = {
            "observations": obs,
            "actions": action,
            "advantages": advantage,
            "returns": returns,
        }
        for name, tensor in batch.items():
            array = getattr(buffer, name)
            array[...] = tensor.numpy().reshape(array.shape)
        buffer.full = True
        model.train()
    for parameter, (name, weights) in zip(theirs, after.items()):
        assert (weights - before[name]).abs().max() > 1e-4, name
        torch.testing.assert_close(weights, parameter.detach(), rtol=0, atol=1e-6)


def test_rmsprop_is_tensorflows():
    """ms = decay ms + (1 - decay) g^2, from ms = 1; var -= lr g / sqrt(ms + eps)."""
    rng = np.random.default_rng(0)
    variable, mean_square = rng.normal(size=50), np.ones(50)
    parameter = torch.tensor(variable, requires_grad=True)
    optimizer = SA2C_ATARI.script.RMSpropTF([parameter], lr=0.01, alpha=0.9, eps=1e-3)
    torchs = torch.optim.RMSprop(
        [other := parameter.detach().clone()], lr=0.01, alpha=0.9, eps=1e-3
    )
    for scale in (10.0, 1.0, 1e-3, 0.0, 1e-3):
        gradient = scale * rng.normal(size=50)
        mean_square = 0.9 * mean_square + 0.1 * gradient**2
        variable = variable - 0.01 * gradient / np.sqrt(mean_square + 1e-3)
        parameter.grad = other.grad = torch.tensor(gradient)
        optimizer.step()
        torchs.step()
        torch.testing.assert_close(parameter.detach(), torch.tensor(variable), rtol=1e-12, atol=0)
    assert (parameter - other).abs().max() > 0.01  # PyTorch's is another rule
