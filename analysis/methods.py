"""What is known of methods, which are called by their --exp-name: order, colours and baselines."""

import seaborn as sns

# In the order of tables, then variants; other methods follow, in alphabetical order
COLORS = {"a2c": "goldenrod", "da2c": "darkgreen", "sa2c": "navy"}
COLORS |= {"ppo": "tab:orange", "dppo": "tab:green", "sppo": "tab:blue"}
COLORS |= {"ppo-coef": "firebrick", "ppo-norm": "indigo", "ppo-ce": "tab:pink"}
COLORS |= {"dppo-coef": "tab:red", "dppo-norm": "tab:purple"}
OTHERS = ["black", "blue", "silver", "maroon"]  # far from SPPO's, DPPO's, also for the colour-blind
BASELINES = {"sppo": ["dppo", "ppo"], "dppo": ["ppo"], "ppo": []}
BASELINES |= {"sa2c": ["da2c", "a2c"], "da2c": ["a2c"], "a2c": []}


def in_order(methods):
    """Each method once: baselines first; variants, such as dppo-norm, after their method."""
    rank = {name: place for place, name in enumerate(COLORS)}
    return sorted(set(methods), key=lambda name: (rank.get(name.partition("-")[0], 99), name))


def colors_of(methods, chosen):
    """{method: its colour}, in order; a known method always has the same, if none is `chosen`."""
    ordered = in_order(methods)
    others = [name for name in ordered if name not in COLORS]
    palette = [*OTHERS, *sns.husl_palette(len(others), h=0.49, l=0.5)]
    colors = COLORS | dict(zip(others, palette)) | chosen
    return {name: colors[name] for name in ordered}


def baselines_of(method):
    """What the method is compared with: the first of these that has runs. Of sppo-p that is sppo,
    of sb3-ppo it is ppo."""
    return BASELINES.get(method, [*method.split("-", maxsplit=1), "sppo", "sa2c"])
