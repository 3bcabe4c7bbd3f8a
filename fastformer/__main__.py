"""`python -m fastformer` is the command `fastformer`."""

import sys

from fastformer.cli import main

sys.exit(main())
