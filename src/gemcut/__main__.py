"""The entrance of ``python -m gemcut`` and of the ``gemcut`` script: Ctrl-C is met from the first import on."""

import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        from gemcut.cli.main import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
