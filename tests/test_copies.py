"""What a copy of a control script changes works or stops it: optimizers, networks, metrics."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import (
    SA2C_CONTINUOUS,
    SETTINGS,
    SPPO_ATARI,
    SPPO_CONTINUOUS,
    Signals,
    checkpoint,
    weights,
)
from torch import nn
from torch.distributions import Independent, Normal

SHORT = {"total_timesteps": 64, "num_envs": 2, "num_steps": 32}  # one rollout


@pytest.fixture(params=SETTINGS, ids=str)
def setting(request):
    return request.param


@pytest.fixture(params=[SPPO_CONTINUOUS, SA2C_CONTINUOUS], ids=str)
def continuous(request):
    return request.param


def copied(setting, folder, *edits, change=lambda agent: None):
    """The setting of a copy with edits, pairs of old and new text, whose agents are changed. It has
    a list more, of the agents' first weights."""
    text = Path(setting.script.__file__).read_text()
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / f"{setting}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.AtariVectorEnv = Signals
    script.made = []

    class Agent(script.Agent):
        def __init__(self, *options):
            super().__init__(*options)
            change(self)
            script.made.append({name: w.clone() for name, w in self.state_dict().items()})

    script.Agent = Agent
    return replace(setting, script=script)


def unmoved(copy, folder):
    """Names of the tensors that a run has left as they were."""
    tensors = safetensors.torch.load_file(folder / "agent.safetensors")
    return {
        name for name, first in copy.script.made[0].items() if torch.equal(tensors[name], first)
    }


# ---- Optimizers

CHECK = "check_copy(agent, parameters, optimizer)\n"
LARGE = "[p for p in agent.parameters() if p.ndim != 2 or len(p) >= 512]"  # 512: slow in Muon
SMALL = "[p for p in agent.parameters() if p.ndim == 2 and len(p) < 512]"
GROUPS = "first, *rest = agent.parameters(); optimizer = torch.optim.AdamW("
GROUPS += "[{'params': [first], 'lr': 0.0}, {'params': rest}]); "
MUON = f"muon = torch.optim.Muon({SMALL}); optimizer = torch.optim.SGD({LARGE}, lr=0.1); "
STEP = "parameters.grad.copy_(gradient)"


def test_an_optimizer_of_the_parameters_does_what_one_of_the_vector_does(setting, tmp_path):
    copy = copied(setting, tmp_path, ("[parameters]", "agent.parameters()"))
    _, folder = copy.run(tmp_path / "parameters", **SHORT)
    _, of_vector = copied(setting, tmp_path).run(tmp_path / "vector", **SHORT)
    torch.testing.assert_close(weights(folder), weights(of_vector), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["groups", "Muon"])
def test_groups_and_a_second_optimizer_train_all(setting, tmp_path, kind):
    """But for a group whose rate is 0."""
    edits = [(CHECK, GROUPS + CHECK)]
    if kind == "Muon":
        edits = [(CHECK, f"{MUON}check_copy(agent, parameters, optimizer, muon)\n")]
        edits.append((STEP, f"{STEP}; muon.step()"))
    copy = copied(setting, tmp_path, *edits)
    constant = {"anneal_lr": False} if setting is SPPO_ATARI else {}
    _, folder = copy.run(tmp_path, **SHORT, **constant)
    first = next(name for name, _ in copy.script.made[0].items())
    assert unmoved(copy, folder) == ({first} if kind == "groups" else set())


def test_a_run_stops_that_leaves_out_parameters_or_their_gradients(setting, tmp_path):
    copy = copied(setting, tmp_path, ("[parameters]", "agent.actor.parameters()"))
    with pytest.raises(SystemExit) as stop:
        copy.run(tmp_path, **SHORT)
    others = [name for name in copy.script.made[0] if not name.startswith("actor")]
    assert stop.value.code == f"error: the optimizer leaves out {', '.join(others)}"
    for zero_grad in (f"optimizer.zero_grad(); {STEP}", f"{STEP}; optimizer.zero_grad()"):
        edits = [("[parameters]", "agent.parameters()"), (STEP, zero_grad)]
        with pytest.raises(SystemExit, match="leave out zero_grad()"):
            copied(setting, tmp_path, *edits).run(tmp_path / zero_grad[:4], **SHORT)


# ---- Networks


def body(agent):
    """A network of the agent, of several layers, and its first layer with parameters."""
    return (agent.trunk, agent.conv) if hasattr(agent, "trunk") else (agent.critic, agent.actor[0])


def test_frozen_and_unused_parameters_are_left_out(setting, tmp_path):
    def change(agent):
        agent.unused = nn.Linear(3, 2)
        body(agent)[1].requires_grad_(False)

    copy = copied(setting, tmp_path, change=change)
    _, folder = copy.run(tmp_path, **SHORT)
    frozen = "conv" if setting.atari else "actor.0"
    names = {f"{module}.{kind}" for module in (frozen, "unused") for kind in ("weight", "bias")}
    assert unmoved(copy, folder) == names


@pytest.mark.parametrize("kind", [nn.Dropout, nn.AlphaDropout, nn.BatchNorm1d, nn.BatchNorm2d])
def test_layers_that_differ_from_pass_to_pass_are_refused(setting, tmp_path, kind):
    copy = copied(setting, tmp_path, change=lambda agent: body(agent)[0].append(kind(1)))
    with pytest.raises(SystemExit, match=r"error: (trunk|critic)\.\d+ is \w+\(.* pass to pass"):
        copy.run(tmp_path, **SHORT)


def flatten(agent):
    agent.actor.insert(0, nn.Flatten())
    agent.critic.insert(0, nn.Flatten())


def convolution(agent):
    first = [nn.Unflatten(1, (1, 11)), nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Flatten()]
    agent.actor = nn.Sequential(*first, nn.Linear(36, 11))


def twin_critic(agent):
    one, other = agent.critic, nn.Sequential(nn.Linear(11, 8), nn.Tanh(), nn.Linear(8, 1))
    agent.critic = nn.ModuleList([one, other])
    agent.critic.forward = lambda obs: torch.minimum(one(obs), other(obs))


def state_dependent(agent):
    """A Gaussian policy whose network gives standard deviations, too."""

    def policy(obs):
        mean, log_std = agent.actor(obs).chunk(2, dim=-1)
        return Independent(Normal(mean, log_std.exp()), 1)

    @torch.no_grad()
    def act(obs, exploration=0.0):
        mean, log_std = agent.actor(torch.from_numpy(obs)).chunk(2, dim=-1)
        return (mean + log_std.exp() * exploration).numpy()

    agent.gaussian, agent.low, agent.high, agent.output_shape = True, -1, 1, (1,)
    agent.actor[-1] = nn.Linear(64, 2)
    agent.log_std = torch.zeros(1)
    agent.policy, agent.actor_fn = policy, lambda: act


@pytest.mark.parametrize("change", [flatten, convolution, twin_critic, state_dependent])
def test_a_network_gets_flat_batches(continuous, tmp_path, change):
    """The pendulum's observations have eleven dimensions."""

    def check(network, inputs):
        assert inputs[0].shape[1:] == (11,)

    def changed(agent):
        change(agent)
        agent.actor.register_forward_pre_hook(check)
        agent.critic.register_forward_pre_hook(check)

    copy = copied(continuous, tmp_path, change=changed)
    _, folder = copy.run(tmp_path, **SHORT)
    assert unmoved(copy, folder) == set()


BROADCAST = [lambda v: v.mean(), lambda v: torch.stack([v, v], 1), lambda v: v + v[:, None]]


@pytest.mark.parametrize("shape", BROADCAST, ids=["one for all", "two each", "a square"])
def test_values_that_would_broadcast_stop_a_run_and_a_column_does_not(setting, tmp_path, shape):
    function, value = ("forward", 1) if setting.atari else ("value", ...)

    def reshaped(shape):
        def change(agent):
            original = getattr(agent, function)

            def forward(obs):
                if setting.atari:
                    logits, value = original(obs)
                    return logits, shape(value)
                return shape(original(obs))

            setattr(agent, function, forward)

        return copied(setting, tmp_path, change=change)

    with pytest.raises(RuntimeError, match="shape|size"):
        reshaped(shape).run(tmp_path / "wrong", **SHORT)
    if not setting.atari:
        _, folder = reshaped(lambda value: value[:, None]).run(tmp_path / "column", **SHORT)
        _, plain = copied(setting, tmp_path).run(tmp_path / "plain", **SHORT)
        assert torch.equal(weights(folder), weights(plain))


@pytest.mark.parametrize("shape", [(5, 3), (18, 1), (6, 3, 1), (6, 1), (6,)])
def test_advantages_need_a_value_of_each_step_and_one_more(setting, shape):
    others = np.zeros((4, 5, 3))
    arrays = [others[0], np.zeros(shape), others[1], others[2] > 0, others[3] > 0]
    with pytest.raises(ValueError, match=r"value must be \(T \+ 1, N\), not "):
        setting.script.compute_gae(*arrays, 0.9, 0.9)


# ---- Metrics


def test_a_metric_may_be_a_number_of_any_kind(setting, tmp_path):
    """In an evaluation, or in the log; the run finishes, and what it keeps can be loaded."""
    evaluated = ("= lengths.mean()\n", "= lengths.mean(); evaluation['a'] = scores.min()\n")
    logged = ("= 1 - unexplained\n", "= 1 - unexplained; scalars['b'] = torch.tensor(2.0)\n")
    summary, folder = copied(setting, tmp_path, evaluated, logged).run(tmp_path, **SHORT)
    assert (summary["a"], summary["b"], summary["step"]) == (summary["return_mean"], 2, 64)
    (row,) = checkpoint(folder)["evaluations"]
    assert {type(number) for name, number in row.items() if name != "step"} == {float}
