"""Networks; they know no noise schedule.

Convolutions on CUDA run in float32, as matrix products do by default; torch's default for them is
TF32, whose 10 bits of mantissa change images, features and FID.
"""

import torch

torch.backends.cudnn.allow_tf32 = False
