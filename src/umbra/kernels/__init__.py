"""The fast forms of what is said plainly elsewhere, and the one switch between the two.

`couple` is the seam between two blocks (couple.py; on a GPU couple_triton.py), `linear_loss` the heads and their losses
(loss.py), `sparing` what autograd need not keep (saved.py), `quicken` the products of linear layers on a CPU (products.py).
``UMBRA_KERNELS=reference`` in the environment, or ``with kernels.reference():``, runs core.py and PyTorch's own instead: the same
numbers to 1e-6 in fp32, gradients included, more slowly. Within torch.compile they run too: the compiler fuses them.
"""

from .couple import FEW as FEW
from .couple import Pack as Pack
from .couple import couple as couple
from .couple import couple_few as couple_few
from .couple import pack as pack
from .loss import Head as Head
from .loss import linear_loss as linear_loss
from .plain import PLAIN as PLAIN
from .plain import is_plain as is_plain
from .products import leave_alone as leave_alone
from .products import product as product
from .products import quicken as quicken
from .saved import sparing as sparing
from .switch import in_use as in_use
from .switch import reference as reference
