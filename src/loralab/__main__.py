"""`python -m loralab`, which `accelerate launch -m loralab train ...` uses."""

import sys

from loralab.cli import main

sys.exit(main())
