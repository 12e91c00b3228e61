"""One factor a column behind the quantizer: columns get steps of their own (as in AWQ, Lin et al.
2024, arXiv:2306.00978, where the factor is searched)."""

import torch
from torch import Tensor

from kit.core.steps import Step, Stored, register_step
from kit.core.weights import MatrixView

OCTAVE = 8  # factors an octave that can be stored


@register_step("column_scale")
class ColumnScale(Step):
    """(R, C) as a matrix -> column c times 2**(codes[c] / 8), same shape and dtype.

    codes: int (C,), from -127 to 127.
    """

    rank, settings = 40, Stored

    def __init__(self, codes: Tensor, view: MatrixView):
        super().__init__()
        self.view = view
        self.register_buffer("codes", codes.to(torch.int8))

    @property
    def scale(self) -> Tensor:
        """The factors (C,), float32."""
        return torch.exp2(self.codes.double() / OCTAVE).float()

    @classmethod
    def nearest(cls, scale: Tensor, view: MatrixView) -> "ColumnScale":
        """The step whose factors come closest to `scale` (C,) > 0."""
        return cls(torch.round(OCTAVE * torch.log2(scale.double())).clamp(-127, 127), view)

    def forward(self, x: Tensor) -> Tensor:
        return self.view.tensor(self.view.matrix(x) * self.scale).to(x.dtype)

    def encode(self, x: Tensor, stored: Tensor, write) -> dict:
        write.codes(self.codes[None], 8)
        return {}

    @classmethod
    def decode(cls, entry, read, weight, stored, parts) -> tuple["ColumnScale", None]:
        return cls(read.codes((1, weight.view.columns), 8)[0], weight.view), None

    def resized(self, select, before: Tensor) -> "ColumnScale":
        spread = self.view.tensor(self.codes.expand(self.view.rows, -1))
        view = self.view.like(before.shape)
        codes = view.matrix(select(spread))
        if not (codes == codes[:1]).all():
            raise ValueError("columns that had factors of their own cannot become one")
        return ColumnScale(codes[0], view)
