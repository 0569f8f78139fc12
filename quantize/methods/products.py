"""Matrix products whose last bits do not depend on the number of threads.

A BLAS shares a product out among its threads by rows and columns of the result. Where those are no multiples of its
tile, the rest falls to other code, which sums in another order, and how much is left over depends on the number of
threads. In float32, results whose sides are multiples of :data:`TILE` came out alike for every number of threads
(tests/test_threads.py holds it); others are computed with rows and columns of zeros added, and cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

TILE = 16
Product = Callable[..., torch.Tensor]


class EvenProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While this mode is on, products in float32 on a CPU are independent of the number of threads, in every module.

    It sees the operations below ``nn.Linear``, ``einsum`` and the like, so that no architecture needs code of its own.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        place = _PLACES.get(func)
        if place is None:
            if func in _COMPOSED:  # as it comes in inference mode: the products inside it come next
                with self:
                    return func.decompose(*args, **kwargs)
            return func(*args, **kwargs)
        left, right = args[place], args[place + 1]
        rows, columns = left.shape[-2], right.shape[-1]
        if (rows % TILE == 0 and columns % TILE == 0) or left.dtype != torch.float32 or left.device.type != "cpu":
            return func(*args, **kwargs)
        product = torch.ops.aten.bmm.default if left.dim() == 3 else torch.ops.aten.mm.default
        result = product(pad(left, (0, 0, 0, -rows % TILE)), pad(right, (0, -columns % TILE)))
        result = result[..., :rows, :columns]
        if place:
            # as the fused operation: beta * input + alpha * product
            beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
            result = result * alpha if alpha != 1 else result
            if beta != 0:
                result = torch.add(result, args[0], alpha=beta)
        into = kwargs.get("out", args[0] if func in _IN_PLACE else None)
        return result.contiguous() if into is None else into.copy_(result)


@contextmanager
def no_products() -> Iterator[None]:
    """For code that multiplies no matrices and runs many small operations, such as packing: the mode, which costs each
    operation some 20 us, is off inside."""
    with _disable_current_modes():
        yield


_aten = torch.ops.aten
_IN_PLACE = frozenset({_aten.addmm_.default, _aten.baddbmm_.default})
_PLACES: dict[Any, int] = {
    _aten.mm.default: 0,
    _aten.mm.out: 0,
    _aten.bmm.default: 0,
    _aten.bmm.out: 0,
    _aten.addmm.default: 1,
    _aten.addmm.out: 1,
    _aten.addmm_.default: 1,
    _aten.baddbmm.default: 1,
    _aten.baddbmm.out: 1,
    _aten.baddbmm_.default: 1,
}
"""Where the two factors stand among the arguments."""
_COMPOSED = frozenset(
    getattr(_aten, name).default
    for name in ("linear", "matmul", "einsum", "tensordot", "inner", "bilinear", "scaled_dot_product_attention")
)
"""Operations that are made of products."""
