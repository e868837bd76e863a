"""Grades a class's copies of the exercise: how many claims hold in each notebook of a folder.

    pip install -e ".[report]" nbclient nbformat ipykernel
    python docs/grade.py FOLDER

Each notebook takes some minutes. The answers of a notebook are put into a fresh copy of the
exercise, so it does not matter what else a student has changed. Answers are other people's code,
and run with your rights: use an account in which they can do no harm."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pandas as pd
import tyro
from nbclient import NotebookClient
from tqdm import tqdm

DOCS = Path(__file__).resolve().parent
EXERCISE = DOCS / "symmetric_loss_exercise.ipynb"


@dataclass
class Args:
    folder: tyro.conf.Positional[Path]  # with the notebooks of the class
    out: Path = Path("grades.csv")  # a row for each notebook, a column for each claim
    timeout: int = 600  # seconds that a cell may take


def answers_of(notebook):
    """The cells into which students write."""
    return [cell for cell in notebook.cells if "student" in cell.metadata.get("tags", [])]


def grade(path, timeout):
    """{claim: holds, fails or to do} of a student's notebook."""
    graded = nbformat.read(EXERCISE, as_version=4)
    cells = answers_of(graded)
    answers = answers_of(nbformat.read(path, as_version=4))
    if len(answers) != len(cells):
        raise ValueError(f"{len(answers)} cells for answers instead of {len(cells)}")
    for cell, answer in zip(cells, answers):
        cell.source = answer.source
    where = {"metadata": {"path": DOCS}}
    client = NotebookClient(graded, timeout=timeout, allow_errors=True, resources=where)
    client.execute(stderr=subprocess.DEVNULL)  # of the kernel, which warns about its own network
    outputs = [output for cell in graded.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    lines = re.findall(r"(?m)^(holds|fails|to do): (\w+(?: \(needs \w+\))?: [^:\n]+)", printed)
    return {claim: result for result, claim in lines}


def main(args):
    paths = sorted(args.folder.glob("*.ipynb"))
    if not paths:
        sys.exit(f"error: {args.folder}: no notebooks (*.ipynb) in it")
    grades = {}
    for path in tqdm(paths, unit="notebook"):
        try:
            grades[path.stem] = grade(path, args.timeout)
        except Exception as error:  # a student's file may be anything
            tqdm.write(f"{path.name}: not graded: {error!r:.200}")
    table = pd.DataFrame.from_dict(grades, orient="index")
    table.to_csv(args.out, index_label="notebook")
    counts = {
        result: (table == result).sum(axis="columns") for result in ("holds", "fails", "to do")
    }
    print(pd.DataFrame(counts).to_string())
    print(f"claims one by one: {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
