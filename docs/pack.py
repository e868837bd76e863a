"""Packs what students need for the exercise, without its answers.

    python docs/pack.py                    # writes symmetric-loss.zip

The scripts run as before, but their losses are encoded, and docstrings and comments left out, so
that nobody reads the answers by accident."""

import ast
import base64
import zipfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
AS_THEY_ARE = ["LICENSE", "pyproject.toml", "requirements.lock", "docs/handout.md"]
AS_THEY_ARE += ["docs/symmetric_loss_exercise.ipynb", "docs/loss.html"]


@dataclass
class Args:
    out: Path = Path("symmetric-loss.zip")


ENCODED = ["symmetric_policy_losses", "gradient_and_metrics"]  # the latter logs SA2C's weights


def without_answers(source):
    """A script whose losses are encoded, and whose docstrings and comments are gone."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            node.body[0] = ast.Pass()
    for i, node in enumerate(tree.body):
        if isinstance(node, ast.FunctionDef) and node.name in ENCODED:
            encoded = base64.b64encode(ast.unparse(node).encode()).decode()
            tree.body[i] = ast.parse(f"exec(__import__('base64').b64decode('{encoded}'))").body[0]
    return ast.unparse(tree)


def main(args):
    with zipfile.ZipFile(args.out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in AS_THEY_ARE:
            archive.write(ROOT / name, f"symmetric-loss/{name}")
        for name in ("sppo_continuous.py", "sa2c_continuous.py"):
            source = (ROOT / name).read_text(encoding="utf-8")
            archive.writestr(f"symmetric-loss/{name}", without_answers(source))
    print(args.out)


if __name__ == "__main__":
    main(tyro.cli(Args))
