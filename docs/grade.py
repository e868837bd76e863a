"""Counts which claims hold in a class's copies of the exercise, and gives points.

    pip install -c requirements.lock -e ".[report]" nbclient nbformat ipykernel
    python docs/grade.py FOLDER

FOLDER has a notebook or a folder for each student. grades/grades.csv gets a row for each, and each
notebook a feedback file. A student's answers and added cells run in a fresh copy of the exercise,
with your rights, and can make claims hold without being right: see docs/teaching.md."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pandas as pd
import tyro
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell
from tqdm import tqdm

DOCS = Path(__file__).resolve().parent
EXERCISE = DOCS / "symmetric_loss_exercise.ipynb"
FIRST = ["points", "holds", "remark"]  # columns before the claims


@dataclass
class Args:
    folder: tyro.conf.Positional[Path]  # with a notebook or a folder for each student
    out: Path = Path("grades")  # the folder for grades.csv and the feedback files
    points: Path = DOCS / "points.csv"  # of each task; its claims share them equally
    timeout: int = 600  # seconds after which a cell is interrupted


def answers_of(notebook):
    """For each answer a list of cells: its own, which may be split, and those that the student has
    added before and directly after it. Cells of the exercise have tags, added ones have none."""
    answers = []
    cells = []
    has_answer = False
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code" and ("student" in tags or not tags):
            cells.append(new_code_cell(cell.source))
            has_answer |= "student" in tags
        elif cell.cell_type == "code" and has_answer:
            answers.append(cells)
            cells = []
            has_answer = False
    return answers


def grade(notebook, timeout):
    """{claim: "holds", "to do", or "fails: " and why} of the claims that are reached."""
    answers = answers_of(notebook)
    fresh = nbformat.read(EXERCISE, as_version=4)
    if len(answers) != len(answers_of(fresh)):
        raise ValueError(f"{len(answers)} answers instead of {len(answers_of(fresh))}")
    cells = []
    for cell in fresh.cells:
        is_answer = "student" in cell.metadata.get("tags", [])
        cells += answers.pop(0) if is_answer else [cell]
    last = new_code_cell("import json\nprint(json.dumps(results))")
    fresh.cells = [*cells, last]
    options = {"allow_errors": True, "timeout": timeout, "interrupt_on_timeout": True}
    client = NotebookClient(fresh, resources={"metadata": {"path": DOCS}}, **options)
    client.execute(stderr=subprocess.DEVNULL)  # of the kernel, which warns about its network
    return json.loads(last.outputs[-1].text)


def notebooks(folder):
    """{name: path} of the notebooks in a folder and below; of anything else in it {name: None}."""
    found = {}
    for entry in sorted(folder.glob("*")):
        inside = {}
        for path in [entry, *sorted(entry.rglob("*"))]:
            name = path.relative_to(folder)
            is_copy = any(part.startswith((".", "__")) for part in name.parts)  # Jupyter's, macOS's
            if path.suffix.lower() == ".ipynb" and not is_copy:
                inside[name.as_posix()] = path
        if not entry.name.startswith((".", "__")):
            found |= inside or {entry.name: None}
    return found


def main(args):
    paths = notebooks(args.folder)
    if not any(paths.values()):
        sys.exit(f"error: {args.folder}: no notebooks (*.ipynb) in it; unzip an export first")
    expected = list(grade(nbformat.read(EXERCISE, as_version=4), args.timeout))
    tasks = [claim.partition(",")[0] for claim in expected]
    points = pd.read_csv(args.points, dtype={"task": str}).set_index("task")["points"]
    if set(points.index) != set(tasks):
        sys.exit(f"error: {args.points} must have the tasks {', '.join(dict.fromkeys(tasks))}")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name, path in tqdm(paths.items(), unit="notebook"):
        try:
            if path is None:
                raise ValueError("no notebook (*.ipynb)")
            text = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
            found = grade(nbformat.reads(text, as_version=4), args.timeout)
            claims = pd.Series({claim: found.get(claim, "not reached") for claim in expected})
            earned = (points * (claims == "holds").groupby(tasks).mean()).round(2)
            row = {"points": earned.sum(), "holds": (claims == "holds").sum(), **claims}
            lines = [f"{earned.sum():g} of {points.sum():g} points"]
            lines += [f"task {task}: {earned[task]:g} of {points[task]:g}" for task in points.index]
            lines += [f"{claim}: {result}" for claim, result in claims.items()]
            feedback = args.out / f"{name}.txt"
            feedback.parent.mkdir(parents=True, exist_ok=True)
            feedback.write_text("\n".join(lines), encoding="utf-8")
        except Exception as error:  # a student's file may be anything
            row = {"remark": f"not graded: {error!r:.200}"}
        rows[name] = row
        table = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=FIRST + expected)
        table["holds"] = table["holds"].astype("Int64")  # whole numbers beside missing ones
        table.to_csv(args.out / "grades.csv", index_label="name", errors="backslashreplace")
    print(table[FIRST].to_string(na_rep=""))
    print(f"claims one by one, and feedback: {args.out}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # an old ZIP file's names may be no text
    main(tyro.cli(Args))
