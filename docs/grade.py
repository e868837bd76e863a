"""Grades a class's copies of the exercise: how many claims hold in each notebook of a folder and of
the folders in it.

    pip install -c requirements.lock -e ".[report]" nbclient nbformat ipykernel
    python docs/grade.py FOLDER

Each notebook takes less than a minute. A student's answers, cells added before them, and imports
added to the first cells are put into a fresh copy of the exercise, so it does not matter what else
was changed. What answers do to the exercise's own variables is undone. Answers are other people's
code, and run with your rights: use an account in which they can do no harm."""

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pandas as pd
import tyro
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat.v4 import new_code_cell
from tqdm import tqdm

DOCS = Path(__file__).resolve().parent
EXERCISE = DOCS / "symmetric_loss_exercise.ipynb"
RESULTS = ["holds", "fails", "to do", "not reached"]  # of a claim
FIRST = [*RESULTS, "look at", "remark"]  # columns before the claims
# An answer with one of these may use what checks it
LOOK_AT = "claim compare isclose results factor quotient sppo_over_ppo weights_in settings samples "
LOOK_AT += "sppo_continuous sa2c_continuous exec global globals"
# Run before and after an answer
BEGIN = "_own = set()"
KEEP = "_kept = {x: y for x, y in globals().items() if x[0] != '_' and x not in _own}"
RESTORE = """_own |= set(globals()) - set(_kept)
print("undone:", *[x for x, y in _kept.items() if globals().get(x) is not y])
globals().update(_kept)"""


@dataclass
class Args:
    folder: tyro.conf.Positional[Path]  # with the notebooks of the class, or a folder for each
    out: Path = Path("grades.csv")  # a row for each notebook: how many claims hold, and each claim
    timeout: int = 600  # seconds that a cell may take


def answers_of(notebook):
    """For each answer a list of cells: those that the student has added before it, and its own,
    which may be split. Cells of the exercise have tags, added ones have none."""
    answers = []
    cells = []
    has_answer = False
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code" and ("student" in tags or not tags):
            cells.append(cell)
            has_answer |= "student" in tags
        elif cell.cell_type == "code" and has_answer:
            answers.append(cells)
            cells = []
            has_answer = False
    if has_answer:
        answers.append(cells)
    return answers


def imports_of(notebook):
    """Statements that import, in the exercise's cells, as text."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and "setup" in cell.metadata.get("tags", []):
            try:
                statements = ast.parse(cell.source).body
            except SyntaxError:  # a command of Jupyter, for example
                continue
            kinds = (ast.Import, ast.ImportFrom)
            found += [ast.unparse(one) for one in statements if isinstance(one, kinds)]
    return found


def own_count(notebook):
    """How many claims hold by what the student's copy has last printed, or None."""
    outputs = sum((cell.get("outputs", []) for cell in notebook.cells), [])
    printed = "".join(output.get("text") or "" for output in outputs)
    counts = re.findall(r"(\d+) of \d+ claims hold", printed)
    return int(counts[-1]) if counts else None


def grade(path, timeout):
    """Returns {claim: holds, to do, or fails and why} of a student's notebook, words to look at,
    and a remark on what ended it early, which of the exercise's names the student has used, and
    whether the student's copy says something else."""
    text = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    notebook = nbformat.reads(text, as_version=4)
    answers = answers_of(notebook)
    graded = nbformat.read(EXERCISE, as_version=4)
    own = [i for i, x in enumerate(graded.cells) if "student" in x.metadata.get("tags", [])]
    if len(answers) != len(own):
        raise ValueError(f"{len(answers)} answers instead of {len(own)}")
    added = [one for one in imports_of(notebook) if one not in imports_of(graded)]
    answers[0][:0] = map(new_code_cell, added)
    for i, cells in reversed(list(zip(own, answers))):
        sources = [KEEP, *(cell.source for cell in cells), RESTORE]
        graded.cells[i : i + 1] = map(new_code_cell, sources)
    graded.cells.insert(0, new_code_cell(BEGIN))
    where = {"metadata": {"path": DOCS}}
    client = NotebookClient(graded, timeout=timeout, allow_errors=True, resources=where)
    remark = []
    try:
        client.execute(stderr=subprocess.DEVNULL)  # of the kernel, which warns about its network
    except (CellTimeoutError, DeadKernelError) as error:
        remark.append(type(error).__name__)
    checked = ""  # what the exercise's own cells print
    answered = ""
    for cell in graded.cells:
        printed = "".join(output.get("text", "") for output in cell.get("outputs", []))
        if "tags" in cell.metadata:
            checked += printed
        else:
            answered += printed
    found = {}
    lines = r"(holds|fails|to do): (\w+(?: \(needs \w+\))?: [^:\n]+)(: .*)?"
    for result, claim, why in re.findall(lines, checked):
        twice = "fails: an answer has printed this claim"
        found[claim] = twice if claim in found else result + why
    count = sum(result.startswith("holds") for result in found.values())
    said = own_count(notebook)
    if said not in (None, count):
        remark.append(f"the student's copy says {said}")
    remark += re.findall(r"undone: .+", answered)
    written = "\n".join(cell.source for cell in sum(answers, []))
    words = [word for word in LOOK_AT.split() if re.search(rf"\b{word}\b", written)]
    return found, " ".join(words), ", ".join(remark)


def notebooks(folder):
    """{name: path} of the notebooks in a folder and below. Names are paths, since a learning
    platform's export has the same file in a folder for each student. A folder without a notebook,
    and files that end with .ipynb.txt, .json or .zip, have None."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith((".", "__")) for part in name.parts):  # copies of Jupyter or macOS
            continue
        is_other = path.name.lower().endswith((".ipynb.txt", ".json", ".zip"))
        if path.suffix.lower() == ".ipynb":
            short = name.with_suffix("").as_posix()
            found[name.as_posix() if short in found else short] = path  # ada.ipynb, ada.IPYNB
        elif path.parent == folder and (is_other or path.is_dir()):
            found[name.as_posix()] = None
    return {
        name.encode(errors="backslashreplace").decode(): path  # an old ZIP file's may be no text
        for name, path in found.items()
        if path or not any(other.startswith(f"{name}/") for other in found)
    }


def main(args):
    paths = notebooks(args.folder)
    if not any(paths.values()):
        sys.exit(f"error: {args.folder}: no notebooks (*.ipynb) in it; unzip an export first")
    expected, *_ = grade(EXERCISE, args.timeout)
    columns = [*FIRST, *expected]
    rows = {}
    for name, path in tqdm(paths.items(), unit="notebook"):
        try:
            if path is None:
                raise ValueError("no notebook (*.ipynb)")
            found, words, remark = grade(path, args.timeout)
            claims = {claim: found.get(claim, "not reached") for claim in expected}
            kinds = [result.partition(":")[0] for result in claims.values()]
            counts = {result: kinds.count(result) for result in RESULTS}
            rows[name] = counts | claims | {"look at": words, "remark": remark}
        except Exception as error:  # a student's file may be anything
            rows[name] = {"remark": f"not graded: {error!r:.200}"}
            tqdm.write(f"{name}: not graded: {error!r:.200}")
        table = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns)
        table[RESULTS] = table[RESULTS].astype("Int64")  # counts, also where some are missing
        table.to_csv(args.out, index_label="notebook")  # after each one, since all take long
    print(table[FIRST].to_string(na_rep=""))
    print(f"claims one by one: {args.out}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    main(tyro.cli(Args))
