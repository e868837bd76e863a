"""For all tests: what each run would do again, and takes longer than a short run."""

import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

SCRIPTS = ("sppo_continuous", "sa2c_continuous", "sppo_atari", "sa2c_atari", "sppo_rlhf")


@pytest.fixture(autouse=True, scope="session")
def installed_packages():
    """The list of installed packages, which each run records, is read from disk only once."""
    scripts = [sys.modules[name] for name in SCRIPTS if name in sys.modules]
    packages = []
    if scripts:
        for package in metadata.distributions():
            packages.append(SimpleNamespace(name=package.name, version=package.version))
    with pytest.MonkeyPatch.context() as patch:
        for script in scripts:
            known = SimpleNamespace(distributions=lambda: packages)
            patch.setattr(script, "metadata", known)
        yield


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The networks here are small, and two workers of pytest-xdist share two cores."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The toy's texts, and its models after a tenth of their training, in a folder for runs."""
    import sppo_rlhf as rlhf  # slow to import, and few tests need it

    folder = tmp_path_factory.mktemp("runs") / "toy"
    train_toy_model = rlhf.train_toy_model

    def train_briefly(model, data, steps, *rest):
        train_toy_model(model, data, steps // 10, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf, "train_toy_model", train_briefly)
        rlhf.make_toy(folder)
    return folder
