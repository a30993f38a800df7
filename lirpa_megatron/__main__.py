"""`python -m lirpa_megatron`: the command line."""

import sys

from lirpa_megatron.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
