"""Mixed widths on pretrained networks: see ``benchmarks/pretrained/mixed_widths.py``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from benchmarks.pretrained.mixed_widths import main

    main()
