"""Where the command starts, whether or not what it needs is installed."""

from __future__ import annotations


def main() -> None:
    """Runs the command with the process's arguments.

    Raises:
        SystemExit: always; with a message where typer or rich is not installed.
    """
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        raise SystemExit(
            f"mlframework-quantization needs {error.name}, which is not installed: "
            "pip install 'mlframework-quantization[cli]'"
        ) from None
    app()
