"""``python -m umbra``, and so ``accelerate launch -m umbra``.

Python puts the working folder ahead of all packages here. Only what it has imported by now is used before that is undone.
"""

import os
import sys

here = os.path.realpath(os.curdir)
if here != os.path.realpath(os.path.join(__file__, "..", "..")):  # else Umbra itself is imported from there
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != here]

from umbra.cli import main  # noqa: E402

sys.exit(main())
