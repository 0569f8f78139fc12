"""The branches of a build: one streamed pass solves all that are stale, and each is put into place whole."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from quantize.branches.branch import Branch
from quantize.branches.completion import Made, NotOnDisk, complete, versions
from quantize.building.build import Build, Diagonals, Hessians
from quantize.building.calibration_pass import CalibrationPass, PassState
from quantize.calibration.forward import choose_device, choose_dtype
from quantize.calibration.store import StatisticsStore
from quantize.calibration.tokens import load_tokenizer, sample_tokens
from quantize.dist.manifest import Manifest
from quantize.dist.resume import State, open_unfinished
from quantize.executors.memory import return_large_buffers
from quantize.files.cache import cache_folder
from quantize.files.digest import key_of
from quantize.methods.columns import kernel_of
from quantize.planning.items import PlannedVariant
from quantize.planning.keys import STATISTICS_VERSION
from quantize.recipe.methods import GptqVariant
from quantize.source.accelerator import compute_of
from quantize.source.processor import decides_bytes
from quantize.source.streamed import StreamedModel
from quantize.source.unchanged import check_small_files


class Pass:
    """The one pass for a build's own branches and its importance matrix, new or resumed."""

    def __init__(self, build: Build) -> None:
        return_large_buffers()
        plan = build.plan
        self.build, self.plan, self.reporter, self.todo = build, plan, build.reporter, plan.native_work
        calibration = plan.recipe.calibration
        self.device = choose_device(build.options.device)
        self.dtype = choose_dtype(calibration.compute_dtype, self.device)
        self.compute: dict[str, Any] = {
            **compute_of(self.device, self.dtype, kernel_of(self.device)),
            # how sums are split up: other numbers give other last bits
            "batch_tokens": plan.memory.batch_tokens,
            **({"row_budget": plan.memory.row_budget} if plan.memory.row_budget else {}),
            **({"shards": plan.shards} if plan.shards > 1 else {}),
        }
        self.store = self._statistics_store(build.options.keep_statistics)
        inputs: dict[str, Any] = {
            "versions": versions(self.compute["kernel"]),
            "compute": decides_bytes(self.compute),
            "source": plan.source.hashes,
            "calibration": plan.calibration,
        }
        keys = {item.label: key_of(plan.key_inputs(item)) for item in self.todo}
        ways = ["kept", "gathered"] if self._needs_no_forward else ["gathered"]
        imatrix, hessians = plan.gathers_imatrix, bool(plan.hessians)
        if hessians:
            inputs["hessians"] = key_of({"of": sorted(plan.hessians)})
        states = [
            State(inputs | {"statistics": way}, keys, imatrix, plan.table.blocks, hessians=hessians) for way in ways
        ]
        self.unfinished = open_unfinished(plan.dist, states)
        self._diagonals = self.unfinished.diagonals() if imatrix else None

    @property
    def diagonals(self) -> Diagonals | None:
        """For an importance matrix; None where the pass gathers none."""
        return None if self._diagonals is None else Diagonals(self._diagonals, self.compute)

    @property
    def hessians(self) -> Hessians | None:
        """Those for GGUF levels; None where the pass saves none."""
        return Hessians(self.unfinished, self.compute) if self.unfinished.state.hessians else None

    def run(self) -> list[Branch]:
        """Have the executor solve every branch to its end, in the folder of the unfinished build.

        Raises:
            QuantizeError: one of its kinds. The finished blocks are kept.
        """
        recipe, source, state = self.plan.recipe, self.plan.source, self.unfinished.state
        with self.reporter.stage("tokens"):
            self.tokens = sample_tokens(recipe.calibration, load_tokenizer(source, recipe.model.trust_remote_code))
        if state.is_over:
            self.reporter.say("every block is solved already; putting into place")
        else:
            doing = "using stored statistics" if state.from_store else "calibrating once"
            resuming = f", going on after block {state.next_block} of {state.blocks}" if state.next_block else ""
            self.reporter.say(
                f"{doing} on {self.tokens.ids.size} tokens for {self._what()} "
                f"({self.compute['device']}, {self.compute['dtype']}, solver in {self.compute['kernel']}){resuming}"
            )
        with ExitStack() as stack:
            try:
                branches = [stack.enter_context(self._branch(item)) for item in self.todo]
            except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
                raise self.unfinished.damaged(error) from None
            if not state.is_over:
                with self.reporter.stage("load"):
                    model = StreamedModel(
                        source,
                        self.dtype,
                        self.device,
                        trust_remote_code=recipe.model.trust_remote_code,
                        taken=self.plan.table.names,
                    )
                state_of_pass = PassState(model, self.tokens, branches, self._diagonals, self.unfinished, self.store)
                CalibrationPass(self.build, state_of_pass).run()
            with self.reporter.stage("write"):
                for branch in branches:
                    branch.writer.finish()
                check_small_files(source)
        return branches

    def complete(self, branch: Branch) -> Manifest:
        """Write everything of a branch beside its weights; returns the manifest.

        Raises:
            DamagedBuild: its weights on the disk are not what was written.
        """
        made = Made(branch.item, branch.folder, branch.ledger, self.tokens, self.compute, branch.writer.checksums)
        try:
            return complete(self.plan, made)
        except NotOnDisk as error:
            raise self.unfinished.damaged(error) from None

    def _branch(self, item: PlannedVariant) -> Branch:
        folder = self.unfinished.branch(item.label)
        section = self.plan.recipe.section(item.method)
        settings = (tuple(section.fail_on), section.min_expert_tokens)
        if not self.unfinished.state.next_block:
            return Branch(item, folder, *settings)
        for path in folder.rglob("*"):  # of an attempt to complete it
            if path.is_file() and path.name not in item.layout.shards:
                path.unlink()
        return Branch(item, folder, *settings, self.unfinished.rows(item.label), self.unfinished.written(item.label))

    @property
    def _needs_no_forward(self) -> bool:
        """Whether the pass needs no forward: all statistics are kept, and no branch has a stream of its own."""
        own = any(isinstance(item.variant, GptqVariant) and item.variant.propagate == "quantized" for item in self.todo)
        return self.store is not None and not own and self.store.is_complete(self.plan.table.blocks)

    def _statistics_store(self, keep: bool) -> StatisticsStore | None:
        """Where the source's statistics lie or shall lie; None where there are none, and none are wanted."""
        installed = versions(self.compute["kernel"])
        depends = {
            "version": STATISTICS_VERSION,
            "versions": {name: installed[name] for name in ("torch", "transformers", "tokenizers")},
            "compute": {name: value for name, value in decides_bytes(self.compute).items() if name != "row_budget"},
            "source": self.plan.source.hashes,
            "calibration": self.plan.calibration,
        }
        store = StatisticsStore(cache_folder() / "statistics" / key_of(depends)[:32])
        return store if keep or store.is_complete(self.plan.table.blocks) else None

    def _what(self) -> str:
        parts = [f"{len(self.todo)} branch{'es' if len(self.todo) != 1 else ''}"] if self.todo else []
        parts += ["an importance matrix"] if self._diagonals is not None else []
        parts += ["error feedback"] if self.plan.hessians else []
        return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 2 else parts)
