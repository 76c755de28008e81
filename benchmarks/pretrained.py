"""The study of pretrained networks: see ``benchmarks/pretrained/command_line.py``.

python benchmarks/pretrained.py --list
python benchmarks/pretrained.py --network crepe pnet --width W8A8 --method minmax "recommended recipe"
python benchmarks/pretrained.py --table
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # every process of the study imports this file once more
    from benchmarks.pretrained.command_line import main

    main()
