"""The entry point: `harness`, and `python -m harness`."""

import sys


def main() -> None:
    """Runs the command line. Its imports take seconds, in which an interrupt is no error either."""
    try:
        from harness.cli.main import main as command_line
    except KeyboardInterrupt:
        sys.exit(130)
    command_line()


if __name__ == "__main__":
    main()
