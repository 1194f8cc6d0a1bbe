"""`python -m realgeneral` is the `realgeneral` command."""

import sys

from realgeneral.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
