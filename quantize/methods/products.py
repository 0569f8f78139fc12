"""Matrix products whose last bits do not depend on the number of threads.

A BLAS divides a product among its threads by rows and columns of the result. Where these are not multiples of its
tile, the remainder goes through other code that sums in another order, and its extent depends on the number of
threads. In float32, results whose sides are multiples of :data:`TILE` are identical for every number of threads
(proved by tests/test_threads.py); others are padded with zero rows and columns, and sliced afterwards.
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

    It intercepts the operations below ``nn.Linear``, ``einsum`` and the like, so no architecture needs special code.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        place = _PLACES.get(func)
        if place is None:
            if func in _COMPOSED:  # arrives undecomposed in inference mode; its inner products are dispatched next
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
            # like the fused operation: beta * input + alpha * product
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
"""Index of the first of the two factors among the arguments."""
_COMPOSED = frozenset(
    getattr(_aten, name).default
    for name in ("linear", "matmul", "einsum", "tensordot", "inner", "bilinear", "scaled_dot_product_attention")
)
"""Operations composed of products."""
