"""``python -m camtl`` is the ``camtl`` command."""

import sys

from camtl.cli import main

if __name__ == "__main__":
    sys.exit(main())
