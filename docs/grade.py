"""Counts which claims hold in a class's copies of the exercise, and gives points.

    pip install -c requirements.lock -e ".[report]" nbclient nbformat ipykernel
    python docs/grade.py FOLDER

FOLDER has a notebook or a folder for each student. grades/grades.csv gets a row for each, and each
notebook a feedback file; grades/answers.md shows all answers, task by task. A student's answers and
added cells run in a fresh copy of the exercise, with your rights, and can make claims hold without
being right: `remark` has what to look at, and docs/teaching.md says more."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from symtable import symtable

import nbformat
import pandas as pd
import tyro
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell
from tqdm import tqdm

DOCS = Path(__file__).resolve().parent
EXERCISE = DOCS / "symmetric_loss_exercise.ipynb"
FIRST = ["points", "holds", "remark"]  # columns before the claims
# What compares an answer with the right one
CHECKS = "symmetric_policy_losses a2c_loss ppo_loss weights_in expected_gradient autograd".split()


@dataclass
class Args:
    folder: tyro.conf.Positional[Path]  # with a notebook or a folder for each student
    out: Path = Path("grades")  # the folder for grades.csv and the feedback files
    points: Path = DOCS / "points.csv"  # of each task (its claims share them), and what to read
    timeout: int = 120  # seconds after which a cell is interrupted
    jobs: int = os.cpu_count() or 1  # notebooks at a time


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


def defined(source):
    """Names that a cell defines at its top level."""
    symbols = symtable(source, "cell", "exec").get_symbols()
    return {one.get_name() for one in symbols if one.is_assigned() or one.is_imported()}


def marks(cells, template, exercise):
    """What to look at in an answer: a list of texts. `exercise`: names that its cells define."""
    source = "\n".join(cell.source for cell in cells)
    found = [f"uses {name}" for name in CHECKS if re.search(rf"\b{name}\b", source)]
    found += ["has added cells"] if len(cells) > 1 else []
    try:
        overwritten = (defined(source) & exercise) - defined(template.source)
    except SyntaxError:
        return [*found, "has a syntax error"]
    return found + [f"overwrites {name}" for name in sorted(overwritten)]


def grade(path, timeout):
    """Answers in a notebook, what to look at in each, and {claim: "holds", "to do", or "fails: "
    and why} of the claims that are reached."""
    if path is None:
        raise ValueError("no notebook (*.ipynb)")
    text = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    answers = answers_of(nbformat.reads(text, as_version=4))
    fresh = nbformat.read(EXERCISE, as_version=4)
    templates = answers_of(fresh)
    if len(answers) != len(templates):
        raise ValueError(f"{len(answers)} answers instead of {len(templates)}")
    cells = []
    names = set()
    left = list(answers)
    for cell in fresh.cells:
        if "student" in cell.metadata.get("tags", []):
            cells += left.pop(0)
        else:
            cells.append(cell)
            names |= defined(cell.source) if cell.cell_type == "code" else set()
    remarks = [marks(cells, own[-1], names) for cells, own in zip(answers, templates)]
    last = new_code_cell("import json\nprint(json.dumps(results))")
    fresh.cells = [*cells, last]
    options = {"allow_errors": True, "timeout": timeout, "interrupt_on_timeout": True}
    client = NotebookClient(fresh, resources={"metadata": {"path": DOCS}}, **options)
    client.execute(stderr=subprocess.DEVNULL)  # of the kernel, which warns about its network
    first = {id(cells[0]): remark for cells, remark in zip(answers, remarks)}
    remark = []
    for cell in fresh.cells:
        remark = first.get(id(cell), remark)  # of this answer, or of the one that is checked
        if any(one.get("ename") == "KeyboardInterrupt" for one in cell.get("outputs", [])):
            remark.append("takes too long")
    return answers, remarks, json.loads(last.outputs[-1].text)


def feedback(claims, earned, points):
    """For a student."""
    lines = [f"{earned.sum():g} of {points['points'].sum():g} points"]
    for task, row in points.iterrows():
        lines.append(f"task {task}: {earned[task]:g} of {row['points']:g}")
    for claim, result in claims.items():
        page = points["handout"].get(claim.partition(",")[0]) if "handout" in points else None
        hint = f" (handout: {page})" if page and result.startswith("fails") else ""
        lines.append(f"{claim}: {result}{hint}")
    return "\n".join(lines)


def notebooks(folder):
    """{name: path} of the notebooks in a folder and below; of anything else in it {name: None}."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_copy = re.search(r"(^|/)(\.|__)", name)  # Jupyter's, macOS's
        if path.suffix.lower() == ".ipynb" and not is_copy:
            found[name] = path
    students = {name.partition("/")[0] for name in found}
    others = [path.name for path in sorted(folder.glob("[!._]*")) if path.name not in students]
    return found | dict.fromkeys(others)


def main(args):
    paths = notebooks(args.folder)
    if not any(paths.values()):
        sys.exit(f"error: {args.folder}: no notebooks (*.ipynb) in it; unzip an export first")
    templates, _, claims = grade(EXERCISE, args.timeout)
    expected = list(claims)
    tasks = [claim.partition(",")[0] for claim in expected]
    points = pd.read_csv(args.points, dtype={"task": str}).set_index("task")
    if set(points.index) != set(tasks):
        sys.exit(f"error: {args.points} must have the tasks {', '.join(dict.fromkeys(tasks))}")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = {}
    titles = [cells[-1].source.splitlines()[0].split("(")[0] for cells in templates]
    pages = [[f"## `{title}`"] for title in titles]
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {name: pool.submit(grade, path, args.timeout) for name, path in paths.items()}
        for name, job in tqdm(jobs.items(), unit="notebook"):
            if error := job.exception():  # a student's file may be anything
                rows[name] = {"remark": f"not graded: {error!r:.200}"}
                continue
            answers, remarks, found = job.result()
            claims = pd.Series({claim: found.get(claim, "not reached") for claim in expected})
            shares = (claims == "holds").groupby(tasks).mean()
            earned = (points["points"] * shares).round(2)
            seen = []
            for title, page, cells, remark in zip(titles, pages, answers, remarks):
                code = "\n\n".join(cell.source for cell in cells)
                page += [f"### {name}", *remark, f"```python\n{code}\n```"]
                seen += [f"{title.removeprefix('def ')}: {one}" for one in remark]
            row = {"points": earned.sum(), "holds": (claims == "holds").sum()}
            rows[name] = row | {"remark": "; ".join(seen)} | claims.to_dict()
            path = args.out / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(feedback(claims, earned, points), encoding="utf-8")
    table = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=FIRST + expected)
    table["holds"] = table["holds"].astype("Int64")  # whole numbers beside missing ones
    table.to_csv(args.out / "grades.csv", index_label="name", errors="backslashreplace")
    page = "\n\n".join(sum(pages, []))
    (args.out / "answers.md").write_text(page + "\n", "utf-8", "backslashreplace")
    print(table[FIRST].to_string(na_rep=""))
    print(f"claims one by one, answers and feedback: {args.out}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # an old ZIP file's names may be no text
    main(tyro.cli(Args))
