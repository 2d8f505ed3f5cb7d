"""Keys and values of finished blocks, computed once: what makes the `blocks` path cost one block a step.

A finished token sees itself and the finished ones before it, so nothing that is written later changes its keys and
values (block diffusion, arXiv 2503.09573). Every row stands at its own block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scorelm.device import send
from scorelm.model.layout import CLEAN, Layout, Past, token_by_token
from scorelm.model.prediction import places_of


class BlockCache:
    """Keys and values by layer, row and column.

    Args:
        kv_shape: layers, heads of each, and size of a head.
        window: how many positions back a block sees; 0 for all.
        shape: (rows, columns).
        device: where the model is.
        dtype: that keys and values are computed in.
    """

    def __init__(
        self, kv_shape: tuple[int, int, int], window: int, shape: torch.Size, device: torch.device, dtype: torch.dtype
    ) -> None:
        layers, *size = kv_shape
        self.window = window
        self.kv_GBLHK = torch.zeros(2 * layers, *shape, *size, device=device, dtype=dtype)
        """Keys and values of each layer in turn."""
        self.held_BL = torch.zeros(shape, dtype=torch.bool)
        """On the host, as all are that say where positions are."""

    def take_over(self, other: BlockCache, old: dict[int, slice], new: dict[int, slice]) -> None:
        """Hold what another cache holds of the requests that are in both; `old` and `new` say in which rows."""
        columns = min(self.held_BL.shape[1], other.held_BL.shape[1])
        for request in old.keys() & new.keys():
            to, of = new[request], old[request]
            self.kv_GBLHK[:, to, :columns] = other.kv_GBLHK[:, of, :columns]
            self.held_BL[to, :columns] = other.held_BL[of, :columns]

    def place(self, reach_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Positions within reach that are not held: rows [R], and their columns [R, W], -1 where a row has fewer."""
        todo_BL = reach_BL & ~self.held_BL & self.within_window(reach_BL.sum(1) - 1)
        row_R = todo_BL.any(1).nonzero().squeeze(1)
        count_R, first_R = todo_BL[row_R].sum(1), todo_BL[row_R].int().argmax(1)
        offset_W = torch.arange(int(count_R.max()))
        return row_R, torch.where(offset_W < count_R[:, None], first_R[:, None] + offset_W, -1)

    def past(self, row_R: Tensor, position_BL: Tensor, block_BL: Tensor, last_R: Tensor) -> Past:
        """What the rows `row_R` have behind them, as far as the window reaches back from column `last_R`."""
        held_RC = self.held_BL[row_R] & self.within_window(last_R)
        used_L = held_RC.any(0).nonzero().squeeze(1)
        part = slice(int(used_L.min()), int(used_L.max()) + 1) if len(used_L) else slice(0, 0)
        held_RC, position_RC, block_RC = held_RC[:, part], position_BL[row_R, part], block_BL[row_R, part]
        behind = Layout(
            held_RC.long(), position_RC, token_by_token(position_RC, block_RC), torch.full_like(block_RC, CLEAN)
        )
        device, found = self.kv_GBLHK.device, self.kv_GBLHK[:, :, part]
        if len(row_R) < len(self.held_BL):
            found = found.index_select(1, send(row_R, device))
        return Past(behind.to(device), list(found[0::2]), list(found[1::2]))

    def within_window(self, last_R: Tensor) -> Tensor:
        """Columns that the window reaches back to from `last_R`: [R, L] bool."""
        column_L = torch.arange(self.held_BL.shape[1])
        return column_L > last_R[:, None] - (self.window or len(column_L))

    def keep(self, past: Past, row_R: Tensor, column_RW: Tensor, clean_RW: Tensor) -> None:
        """Hold the keys and values that a forward pass has computed, at the positions that are clean for good."""
        rows_N, columns_N = row_R[:, None].expand_as(column_RW)[clean_RW], column_RW[clean_RW]
        self.held_BL[rows_N, columns_N] = True
        device, length = self.kv_GBLHK.device, self.held_BL.shape[1]
        new_GRWHK = torch.stack([t_RWHK for pair in past.new for t_RWHK in pair])
        to_N = send(rows_N * length + columns_N, device)
        self.kv_GBLHK.flatten(1, 2)[:, to_N] = new_GRWHK.flatten(1, 2)[:, places_of(clean_RW, device)]


def finished_blocks(block_BL: Tensor, sigma_BL: Tensor) -> Tensor:
    """Positions in blocks without noise, [B, L] bool."""
    noisy_BK = torch.zeros(block_BL.shape[0], int(block_BL.max()) + 1, device=block_BL.device)
    return noisy_BK.scatter_add(1, block_BL, (sigma_BL > 0).float()).gather(1, block_BL) == 0
