"""Write docs/data_faults.md and docs/run_faults.md: every fault, injected for real, and what the commands make of it.

From the checkout: python -m scripts.make_fault_table [data|runs]
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

from tests.support import data_fault_table
from tests.support.run_faults import table as run_fault_table

TABLES = {"data": data_fault_table, "runs": run_fault_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=TABLES, help="one of them alone")
    only = parser.parse_args().table
    warnings.simplefilter("ignore")  # of Lightning about a tiny run
    logging.disable(logging.WARNING)  # every fault warns; the table shows the messages
    for name, table in TABLES.items():
        if only not in (None, name):
            continue
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            for heading, row in table.run_all(Path(folder)):
                print(f"{row.name}: {row.message}", flush=True)
                rows.append((heading, row))
        table.DOCUMENT.path.write_text(table.DOCUMENT.render(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
