"""The fast forms of what is said plainly elsewhere, and the one switch between the two.

`couple` is the seam between two blocks (couple.py; on a GPU couple_triton.py), `linear_loss` the heads and their losses
(loss.py), `sparing` what autograd need not keep (saved.py), `quicken` the products of linear layers on a CPU (products.py).
``UMBRA_KERNELS=reference`` in the environment, or ``with kernels.reference():``, runs core.py and PyTorch's own instead: the same
numbers to 1e-6 in fp32, gradients included, more slowly. Within torch.compile they run too: the compiler fuses them.
"""

from umbra.method.kernels.couple import FEW as FEW
from umbra.method.kernels.couple import Pack as Pack
from umbra.method.kernels.couple import couple as couple
from umbra.method.kernels.couple import couple_few as couple_few
from umbra.method.kernels.couple import pack as pack
from umbra.method.kernels.loss import Head as Head
from umbra.method.kernels.loss import linear_loss as linear_loss
from umbra.method.kernels.plain import PLAIN as PLAIN
from umbra.method.kernels.plain import is_plain as is_plain
from umbra.method.kernels.products import leave_alone as leave_alone
from umbra.method.kernels.products import product as product
from umbra.method.kernels.products import quicken as quicken
from umbra.method.kernels.saved import sparing as sparing
from umbra.method.kernels.switch import in_use as in_use
from umbra.method.kernels.switch import reference as reference
