"""A model that is never completely in memory: its blocks are read, run and dropped one at a time.

The model is built on torch's meta device, which needs no memory. Everything outside the blocks (embeddings,
rotary tables, final norm, head) is loaded; each block's weights are read only while it is in use. One run of the real
``forward`` with the blocks replaced by recorders shows how the architecture calls its blocks, with which masks and
position embeddings, so no architecture needs special code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantize.errors import SourceError
from quantize.formats.tensor_file import DTYPES
from quantize.source.architecture import empty_model, match_names, running
from quantize.source.experts import Expert, split_experts
from quantize.source.prefetch import Prefetch
from quantize.source.resolved import Source
from quantize.source.routing import find_routers
from quantize.source.source_tensors import SourceTensors

BlockCall = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Linear:
    """A linear of a loaded block. ``weight`` is [out_features, in_features], whatever layout the module stores.

    Attributes:
        local: its name in the block. expert: the expert that it belongs to, which only some tokens reach, or None.
    """

    local: str
    module: nn.Module
    expert: Expert | None = None

    @property
    def weight(self) -> torch.Tensor:
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight.t() if isinstance(self.module, Conv1D) else weight

    def set_weight(self, weight: torch.Tensor) -> None:
        """Replace the weight's values by [out_features, in_features] values."""
        with torch.no_grad():
            self.weight.copy_(weight)


class StreamedModel:
    """A causal language model whose blocks are loaded one at a time.

    Args:
        source: a resolved source with local weights.
        compute_dtype: dtype of weights and activations in the forward pass.
        device: where blocks run; activations stay on the caller's device.
        trust_remote_code: run the model code of the repo.
        head: also read the output head, which only :meth:`logits` needs.
        prefetch: read the next block while one is in use, which needs memory for both; None means only on a GPU.

    Raises:
        SourceError: transformers does not support the architecture, or the tensors do not fit it.
    """

    def __init__(
        self,
        source: Source,
        prefix: str,
        compute_dtype: torch.dtype,
        device: torch.device,
        *,
        trust_remote_code: bool = False,
        head: bool = False,
        prefetch: bool | None = None,
    ) -> None:
        self.source, self.compute_dtype, self.device = source, compute_dtype, device
        self._tensors = SourceTensors(source)
        self.model = empty_model(source, compute_dtype, trust_remote_code)
        split_experts(self.model, source.checkpoint.tensors)
        self.names = match_names(self.model, source)
        self.block_prefix, self.blocks = self._find_blocks(prefix)
        self._routers = self._local_names(find_routers(source.checkpoint.tensors))
        wanted = device.type == "cuda" if prefetch is None else prefetch
        self._ahead = Prefetch(self.read, device) if wanted else None
        self._head = head
        self.load_outside()
        self._returns_tuple: bool | None = None
        self._calls: dict[int, list[BlockCall]] = {}

    def __len__(self) -> int:
        return len(self.blocks)

    # -- weights

    def read(self, name: str) -> torch.Tensor:
        """A tensor as stored, by its name in the checkpoint.

        Raises:
            SourceChanged: it differs from its hash.
            SourceError: it contains NaN or infinity, or its file can no longer be read.
        """
        tensor = self._tensors.read(name)
        if tensor.is_floating_point() and not _is_finite(tensor):
            path = self.source.folder / self.source.checkpoint.tensors[name].file
            raise SourceError(f"{path}: {name} contains NaN or infinity; the source is damaged")
        return tensor

    @contextlib.contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Context with block ``index`` loaded; its weights are dropped on exit."""
        ahead = self._ahead
        with self._loaded(index, ahead.take(index) if ahead else {}) as module:
            if ahead and index + 1 < len(self):
                ahead.start(index + 1, self._stored_names(index + 1))
            try:
                yield module
            except BaseException:
                if ahead:
                    ahead.drop()
                raise

    @contextlib.contextmanager
    def _loaded(self, index: int, ready: Mapping[str, torch.Tensor]) -> Iterator[nn.Module]:
        module = self.blocks[index]
        self._load(module, f"{self.block_prefix}{index}.", ready)
        try:
            yield module
        finally:
            _drop(module)

    def _stored_names(self, index: int) -> list[str]:
        """Checkpoint names of the tensors that :meth:`_load` reads for a block."""
        prefix, block = f"{self.block_prefix}{index}.", self.blocks[index]
        own = [prefix + name for name, _ in [*block.named_parameters(), *block.named_buffers()]]
        return [self.names[name] for name in own if name in self.names]

    def linears(self, block: nn.Module) -> list[Linear]:
        """The quantizable linears of a loaded block, in module order, without routers."""
        modules = dict(block.named_modules())
        found = []
        for name, module in modules.items():
            if isinstance(module, nn.Linear | Conv1D) and name not in self._routers:
                owner = modules[name.rpartition(".")[0]]
                found.append(Linear(name, module, owner if isinstance(owner, Expert) else None))
        return found

    def checkpoint_name(self, index: int, local: str) -> str:
        """The checkpoint name of a module of block ``index``."""
        return self.names[f"{self.block_prefix}{index}.{local}.weight"].removesuffix(".weight")

    def checkpoint_prefix(self, index: int) -> str:
        """The prefix of block ``index`` in the checkpoint, such as ``model.layers.0.``"""
        inside = f"{self.block_prefix}{index}."
        members = (name for name in self.names if name.startswith(inside))
        name = next(name for name in members if self.names[name].endswith(name.removeprefix(inside)))  # not renamed
        return self.names[name].removesuffix(name.removeprefix(inside))

    def _local_names(self, tensors: Collection[str]) -> frozenset[str]:
        """Names, inside their block, of the modules with these checkpoint tensors as weights."""
        inside = [name.removeprefix(self.block_prefix) for name, stored in self.names.items() if stored in tensors]
        return frozenset(name.partition(".")[2].removesuffix(".weight") for name in inside)

    def stored_weight(self, index: int, linear: Linear) -> torch.Tensor:
        """The weight [N, K] in float32, exact even if the forward pass uses a narrower dtype."""
        if linear.weight.dtype == torch.float32:
            return linear.weight.contiguous()
        name = self.checkpoint_name(index, linear.local)
        if DTYPES[self.source.checkpoint.tensors[f"{name}.weight"].dtype] == linear.weight.dtype:
            return linear.weight.to(torch.float32).contiguous()
        stored = self.read(f"{name}.weight").to(self.device, torch.float32)
        return stored.t().contiguous() if isinstance(linear.module, Conv1D) else stored

    # -- running

    @torch.inference_mode()
    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Input of block 0, [batch, length, width], for token ids [batch, length].

        Also records, once per batch size, how the architecture calls each of its blocks.
        """
        rows, largest = self.model.get_input_embeddings().num_embeddings, int(input_ids.max())
        if largest >= rows or int(input_ids.min()) < 0:
            raise SourceError(
                f"{self.source.named}: its tokenizer gives the token {largest}, its embeddings have {rows} rows; "
                "tokenizer and weights belong to different models"
            )
        batch = input_ids.shape[0]
        with running(self.source):
            if self._returns_tuple is None:
                self._returns_tuple = self._probe(input_ids[:1, :8])
            hidden, calls = self._record(input_ids)
        known = self._calls.setdefault(batch, calls)
        if known is not calls:
            self._same_calls(known, calls)
        return hidden

    @torch.inference_mode()
    def run(self, index: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """A block's output for its input, both [batch, length, width]; call :meth:`embed` at this batch size first."""
        arguments, keywords = self._calls[hidden.shape[0]][index]
        output = block(hidden, *arguments, **keywords)
        states: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return states

    @torch.inference_mode()
    def logits(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [batch, length, vocabulary] from the last block's output."""

        def inject(index: int, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor:
            return hidden

        with self._replaced(inject):
            logits: torch.Tensor = self.model(input_ids=input_ids.to(self.device), use_cache=False).logits
        return logits

    def _probe(self, input_ids: torch.Tensor) -> bool:
        """Whether this architecture's blocks return a tuple: run block 0 and stop."""
        seen: list[bool] = []

        def stop(module: nn.Module, arguments: Any, output: Any) -> None:
            seen.append(isinstance(output, tuple))
            raise _Stop

        with self._loaded(0, {}) as block:
            handle = block.register_forward_hook(stop)
            try:
                with contextlib.suppress(_Stop):
                    self.model(input_ids=input_ids.to(self.device), use_cache=False)
            finally:
                handle.remove()
        return seen[0]

    def _record(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, list[BlockCall]]:
        inputs: list[torch.Tensor] = []
        calls: list[BlockCall] = []

        def record(index: int, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor:
            keywords = dict(keywords)
            hidden: torch.Tensor = keywords.pop("hidden_states") if "hidden_states" in keywords else arguments[0]
            if not calls:
                inputs.append(hidden)
            calls.append((tuple(arguments[1:]), keywords))
            return hidden

        head = self.model.get_output_embeddings()
        skip = _replace_forward(head, lambda hidden: hidden) if head is not None else contextlib.nullcontext()
        with self._replaced(record), skip:
            self.model(input_ids=input_ids.to(self.device), use_cache=False)
        if len(calls) != len(self.blocks):
            raise SourceError(
                f"{self.source.named}: the model ran {len(calls)} of its {len(self.blocks)} blocks; "
                "this architecture cannot be streamed"
            )
        return inputs[0], calls

    def _same_calls(self, known: list[BlockCall], calls: list[BlockCall]) -> None:
        for index, (before, now) in enumerate(zip(known, calls, strict=True)):
            if not _equal(before, now):
                raise SourceError(
                    f"{self.source.named}: block {index} has inputs besides its hidden states that depend on "
                    "the tokens; this architecture cannot be streamed"
                )

    @contextlib.contextmanager
    def _replaced(self, replacement: Callable[[int, tuple[Any, ...], dict[str, Any]], torch.Tensor]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for index, block in enumerate(self.blocks):

                def forward(*arguments: Any, _index: int = index, **keywords: Any) -> Any:
                    hidden = replacement(_index, arguments, keywords)
                    return (hidden, None, None) if self._returns_tuple else hidden

                stack.enter_context(_replace_forward(block, forward))
            yield

    # -- loading

    def _find_blocks(self, prefix: str) -> tuple[str, nn.ModuleList]:
        for name, module in self.model.named_modules():
            if isinstance(module, nn.ModuleList) and f"{name}.".endswith(prefix) and len(module):
                return f"{name}.", module
        raise SourceError(f"{self.source.named}: transformers has no blocks at '{prefix}N'")

    def load_outside(self, read: Callable[[str], torch.Tensor] | None = None) -> None:
        """Load everything outside the blocks (embeddings, final norm, head), replacing what was loaded before.

        Args:
            read: returns tensors by checkpoint name, such as those of a quantized branch; None reads the source.

        Raises:
            SourceError: a tensor is missing, or its shape does not match the config.
        """
        read = read or self.read
        inside = self.block_prefix
        output = self.model.get_output_embeddings()
        unused = set() if self._head or output is None else {id(parameter) for parameter in output.parameters()}
        for name, value in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if not name.startswith(inside) and name in self.names and id(value) not in unused:
                self._assign(self.model, name, read(self.names[name]))
        self.model.tie_weights()
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta and not name.startswith(inside) and id(parameter) not in unused:
                raise SourceError(f"{self.source.named}: the checkpoint lacks the tensor {name}")
        for name, buffer in self.model.named_buffers():
            if not name.startswith(inside) and not buffer.is_meta and buffer.device != self.device:
                self._set_buffer(self.model, name, buffer.to(self.device))

    def drop_outside(self) -> None:
        """Free everything outside the blocks; :meth:`embed` and :meth:`logits` cannot be used afterwards."""
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            if not name.startswith(self.block_prefix):
                owner, _, leaf = name.rpartition(".")
                empty = torch.empty_like(parameter, device="meta")
                self.model.get_submodule(owner)._parameters[leaf] = nn.Parameter(empty, requires_grad=False)

    def _load(self, module: nn.Module, prefix: str, ready: Mapping[str, torch.Tensor]) -> None:
        def read(name: str) -> torch.Tensor:
            return ready[name] if name in ready else self.read(name)

        for name, _ in list(module.named_parameters()):
            full = prefix + name
            if full not in self.names:
                raise SourceError(f"{self.source.named}: the checkpoint lacks the tensor {full}")
            self._assign(module, name, read(self.names[full]))
        for name, buffer in list(module.named_buffers()):
            if prefix + name in self.names:
                self._set_buffer(module, name, read(self.names[prefix + name]).to(self.device))
            elif buffer.device != self.device:
                self._set_buffer(module, name, buffer.to(self.device))

    def _assign(self, root: nn.Module, name: str, tensor: torch.Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = root.get_submodule(owner)
        expected = getattr(module, leaf)
        if tuple(expected.shape) != tuple(tensor.shape):
            raise SourceError(
                f"{self.source.named}: {name} is {list(tensor.shape)} in the checkpoint, "
                f"but the config requires {list(expected.shape)}"
            )
        if leaf in module._buffers:
            module._buffers[leaf] = tensor.to(self.device)
            return
        value = tensor.to(device=self.device, dtype=self.compute_dtype)
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    @staticmethod
    def _set_buffer(root: nn.Module, name: str, value: torch.Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        root.get_submodule(owner)._buffers[leaf] = value


class _Stop(Exception):
    """Ends a forward pass early."""


def _drop(module: nn.Module) -> None:
    for child in module.modules():
        for leaf, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


@contextlib.contextmanager
def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _is_finite(tensor: torch.Tensor) -> bool:
    # min and max propagate NaN and infinity and need no temporary of the tensor's size
    low, high = torch.aminmax(tensor.reshape(-1)) if tensor.numel() else (torch.zeros(()), torch.zeros(()))
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(_equal(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return isinstance(right, list | tuple) and len(left) == len(right) and all(map(_equal, left, right))
    return left is right or isinstance(left, type(right)) or left == right
