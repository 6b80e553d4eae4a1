"""`python -m coremill`."""

import sys

from coremill.cli import main

sys.exit(main())
