"""Write docs/data_faults.md: every fault of data, injected into real shards, and what a run makes of it.

From the checkout: python -m scripts.make_fault_table
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

from tests.support.fault_table import DOCUMENT, render, run_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DOCUMENT, help="file to write (default: %(default)s)")
    output = parser.parse_args().output
    warnings.simplefilter("ignore")  # of Lightning about a tiny run
    logging.disable(logging.WARNING)  # every fault warns; the table shows the messages
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for heading, row in run_all(Path(folder)):
            print(f"{row.name}: {row.message}")
            rows.append((heading, row))
    output.write_text(render(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
