"""Linear layers cut over tp: by columns of the output, then by rows of the input, with one sum at the end.

Shoeybi et al., Megatron-LM, section 3: a column-parallel layer, something elementwise or per head,
and a row-parallel layer need one all-reduce forward and one backward.

    up = ColumnLinear(h, 4 * h, context, normal(0.02))
    down = RowLinear(4 * h, h, context, normal(0.02))
    y_bsh = down(F.gelu(up(x_bsh)))

Weights are torch's [out, in].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.layers.lora import Lora, rows_here
from megatron.layers.parameter import ZEROS, Initial, declare
from megatron.parallel.collectives import enter_tp, leave_tp, replicated
from megatron.parallel.context import ParallelContext
from megatron.ucp.layout import Layout, Part

Epilogue = Callable[[Tensor, Tensor | None], Tensor]
"""(output without its bias, bias) -> output: where adding the bias is fused with what follows it."""


class ColumnLinear(nn.Module):
    """Each rank computes some of the output features. `parts` (of the output) are cut one by one."""

    bias: Tensor | None
    lora: Lora | None
    lora_a: Tensor
    lora_b: Tensor

    def __init__(
        self,
        in_size: int,
        out_size: int,
        context: ParallelContext,
        initial: Initial,
        has_bias: bool = True,
        parts: Sequence[Part] | None = None,
        epilogue: Epilogue | None = None,
        lora: Lora | None = None,
    ) -> None:
        super().__init__()
        self.context, self.epilogue, self.lora = context, epilogue, lora
        self.weight = declare(_by_output((out_size, in_size), parts), context, initial, is_decayed=True, kind="matrix")
        bias = declare(_by_output((out_size,), parts), context, ZEROS, is_decayed=False) if has_bias else None
        self.register_parameter("bias", bias)
        if lora is not None:
            parts = tuple(parts or (Part(out_size),))
            self.rows_kept = tuple(rows_here(part, context) for part in parts)
            lora.declare_column(self, in_size, parts, context)

    def forward(self, x_bsh: Tensor) -> Tensor:
        """[b, s, in] -> [b, s, this rank's part of out]. Collective over tp. Under sequence parallelism the input is
        this rank's part of the sequence, the output has all of it."""
        x_bsh = enter_tp(x_bsh, self.context)
        y_bsp = F.linear(x_bsh, self.weight, self.bias if self.epilogue is None else None)
        if self.lora is not None:
            y_bsp = y_bsp + self.adapted(x_bsh)
        # Inside forward, as ZeRO-3 gives the bias back when it ends.
        return y_bsp if self.epilogue is None else self.epilogue(y_bsp, self.bias)

    def adapted(self, x_bsh: Tensor) -> Tensor:
        """What the adapter adds."""
        return self.lora.column(x_bsh, self.lora_a, self.rows_of_b(), self.rows_kept, self.context)

    def rows_of_b(self) -> Sequence[Tensor]:
        """Of each part that has an adapter, what this rank keeps of its B."""
        kept = [size for size, is_chosen in zip(self.rows_kept, self.lora.chosen, strict=True) if is_chosen]
        return self.lora_b.split(kept)


class RowLinear(nn.Module):
    """Each rank has some of the input features, never splitting `unit` neighbours; the bias is replicated."""

    bias: Tensor | None
    lora: Lora | None
    lora_a: Tensor
    lora_b: Tensor

    def __init__(
        self,
        in_size: int,
        out_size: int,
        context: ParallelContext,
        initial: Initial,
        has_bias: bool = True,
        unit: int = 1,
        lora: Lora | None = None,
    ) -> None:
        super().__init__()
        self.context, self.lora = context, lora
        layout = Layout.shard_h((out_size, in_size), unit)
        self.weight = declare(layout, context, initial, is_decayed=True, kind="matrix")
        bias = declare(Layout.replicate((out_size,)), context, ZEROS, is_decayed=False) if has_bias else None
        self.register_parameter("bias", bias)
        if lora is not None:
            lora.declare_row(self, in_size, out_size, unit, context)

    def forward(self, x_bsp: Tensor) -> Tensor:
        """[b, s, this rank's part of in] -> [b, s, out], equal on all tp ranks; under sequence parallelism this rank's
        part of the sequence. Collective over tp."""
        y_bsh = F.linear(x_bsp, self.weight, self.bias if self.context.tp_size == 1 else None)
        if self.lora is not None:
            y_bsh = y_bsh + self.lora.row(x_bsp, self.lora_a, self.lora_b, self.context)
        if self.context.tp_size == 1:
            return y_bsh
        y_bsh = leave_tp(y_bsh, self.context)
        if self.bias is None:
            return y_bsh
        # After the sum, or it would be added tp_size times.
        (bias,) = replicated((self.bias,), self.context)
        return y_bsh + bias


def _by_output(shape: tuple[int, ...], parts: Sequence[Part] | None) -> Layout:
    return Layout.shard_v(shape) if parts is None else Layout.shard_nc(shape, 0, parts)
