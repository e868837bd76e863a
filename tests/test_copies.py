"""What a copy of a control script changes works, or stops it: optimizers, networks, metrics."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import SA2C_CONTINUOUS, SETTINGS, SPPO_CONTINUOUS, Signals, checkpoint
from torch import nn
from torch.distributions import Independent, Normal

CONTINUOUS = [SPPO_CONTINUOUS, SA2C_CONTINUOUS]
SHORT = {"total_timesteps": 64, "num_envs": 2, "num_steps": 32}  # one rollout


def run_copy(setting, folder, edits=(), change=lambda agent: None):
    """Runs a copy with edits, pairs of old and new text, whose agents are changed. Returns the
    names of the tensors that have not moved, and the folder."""
    text = Path(setting.script.__file__).read_text()
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    folder.mkdir()
    path = folder / f"{setting}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.AtariVectorEnv = Signals
    first = {}

    class Agent(script.Agent):
        def __init__(self, *options):
            super().__init__(*options)
            change(self)
            first.update({name: tensor.clone() for name, tensor in self.state_dict().items()})

    script.Agent = Agent
    constant = {"anneal_lr": False} if setting.atari and setting.ppo else {}
    _, folder = replace(setting, script=script).run(folder, **SHORT, **constant)
    last = safetensors.torch.load_file(folder / "agent.safetensors")
    return {name for name in first if torch.equal(first[name], last[name])}, folder


# ---- Optimizers

CHECK, STEP = "check_copy(agent, parameters, optimizer)\n", "parameters.grad.copy_(gradient)"
ALL, HALF = (("[parameters]", f"agent.{of}()") for of in ("parameters", "actor.parameters"))
# Muon is slow on matrices of 512 rows
SMALL, OTHERS = (
    f"[p for p in agent.parameters() if {word}(p.ndim == 2 and len(p) < 512)]"
    for word in ("", "not ")
)
MUON = f"muon = torch.optim.Muon({SMALL}); optimizer = torch.optim.SGD({OTHERS}, lr=0.1); "
MUON += "check_copy(agent, parameters, optimizer, muon)\n"
GROUPS = "first, *rest = agent.parameters(); groups = [{'params': [first], 'lr': 0.0}, "
GROUPS += f"{{'params': rest}}]; optimizer = torch.optim.AdamW(groups); {CHECK}"
OPTIMIZERS = {  # edits, and which tensors do not move, or what the run says
    "parameters": ([ALL], lambda names: set()),
    "Muon": ([(CHECK, MUON), (STEP, f"{STEP}; muon.step()")], lambda names: set()),
    "a rate of 0": ([(CHECK, GROUPS)], lambda names: {names[0]}),
    "half": ([HALF], lambda names: f"out {', '.join(n for n in names if n[:5] != 'actor')}$"),
    "zero_grad": ([ALL, (STEP, f"optimizer.zero_grad(); {STEP}")], lambda names: "zero_grad"),
    "then zero_grad": ([ALL, (STEP, f"{STEP}; optimizer.zero_grad()")], lambda names: "zero_grad"),
}


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_trains_all_parameters_or_stops_the_run(setting, kind, tmp_path):
    edits, outcome = OPTIMIZERS[kind]
    unmoved, plain = run_copy(setting, tmp_path / "plain")
    names = list(checkpoint(plain)["agent"])
    assert unmoved == set()
    if isinstance(outcome(names), str):
        with pytest.raises(SystemExit, match=outcome(names)):
            run_copy(setting, tmp_path / "copy", edits)
        return
    unmoved, folder = run_copy(setting, tmp_path / "copy", edits)
    assert unmoved == outcome(names)
    if kind == "parameters":
        same = {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(checkpoint(folder)["agent"], checkpoint(plain)["agent"], **same)


# ---- Networks


def body(agent):
    """A network of several layers, and the first layer."""
    return (agent.trunk, agent.conv) if hasattr(agent, "trunk") else (agent.critic, agent.actor[0])


def frozen(agent):
    agent.unused = nn.Linear(3, 2)
    body(agent)[1].requires_grad_(False)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_frozen_and_unused_parameters_are_left_out(setting, tmp_path):
    layer = "conv" if setting.atari else "actor.0"
    names = {f"{module}.{kind}" for module in (layer, "unused") for kind in ("weight", "bias")}
    assert run_copy(setting, tmp_path / "copy", change=frozen)[0] == names


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", [nn.Dropout, nn.AlphaDropout, nn.BatchNorm1d, nn.BatchNorm2d])
def test_layers_that_differ_from_pass_to_pass_are_refused(setting, tmp_path, kind):
    with pytest.raises(SystemExit, match=r"error: (trunk|critic)\.\d+ is \w+\(.* pass to pass"):
        run_copy(setting, tmp_path / "copy", change=lambda agent: body(agent)[0].append(kind(1)))


def flatten(agent):
    agent.actor.insert(0, nn.Flatten())
    agent.critic.insert(0, nn.Flatten())


def convolution(agent):
    first = [nn.Unflatten(1, (1, 11)), nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Flatten()]
    agent.actor = nn.Sequential(*first, nn.Linear(36, 11))


def twin_critic(agent):
    one, other = agent.critic, nn.Linear(11, 1)
    agent.critic = nn.ModuleList([one, other])
    agent.critic.forward = lambda obs: torch.minimum(one(obs), other(obs))


def state_dependent_deviation(agent):
    def policy(obs):
        mean, log_std = agent.actor(obs).chunk(2, dim=-1)
        return Independent(Normal(mean, log_std.exp()), 1)

    @torch.no_grad()
    def act(obs, exploration=0.0):
        mean, log_std = agent.actor(torch.from_numpy(obs)).chunk(2, dim=-1)
        return (mean + log_std.exp() * exploration).numpy()

    agent.gaussian, agent.low, agent.high, agent.output_shape = True, -1, 1, (1,)
    agent.actor[-1], agent.log_std = nn.Linear(64, 2), torch.zeros(1)
    agent.policy, agent.actor_fn = policy, lambda: act


def shared_layer(agent):
    agent.critic[0] = agent.actor[0]


NETWORKS = [flatten, convolution, twin_critic, state_dependent_deviation, shared_layer]


@pytest.mark.parametrize("setting", CONTINUOUS, ids=str)
@pytest.mark.parametrize("change", NETWORKS)
def test_a_network_gets_flat_batches(setting, tmp_path, change):
    """The pendulum's observations have eleven dimensions."""

    def check(network, inputs):
        assert inputs[0].shape[1:] == (11,)

    def changed(agent):
        change(agent)
        agent.actor.register_forward_pre_hook(check)
        agent.critic.register_forward_pre_hook(check)

    assert run_copy(setting, tmp_path / "copy", change=changed)[0] == set()


SHAPES = {
    "a number": torch.mean,
    "pairs": lambda v: torch.stack([v, v], 1),
    "column": lambda v: v[:, None],
}


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", SHAPES)
def test_values_do_not_broadcast(setting, kind, tmp_path):
    """A column of them may pass, as in many a critic."""

    def change(agent):
        forward, value = agent.forward, getattr(agent, "value", None)
        agent.forward = lambda obs: (forward(obs)[0], SHAPES[kind](forward(obs)[1]))
        agent.value = lambda obs: SHAPES[kind](value(obs))

    if kind == "column" and not setting.atari:
        _, folder = run_copy(setting, tmp_path / "copy", change=change)
        _, plain = run_copy(setting, tmp_path / "plain")
        torch.testing.assert_close(checkpoint(folder)["agent"], checkpoint(plain)["agent"])
        return
    with pytest.raises(RuntimeError, match="shape|size"):
        run_copy(setting, tmp_path / "copy", change=change)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", [(5, 3), (18, 1), (6, 3, 1), (6, 1), (6,)])
def test_advantages_need_a_value_of_each_step_and_one_more(setting, shape):
    others = np.zeros((2, 5, 3))
    ends = np.zeros((2, 5, 3), bool)
    with pytest.raises(ValueError, match=r"value must be \(T \+ 1, N\), not "):
        setting.script.compute_gae(others[0], np.zeros(shape), others[1], *ends, 0.9, 0.9)


# ---- Metrics


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_metric_may_be_a_number_of_any_kind(setting, tmp_path):
    """In an evaluation, or in the log; the run finishes, and what it keeps can be loaded."""
    evaluated = ("= lengths.mean()\n", "= lengths.mean(); evaluation['a'] = scores.min()\n")
    logged = ("= 1 - unexplained\n", "= 1 - unexplained; scalars['b'] = torch.tensor(2.0)\n")
    _, folder = run_copy(setting, tmp_path / "copy", [evaluated, logged])
    (row,) = checkpoint(folder)["evaluations"]
    assert (row["a"], row["b"], row["step"]) == (row["return_mean"], 2, 64)
    assert {type(number) for name, number in row.items() if name != "step"} == {float}
