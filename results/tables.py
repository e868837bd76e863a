"""Writes what is computed from packed runs: the pages' tables, and verdicts.csv. A table stands
below a marker, a comment with its function: in control/README.md `<!--k.measures-->` is measures()
in control/k.py, anywhere `<!--results.verdicts.claims-->` is claims() in verdicts.py.

python -m results.tables              # writes all tables anew
python -m results.tables --check      # fails if a file would change
python -m results.tables --figures    # draws the figures that analyses have
"""

import re
import sys
from importlib import import_module

import matplotlib.pyplot as plt

from results.common import RESULTS
from results.verdicts import analyses, csv_table

ROOT = RESULTS.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(RESULTS.glob("**/*.md"))]
MARKED = re.compile(r"(?m)^<!--([\w.]+)\.(\w+)-->\n(?:\|.*\n)*")


def with_tables(page):
    """A page's text with its tables made anew."""

    def marked(found):
        module, function = found.groups()
        name = module if module.startswith("results.") else f"results.{page.parent.name}.{module}"
        table = getattr(import_module(name), function)()
        return f"<!--{module}.{function}-->\n{table}\n"

    return MARKED.sub(marked, page.read_text(encoding="utf-8"))


def computed():
    """{file: its text}"""
    texts = {page: with_tables(page) for page in PAGES}
    return texts | {RESULTS / "verdicts.csv": csv_table().to_csv(index=False)}


def draw_figures():
    plt.switch_backend("agg")
    for module in analyses():
        if hasattr(module, "draw"):
            module.draw()


def main(flags):
    if "--figures" in flags:
        draw_figures()
    for file, text in computed().items():
        if text != file.read_text(encoding="utf-8"):
            if "--check" in flags:
                sys.exit(f"{file}: not up to date; run python -m results.tables")
            file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
