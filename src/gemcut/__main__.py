"""``python -m gemcut`` is the ``gemcut`` command."""

import sys

from gemcut.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
