"""The entry point of `harness` and of `python -m harness`."""

import sys

from harness.machine import configure_threads


def main() -> None:
    """Runs the command line. An interrupt during the imports ends it without a traceback."""
    configure_threads()
    try:
        from harness.cli.main import main as command_line
    except KeyboardInterrupt:
        sys.exit(130)
    command_line(prog_name="harness")


if __name__ == "__main__":
    main()
