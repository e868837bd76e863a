"""Grades a class's copies of the exercise: how many claims hold in each notebook of a folder and of
the folders in it.

    pip install -c requirements.lock -e ".[report]" nbclient nbformat ipykernel
    python docs/grade.py FOLDER

Each notebook takes less than a minute. The answers of a notebook are put into a fresh copy of the
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
RESULTS = ["holds", "fails", "to do"]  # of a claim


@dataclass
class Args:
    folder: tyro.conf.Positional[Path]  # with the notebooks of the class, or a folder for each
    out: Path = Path("grades.csv")  # a row for each notebook: how many claims hold, and each claim
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


def notebooks(folder):
    """{name: path} of the notebooks in a folder and below. Names are paths, since a learning
    platform's export has the same file in a folder for each student."""
    found = {}
    for path in sorted(folder.rglob("*.ipynb")):
        name = path.relative_to(folder).with_suffix("")
        if not any(part.startswith(".") for part in name.parts):  # Jupyter's and macOS's copies
            found[name.as_posix()] = path
    return found


def main(args):
    paths = notebooks(args.folder)
    if not paths:
        sys.exit(f"error: {args.folder}: no notebooks (*.ipynb) in it")
    rows = {}
    for name, path in tqdm(paths.items(), unit="notebook"):
        try:
            claims = grade(path, args.timeout)
            counts = {result: list(claims.values()).count(result) for result in RESULTS}
            rows[name] = counts | claims
        except Exception as error:  # a student's file may be anything
            rows[name] = {"not graded": f"{error!r:.200}"}
            tqdm.write(f"{name}: not graded: {error!r:.200}")
    table = pd.DataFrame.from_dict(rows, orient="index")
    first = [*RESULTS, "not graded"]
    table = table.reindex(columns=[*first, *table.columns.difference(first, sort=False)])
    table[RESULTS] = table[RESULTS].astype("Int64")  # counts, also where some are missing
    table.to_csv(args.out, index_label="notebook")
    print(table[first].to_string(na_rep=""))
    print(f"claims one by one: {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
