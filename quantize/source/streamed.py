"""A model that is never completely in memory: its blocks are read, run and dropped one at a time.

The model is built on torch's meta device, which needs no memory. Everything outside the blocks (embeddings,
rotary tables, final norm, head) is loaded; each block's weights are read only while it is in use. A run of the real
``forward`` with the blocks replaced by recorders shows how the architecture calls its blocks, with which masks and
position embeddings, so no architecture needs special code. Towers that text does not reach are never loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantize.errors import SourceError
from quantize.formats.tensor_file import DTYPES
from quantize.source.architecture import empty_model, running, tied_parameters
from quantize.source.calls import (
    BlockCall,
    Calls,
    HandedOn,
    Returns,
    equal_calls,
    replaced_blocks,
    replaced_forward,
    split_call,
)
from quantize.source.checkpoint import with_slices
from quantize.source.examine import examine
from quantize.source.experts import Expert
from quantize.source.linear import Linear
from quantize.source.prefetch import Prefetch
from quantize.source.resolved import Source
from quantize.source.source_tensors import SourceTensors, is_finite


class StreamedModel:
    """A causal language model whose blocks are loaded one at a time.

    Args:
        source: a resolved source with local weights.
        compute_dtype: dtype of weights and activations in the forward pass.
        device: where blocks run; activations stay on the caller's device.
        trust_remote_code: run the repo's code. head: also read the output head, which only :meth:`logits` needs.
        taken: names in the checkpoint of the linears that are quantized; None are all that can be.
        prefetch: read the next block while one is in use, which needs memory for both; None means only on a GPU.

    Raises:
        SourceError: transformers does not support the architecture, or the tensors do not fit it.
    """

    def __init__(
        self,
        source: Source,
        compute_dtype: torch.dtype,
        device: torch.device,
        *,
        trust_remote_code: bool = False,
        head: bool = False,
        prefetch: bool | None = None,
        taken: Collection[str] | None = None,
    ) -> None:
        self.compute_dtype, self.device = compute_dtype, device
        self.model = empty_model(source, compute_dtype, trust_remote_code)
        self.form = examine(self.model, source.checkpoint.in_files, source.named)
        self.source = replace(source, checkpoint=with_slices(source.checkpoint, self.form.slices))
        self._tensors = SourceTensors(self.source)
        self.names, self.block_prefix, self.blocks = self.form.names, self.form.prefix, self.form.blocks
        self._index = {id(block): index for index, block in enumerate(self.blocks)}
        wanted = device.type == "cuda" if prefetch is None else prefetch
        self._ahead = Prefetch(self.read, device) if wanted else None
        self._head, self.taken = head, None if taken is None else frozenset(taken)
        self._close_towers()
        self.load_outside()
        self._returns: list[Returns] | None = None if self.form.trial.failure else self.form.trial.returns
        self._calls: dict[int, Calls] = {}
        self._by_tokens: bool | None = None
        self._lent = HandedOn()

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
        if tensor.is_floating_point() and not is_finite(tensor):
            path = self.source.folder / self.source.checkpoint.in_files[name].file
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
        """The quantizable linears of a loaded block, in module order."""
        index, found = self._index[id(block)], []
        for name, module in self.form.linears(index):
            chosen = self.taken is None or self.checkpoint_name(index, name) in self.taken
            if chosen and not self.form.reason(index, name):
                owner = block.get_submodule(name.rpartition(".")[0])
                found.append(Linear(name, module, owner if isinstance(owner, Expert) else None))
        return found

    def checkpoint_name(self, index: int, local: str) -> str:
        """The checkpoint name of a module of block ``index``."""
        return self.names[f"{self.block_prefix}{index}.{local}.weight"].removesuffix(".weight")

    def checkpoint_prefix(self, index: int) -> str:
        """The prefix of block ``index`` in the checkpoint, such as ``model.layers.0.``"""
        return f"{self.form.stored_prefix}{index}."

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

        Also records how the architecture calls each of its blocks: once per batch size, or, where the calls depend on
        the tokens, for every batch anew.
        """
        rows, largest = self.model.get_input_embeddings().num_embeddings, int(input_ids.max())
        if largest >= rows or int(input_ids.min()) < 0:
            raise SourceError(
                f"{self.source.named}: its tokenizer gives the token {largest}, its embeddings have {rows} rows; "
                "tokenizer and weights belong to different models"
            )
        with running(self.source):
            if self._returns is None:
                self._returns = self._probe(input_ids[:1, :8])
            if self._by_tokens is None:
                self._by_tokens = self._depends_on_tokens(input_ids[:1])
            hidden, calls = self._record(input_ids)
        known = self._calls.setdefault(len(input_ids), calls)
        if known is not calls:
            self._by_tokens = self._by_tokens or not equal_calls(known.blocks, calls.blocks)
            self._calls[len(input_ids)] = calls
        return hidden

    def recall(self, input_ids: torch.Tensor) -> None:
        """Let :meth:`run` call the blocks as for these windows, [batch, length]."""
        calls = self._calls.get(len(input_ids))
        if calls is None or (self._by_tokens and not calls.are_of(input_ids)):
            self.embed(input_ids)

    @property
    def hands_on(self) -> bool:
        """Whether blocks leave something, such as keys and values, for later blocks; see :class:`HandedOn`."""
        return self.form.trial.fills or bool(self.form.trial.last_readers)

    def lend(self, handed_on: HandedOn) -> None:
        """Let trials of a block, which belong to no windows, find what earlier blocks left for some windows."""
        self._lent = handed_on.in_float32()

    @torch.inference_mode()
    def run(
        self,
        index: int,
        block: nn.Module,
        hidden: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        handed_on: HandedOn | None = None,
    ) -> torch.Tensor:
        """A block's output for its input, both [batch, length, width].

        Args:
            input_ids: the tokens of these windows, [batch, length]; None are those recalled or embedded last.
            handed_on: what earlier blocks left for these windows, and where this block leaves its own; None uses what
                :meth:`lend` gave.
        """
        if input_ids is not None:
            self.recall(input_ids)
        calls = self._calls[len(hidden)]
        if index not in calls.blocks:
            return hidden  # the model leaves this block out on text
        trial, left = self.form.trial, self._lent if handed_on is None else handed_on
        arguments, keywords = left.linked(calls.blocks[index], trial.links.get(index, {}))
        states = self.form.trial.layout.unpack(hidden, calls.shape)
        name = keywords.pop("", None)
        with left.given_to(keywords):
            output = block(**{name: states}, **keywords) if name else block(states, *arguments, **keywords)
        if trial.last_readers:
            left.keep(index, output, trial.last_readers)
        found: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
        return self.form.trial.layout.pack(found)

    @torch.inference_mode()
    def logits(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [batch, length, vocabulary] from the last block's output."""

        def inject(index: int, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor:
            given, _ = split_call(arguments, keywords)
            return self.form.trial.layout.unpack(hidden, given.shape)

        with self._replaced(inject):
            logits: torch.Tensor = self.model(input_ids=input_ids.to(self.device), use_cache=False).logits
        return logits

    def _probe(self, input_ids: torch.Tensor) -> list[Returns]:
        """What the blocks return, by running block 0 with its weights; for models that could not be tried without."""
        seen: list[Returns] = []

        def stop(module: nn.Module, arguments: Any, output: Any) -> None:
            seen.append(Returns.of(output))
            raise _Stop

        with self._loaded(0, {}) as block:
            handle = block.register_forward_hook(stop)
            try:
                with contextlib.suppress(_Stop):
                    self.model(input_ids=input_ids.to(self.device), use_cache=False)
            finally:
                handle.remove()
        return seen * len(self.blocks)

    def _depends_on_tokens(self, input_ids: torch.Tensor) -> bool:
        """Whether other tokens call the blocks with other arguments beside the hidden states."""
        other = (input_ids + 1) % self.model.get_input_embeddings().num_embeddings
        first, second = self._record(input_ids)[1], self._record(other)[1]
        return not equal_calls(first.blocks, second.blocks)

    def _record(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, Calls]:
        inputs: list[torch.Tensor] = []
        calls: dict[int, BlockCall] = {}
        order: list[int] = []

        def record(index: int, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor:
            hidden, calls[index] = split_call(arguments, keywords)
            inputs.append(hidden)
            order.append(index)
            return hidden

        head = self.model.get_output_embeddings()
        skip = replaced_forward(head, lambda hidden: hidden) if head is not None else contextlib.nullcontext()
        with self._replaced(record), skip:
            self.model(input_ids=input_ids.to(self.device), use_cache=False)
        if order != sorted(calls) or (len(calls) != len(self.blocks) and self.form.trial.failure):
            raise SourceError(
                f"{self.source.named}: the model ran {len(calls)} of its {len(self.blocks)} blocks in {len(order)} "
                "calls; this architecture cannot be streamed"
            )
        return self.form.trial.layout.pack(inputs[0]), Calls(calls, inputs[0].shape, input_ids)

    def _replaced(
        self, replacement: Callable[[int, tuple[Any, ...], dict[str, Any]], torch.Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        return replaced_blocks(self.blocks, self._returns or [], replacement)

    # -- loading

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
        beside = (inside, *self.form.towers)
        for name, value in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if not name.startswith(beside) and name in self.names and id(value) not in unused:
                self._assign(self.model, name, read(self.names[name]))
        self._tie()
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta and not name.startswith(beside) and id(parameter) not in unused:
                raise SourceError(f"{self.source.named}: the checkpoint lacks the tensor {name}")
        for name, buffer in self.model.named_buffers():
            if not name.startswith(inside) and not buffer.is_meta and buffer.device != self.device:
                self._set_buffer(self.model, name, buffer.to(self.device))

    def _close_towers(self) -> None:
        """Fill towers that text does not reach with NaN that takes no memory.

        On the meta device they would mislead models that ask for the device of their first parameter.
        """
        for name in self.form.towers:
            for module in self.model.get_submodule(name.removesuffix(".")).modules():
                for leaf, parameter in module._parameters.items():
                    if parameter is not None:
                        nothing = torch.full((), torch.nan, dtype=parameter.dtype, device=self.device)
                        module._parameters[leaf] = nn.Parameter(nothing.expand(parameter.shape), requires_grad=False)

    def _tie(self) -> None:
        """Share parameters that the config ties, except those that the checkpoint stores on their own."""
        for name, other in tied_parameters(self.model).items():
            if name not in self.names and not name.startswith(self.block_prefix):
                owner, _, leaf = name.rpartition(".")
                self.model.get_submodule(owner)._parameters[leaf] = self.model.get_parameter(other)

    def drop_outside(self) -> None:
        """Free everything outside the blocks; :meth:`embed` and :meth:`logits` cannot be used afterwards.

        Nothing is freed where the calls of the blocks depend on the tokens, which needs the embeddings throughout.
        """
        if self._by_tokens:
            return
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            if not name.startswith((self.block_prefix, *self.form.towers)):
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
