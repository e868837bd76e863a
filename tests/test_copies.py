"""What a copy of a control script changes works, or stops it: optimizers, networks, metrics."""

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import (
    EACH,
    SA2C_CONTINUOUS,
    SETTINGS,
    SPPO_CONTINUOUS,
    Signals,
    checkpoint,
    progress,
    record,
    weights,
)
from torch import nn
from torch.distributions import Independent, Normal

CONTINUOUS = [SPPO_CONTINUOUS, SA2C_CONTINUOUS]
SHORT = {"total_timesteps": 64, "num_envs": 2, "num_steps": 32}  # one rollout


def make_copy(setting, folder, edits=(), change=lambda agent: None):
    """`setting` with a copy of the script with edits, pairs of old and new text, whose agents are
    changed, and have the tensors of the start as `first`."""
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

    class Agent(script.Agent):
        def __init__(self, *options):
            super().__init__(*options)
            change(self)
            Agent.first = {name: tensor.clone() for name, tensor in self.state_dict().items()}

    script.Agent = Agent
    return replace(setting, script=script)


def run_copy(setting, folder, edits=(), change=lambda agent: None, **flags):
    """Runs such a copy. Returns the names of the tensors that have not moved, and the folder."""
    copy = make_copy(setting, folder, edits, change)
    constant = {"anneal_lr": False} if setting.atari and setting.ppo else {}
    _, folder = copy.run(folder, **SHORT | constant | flags)
    first = copy.script.Agent.first
    last = safetensors.torch.load_file(folder / "agent.safetensors")
    return {name for name in first if torch.equal(first[name], last[name])}, folder


# ---- What stops a run: the policy that acts is not the one that is trained


class Memory(nn.Module):
    """A recurrent network that keeps its state from call to call."""

    def __init__(self, width):
        super().__init__()
        self.cell = nn.GRUCell(width, width)
        self.state = torch.zeros(1, width)

    def forward(self, x):
        state = self.cell(x, self.state.mean(0).expand(len(x), -1))
        self.state = state.detach()
        return state


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.MultiheadAttention(width, 1, dropout=0.5)

    def forward(self, x):
        return x + self.layer(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.GRU(width, width, num_layers=2, dropout=0.5)

    def forward(self, x):
        return x + self.layer(x[None])[0][0]


def inserted(layer):
    """`layer` before the actor's last one, on Atari in the place of ReLU. For its effect to show,
    outputs are not as small as they usually are at first."""

    def change(agent):
        if hasattr(agent, "trunk"):
            agent.trunk[-1] = layer(512)
            nn.init.normal_(agent.actor.weight, std=0.3)
        else:
            agent.actor.insert(4, layer(64))
            nn.init.normal_(agent.actor[-1].weight, std=0.3)

    return change


def hooked(agent):
    layer = agent.actor if hasattr(agent, "trunk") else agent.actor[-1]
    layer.register_forward_hook(lambda _, inputs, output: output + torch.rand(output.shape))


NOT_THE_SAME = "error: the policy that acts is not the one that is trained"
TRAPS = {
    "dropout": inserted(lambda width: nn.Dropout(0.5)),
    "alpha dropout": inserted(lambda width: nn.AlphaDropout(0.5)),
    "RReLU": inserted(lambda width: nn.RReLU()),
    "batch normalisation": inserted(lambda width: nn.BatchNorm1d(width, momentum=0.9)),
    "attention with dropout": inserted(Attention),
    "GRU with dropout": inserted(Recurrent),
    "memory": inserted(Memory),
    "hook": hooked,
}


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", TRAPS)
def test_a_policy_that_differs_from_pass_to_pass_stops_the_run(setting, kind, tmp_path):
    with pytest.raises((SystemExit, ValueError), match=f"{NOT_THE_SAME}|more than 1 value per"):
        run_copy(setting, tmp_path / "copy", change=TRAPS[kind])


LOGITS = ("Categorical(logits=output,", "Categorical(logits=output / 0.9,")
MEAN = ("        if self.gaussian:\n            distribution = Normal(output, ",)
MEAN += (MEAN[0].replace("output", "output.tanh()"),)


@pytest.mark.parametrize("setting", CONTINUOUS, ids=str)
@pytest.mark.parametrize(("edit", "policy"), [(LOGITS, "categorical"), (MEAN, "gaussian")])
def test_a_policy_edited_only_where_it_is_trained_stops_the_run(setting, edit, policy, tmp_path):
    text = Path(setting.script.__file__).read_text()
    trained = text.partition("    def policy(self, output)")[2].partition("    def exploration(")[0]
    edits = [(trained, trained.replace(*edit))]
    assert edits[0][0] != edits[0][1]

    def change(agent):
        nn.init.normal_(agent.actor[-1].weight)

    with pytest.raises(SystemExit, match=NOT_THE_SAME):
        run_copy(setting, tmp_path / "copy", edits, change, policy=policy)


# ---- Optimizers

MADE = "    global_step = 0\n"  # the line after the optimizer
STEP = "optimizer.step()\n"
# Muon is slow on matrices of 512 rows
SMALL, OTHERS = (
    f"[p for p in agent.parameters() if {word}(p.ndim == 2 and len(p) < 512)]"
    for word in ("", "not ")
)
MUON = f"    muon = torch.optim.Muon({SMALL}); optimizer = torch.optim.SGD({OTHERS}, lr=0.1)\n"
GROUPS = "    first, *rest = agent.parameters(); groups = [{'params': [first], 'lr': 0.0}, "
GROUPS += "{'params': rest}]; optimizer = torch.optim.AdamW(groups)\n"
ADAMW = "    optimizer = torch.optim.AdamW(agent.parameters())\n"
MOVED = "    for p in agent.parameters(): p.data = 1.0 * p.data\n"
OPTIMIZERS = {  # edits, and the number of tensors that do not move
    "AdamW": ([(MADE, ADAMW + MADE)], 0),
    "Muon": ([(MADE, MUON + MADE), (STEP, "optimizer.step(); muon.step()\n")], 0),
    "a rate of 0": ([(MADE, GROUPS + MADE)], 1),
    "zero_grad after": ([(STEP, "optimizer.step(); optimizer.zero_grad()\n")], 0),
    ".data": ([(MADE, MOVED + MADE)], 0),
}


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_of_ones_own_trains_all_parameters(setting, kind, tmp_path):
    edits, unmoved = OPTIMIZERS[kind]
    assert len(run_copy(setting, tmp_path / "copy", edits)[0]) == unmoved


# ---- Networks


@pytest.mark.parametrize("setting", CONTINUOUS, ids=str)
def test_a_critic_may_normalise_batches_where_one_episode_or_none_is_truncated(setting, tmp_path):
    def change(agent):
        agent.critic.insert(1, nn.BatchNorm1d(64))

    flags = {"env_id": "Pendulum-v1", "num_steps": 200, "num_envs": 1, "total_timesteps": 200}
    assert run_copy(setting, tmp_path / "copy", (), change, **flags)[1].exists()


@pytest.mark.parametrize("setting", CONTINUOUS, ids=str)
def test_a_layer_may_normalise_raw_observations(setting, tmp_path):
    """In place of the script, which then passes on what environments return: float64."""
    edits = [
        (
            "        return ((obs - self.mean) / self.std).clip(-10, 10).astype(np.float32)",
            "        return obs",
        )
    ]

    def change(agent):
        agent.actor.insert(0, nn.LayerNorm(11))

    assert run_copy(setting, tmp_path / "copy", edits, change, env_id="Hopper-v4")[1].exists()


def frozen(agent):
    agent.unused = nn.Linear(3, 2)
    (agent.conv if hasattr(agent, "conv") else agent.actor[0]).requires_grad_(False)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_frozen_and_unused_parameters_are_left_out(setting, tmp_path):
    layer = "conv" if setting.atari else "actor.0"
    names = {f"{module}.{kind}" for module in (layer, "unused") for kind in ("weight", "bias")}
    assert run_copy(setting, tmp_path / "copy", change=frozen)[0] == names


def no_dropout(agent):
    inserted(lambda width: nn.Dropout(0))(agent)


def spectral_norm(agent):
    """Power iteration moves its state with each pass of the critic."""
    nn.utils.parametrizations.spectral_norm(agent.critic[-1])


def dropout_in_the_critic(agent):
    agent.critic = nn.Sequential(nn.Dropout(0.1), agent.critic)


def flatten(agent):
    agent.actor.insert(0, nn.Flatten())
    agent.critic.insert(0, nn.Flatten())


def twin_critic(agent):
    one, other = agent.critic, nn.Linear(11, 1)
    agent.critic = nn.ModuleList([one, other])
    agent.critic.forward = lambda obs: torch.minimum(one(obs), other(obs))


class Residual(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network
        self.linear = nn.Linear(11, 11)

    def forward(self, obs):
        return self.network(obs) + self.linear(obs)


def residual_actor(agent):
    agent.actor = Residual(agent.actor)


def state_dependent_deviation(agent):
    def policy(output):
        mean, log_std = output.chunk(2, dim=-1)
        return Independent(Normal(mean, log_std.exp()), 1)

    @torch.no_grad()
    def act(obs, exploration=0.0):
        output = agent.actor(torch.from_numpy(obs))
        mean, log_std = output.chunk(2, dim=-1)
        return (mean + log_std.exp() * exploration).numpy(), output.numpy()

    agent.gaussian, agent.low, agent.high, agent.output_shape = True, -1, 1, (1,)
    agent.actor[-1], agent.log_std = nn.Linear(64, 2), torch.zeros(1)
    agent.policy, agent.actor_fn = policy, lambda: act
    agent.acting_log_prob = lambda action, output: policy(output).log_prob(action)


def shared_layer(agent):
    agent.critic[0] = agent.actor[0]


NETWORKS = [flatten, twin_critic, residual_actor, state_dependent_deviation, shared_layer]
NETWORKS = [(setting, change) for setting in CONTINUOUS for change in NETWORKS]
ANY = [no_dropout, dropout_in_the_critic]
NETWORKS += [(setting, change) for setting in SETTINGS for change in ANY]


@pytest.mark.parametrize(
    ("setting", "change"), NETWORKS, ids=lambda x: getattr(x, "__name__", str(x))
)
def test_a_network_of_ones_own_trains(setting, tmp_path, change):
    assert run_copy(setting, tmp_path / "copy", change=change)[0] == set()


@pytest.mark.parametrize("setting", CONTINUOUS, ids=str)
@pytest.mark.parametrize("change", [spectral_norm, dropout_in_the_critic])
def test_layers_with_a_state_or_random_numbers_are_continued(setting, tmp_path, change):
    copy = make_copy(setting, tmp_path / "copy", change=change)
    _, whole = copy.run(tmp_path / "whole", **EACH)
    folder = copy.interrupt(tmp_path / "continued", 2, **EACH)
    copy.run(tmp_path / "continued", **EACH)
    assert torch.equal(weights(folder), weights(whole))


def convolutions(memory_format):
    def change(agent):
        layers = [nn.Unflatten(1, (1, 1, 11)), nn.Conv2d(1, 4, (1, 3)), nn.Tanh()]
        layers += [nn.Conv2d(4, 4, (1, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(28, 11)]
        torch.manual_seed(0)
        for layer in layers:
            if hasattr(layer, "weight"):
                nn.init.normal_(layer.weight, std=0.3)
        agent.actor = nn.Sequential(*layers).to(memory_format=memory_format)

    return change


@pytest.mark.parametrize("setting", CONTINUOUS, ids=str)
def test_the_layout_in_memory_changes_no_update(setting, tmp_path):
    """Fused optimizers pair gradient and parameter by place in memory."""
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        change = convolutions(memory_format)
        folder = tmp_path / str(memory_format)
        unmoved, run = run_copy(setting, folder, change=change, learning_rate=1e-3)
        assert unmoved == set()
        results.append(safetensors.torch.load_file(run / "agent.safetensors"))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


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
        if not setting.atari:
            agent.critic.register_forward_hook(lambda *io: SHAPES[kind](io[-1].squeeze(-1)))
        forward = agent.forward
        agent.forward = lambda obs: (forward(obs)[0], SHAPES[kind](forward(obs)[1]))

    if kind == "column" and not setting.atari:
        _, folder = run_copy(setting, tmp_path / "copy", change=change)
        _, plain = run_copy(setting, tmp_path / "plain")
        torch.testing.assert_close(checkpoint(folder)["agent"], checkpoint(plain)["agent"])
        return
    with pytest.raises(RuntimeError, match="shape|size"):
        run_copy(setting, tmp_path / "copy", change=change)


# ---- Metrics


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_metric_may_be_a_number_of_any_type(setting, tmp_path):
    """In an evaluation, or in the log."""
    length = '"length_mean": lengths.mean(),\n'
    evaluated = (length, f'{length}        "a": scores.min(),\n')
    logged = ("history.append(", "scalars['b'] = torch.tensor(2.0); history.append(")
    _, folder = run_copy(setting, tmp_path / "copy", [evaluated, logged])
    (row,) = checkpoint(folder)["progress"][1]
    assert (row["a"], row["b"], row["step"]) == (row["return_mean"], 2, 64)
    assert {type(number) for name, number in row.items() if name != "step"} == {float}


# ---- Checkpoints


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_an_edited_script_continues_from_a_checkpoint_that_is_copied(
    setting, tmp_path, monkeypatch
):
    """As docs/usage.md says."""
    monkeypatch.setattr(setting.script, "AtariVectorEnv", Signals, raising=False)
    before = setting.interrupt(tmp_path / "runs", 2, **EACH)
    edit = ("gamma: float = 0.99", "gamma: float = 0.9")
    copy = make_copy(setting, tmp_path / "copy", [edit])
    folder = copy.interrupt(tmp_path / "runs", 0, **EACH)
    assert folder != before and not (folder / "checkpoint.pt").exists()
    shutil.copy(before / "checkpoint.pt", folder)
    rollouts = record(monkeypatch, copy.script, "compute_gae")
    copy.run(tmp_path / "runs", **EACH)
    assert len(rollouts) == 2
    old, new = (
        [(row["step"], row["return_mean"]) for row in progress(run)] for run in (before, folder)
    )
    assert new[:2] == old and [step for step, _ in new] == [64, 128, 192, 256]
