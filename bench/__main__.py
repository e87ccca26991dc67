"""``python -m bench …`` runs ``umbra bench --out bench/results …``."""

import sys
from pathlib import Path

from umbra.cli import main

sys.exit(main(["bench", "--out", str(Path(__file__).parent / "results"), *sys.argv[1:]]))
