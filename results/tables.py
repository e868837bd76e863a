"""Writes the tables of packed runs into pages. Each stands below a marker, a comment with its
function: in control/README.md `<!--k.measures-->` is measures() in control/k.py, anywhere
`<!--results.verdicts.claims-->` is claims() in verdicts.py.

python -m results.tables            # writes all tables anew
python -m results.tables --check    # fails if a page would change
"""

import re
import sys
from importlib import import_module
from pathlib import Path

RESULTS = Path(__file__).parent
ROOT = RESULTS.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(RESULTS.glob("**/*.md"))]
MARKED = re.compile(r"(?m)^<!--([\w.]+)\.(\w+)-->\n(?:\|.*\n)+")


def with_tables(page):
    """A page's text with its tables made anew."""

    def marked(found):
        module, function = found.groups()
        name = module if module.startswith("results.") else f"results.{page.parent.name}.{module}"
        table = getattr(import_module(name), function)()
        return f"<!--{module}.{function}-->\n{table}\n"

    return MARKED.sub(marked, page.read_text(encoding="utf-8"))


def main(check):
    for page in PAGES:
        text = with_tables(page)
        if text != page.read_text(encoding="utf-8"):
            if check:
                sys.exit(f"{page}: not up to date; run python -m results.tables")
            page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(check="--check" in sys.argv)
