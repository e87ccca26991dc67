"""``python -m umbra``, and so ``accelerate launch -m umbra``."""

import sys

from .cli import main

sys.exit(main())
