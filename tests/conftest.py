"""For all tests: what each run would do again, and takes longer than a short run."""

import os
import sys
from importlib.metadata import distributions
from types import SimpleNamespace

import pytest
from helpers import SETTINGS, Signals

# The networks here are small, and two workers of pytest-xdist, and what they start, share two cores
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True, scope="session")
def known_versions():
    """Scripts parse the metadata of all that is installed, at each start."""
    found = [SimpleNamespace(name=one.name, version=one.version) for one in distributions()]
    for name, module in sys.modules.items():
        if name.startswith(("sppo_", "sa2c_")) and hasattr(module, "distributions"):
            module.distributions = lambda: found


@pytest.fixture(scope="session", params=SETTINGS, ids=str)
def setting(request):
    """Each control script, with flags for a short run."""
    return request.param


@pytest.fixture
def signals(monkeypatch):
    """Games made here take the place of the emulator, which test_atari.py tests."""
    for setting in SETTINGS:
        monkeypatch.setattr(setting.script, "AtariVectorEnv", Signals, raising=False)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Texts, and models after a tenth of their training: runs/toy, found from two folders above."""
    import toy  # slow to import, and few tests need it

    folder = tmp_path_factory.mktemp("toy") / "runs/toy"
    train_toy_model = toy.train_toy_model

    def train_briefly(model, data, steps, *rest):
        train_toy_model(model, data, steps // 10, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "train_toy_model", train_briefly)
        toy.make_toy(folder)
    return folder
