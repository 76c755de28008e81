"""``python -m mlframework.quantization``: the command ``mlframework-quantization``."""

from .command_line.entry import main

if __name__ == "__main__":
    main()
