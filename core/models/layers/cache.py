"""Keys and values of sequences that are being generated.

Prompts end at the same slot, so that the new tokens of all sequences go to one slot:

    slots       0 1 2 3 4 5 | 6 7 ...
    sequence 0  - - a b c d | x y          first[0] = 2
    sequence 1  a b c d e f | x y          first[1] = 0

Shapes: T prompt tokens, B sequences, G key/value heads, S slots, D head size, N query heads.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from core.device.base import Accelerator


class KVCache:
    """Filled by a packed forward pass (`begin_prompts`), then grown by one token per sequence (`begin_token`)."""

    def __init__(self, *, num_layers: int, max_new_tokens: int, accelerator: Accelerator) -> None:
        self.num_layers = num_layers
        self._max_new_tokens = max_new_tokens
        self._accelerator = accelerator
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._first_B = torch.zeros(0, dtype=torch.int64)
        self._rows_T = self._slots_T = torch.zeros(0, dtype=torch.int64)
        self._capacity = self._prompt_slots = 0
        self._slot: int | None = None
        self._mask_BS: Tensor | None = None
        self._ragged = False

    def begin_prompts(self, cu_seqlens: tuple[int, ...]) -> None:
        """The coming forward pass holds the prompts, packed."""
        lengths = [end - start for start, end in itertools.pairwise(cu_seqlens)]
        longest = max(lengths)
        device = self._accelerator.device
        self._first_B = torch.tensor([longest - length for length in lengths]).to(device)
        self._rows_T = torch.cat([torch.full((length,), row) for row, length in enumerate(lengths)]).to(device)
        self._slots_T = torch.cat([torch.arange(longest - length, longest) for length in lengths]).to(device)
        self._capacity = longest + self._max_new_tokens
        self._ragged = min(lengths) < longest
        self._keys, self._values, self._slot = [], [], None
        self._prompt_slots = longest

    def begin_token(self) -> None:
        """The coming forward pass holds the next token of every sequence."""
        self._slot = self._prompt_slots if self._slot is None else self._slot + 1
        slots_S = torch.arange(self._slot + 1, device=self._first_B.device)
        self._mask_BS = slots_S >= self._first_B[:, None] if self._ragged else None

    def attend(self, layer: int, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, cu_seqlens: tuple[int, ...]) -> Tensor:
        """Store keys and values of one layer and attend to all that is stored. Returns [T, N, D]."""
        if self._slot is None:
            self._store_prompts(layer, k_TGD, v_TGD)
            return self._accelerator.attention_varlen(q_TND, k_TGD, v_TGD, cu_seqlens, causal=True)
        self._keys[layer][:, :, self._slot] = k_TGD
        self._values[layer][:, :, self._slot] = v_TGD
        used = slice(0, self._slot + 1)
        return self._accelerator.attention_cached(
            q_TND, self._keys[layer][:, :, used], self._values[layer][:, :, used], self._mask_BS
        )

    def keep(self, rows_B: Tensor) -> None:
        """Go on with these sequences only, in this order."""
        self._keys = [keys[rows_B] for keys in self._keys]
        self._values = [values[rows_B] for values in self._values]
        self._first_B = self._first_B[rows_B]

    def _store_prompts(self, layer: int, k_TGD: Tensor, v_TGD: Tensor) -> None:
        assert layer == len(self._keys), "layers store in order"
        shape = (len(self._first_B), k_TGD.shape[1], self._capacity, k_TGD.shape[2])
        for store, new_TGD in ((self._keys, k_TGD), (self._values, v_TGD)):
            slots_BGSD = new_TGD.new_zeros(shape)
            slots_BGSD[self._rows_T, :, self._slots_T] = new_TGD
            store.append(slots_BGSD)
