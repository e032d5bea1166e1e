"""One thread: the tensors are tiny, and the ranks of a test share the cores."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
