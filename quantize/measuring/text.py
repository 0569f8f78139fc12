"""The text that branches are measured on: held out from calibration, unless the user insists. Imports no torch."""

from __future__ import annotations

from quantize.calibration.corpus import identity, title
from quantize.errors import CalibrationError
from quantize.planning.plan import Plan
from quantize.recipe.schema import Calibration


def held_out(plan: Plan) -> tuple[Calibration, bool]:
    """The text and its windows, and whether it is the calibration text after all.

    Raises:
        CalibrationError: it is the calibration text, and the recipe does not allow that.
    """
    wanted, calibration = plan.recipe.measure, plan.recipe.calibration
    corpora = wanted.corpora(calibration)
    calibrated = [identity(corpus) for corpus in calibration.dataset]
    shared = next((corpus for corpus in corpora if identity(corpus) in calibrated), None)
    if shared is not None and not wanted.allow_calibration_text:
        raise CalibrationError(
            f"measure.dataset: {title(shared)} is the calibration text of this recipe, which flatters every branch; "
            "name another one, or set measure.allow_calibration_text: true (the card then says so)"
        )
    length = min(wanted.sequence_length, _positions(plan) or wanted.sequence_length)
    text = Calibration(dataset=corpora, samples=wanted.samples, sequence_length=length, seed=wanted.seed)
    return text, shared is not None


def _positions(plan: Plan) -> int | None:
    return plan.source.checkpoint.size("max_position_embeddings", "n_positions")
