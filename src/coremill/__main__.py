"""`python -m coremill`."""

import sys

from coremill.cli.main import main

sys.exit(main())
