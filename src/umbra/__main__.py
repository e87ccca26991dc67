"""``python -m umbra``, and so ``accelerate launch -m umbra``.

Python puts the working folder ahead of all packages here. Only what it has imported by now is used before that is undone.
"""

import os
import sys

if not sys.flags.safe_path and sys.path:
    here = os.path.realpath(os.curdir)
    if os.path.realpath(sys.path[0] or os.curdir) == here != os.path.realpath(os.path.join(__file__, "..", "..")):
        del sys.path[0]

from .cli import main

sys.exit(main())
