"""`python -m llm2slm.cli`, where the command `llm2slm` is not on the path."""

import sys

from .main import main

sys.exit(main())
