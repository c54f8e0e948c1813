"""What Captum asks of a method, beside ``attribute``."""

from __future__ import annotations

from typing import Any, NoReturn

from captum.attr import GradientAttribution


class OnePass(GradientAttribution):  # type: ignore[misc]
    """What Captum asks of a method, as methods of one recorded pass answer it."""

    @property
    def multiplies_by_inputs(self) -> bool:
        """True: relevance is what a patch contributed, not what a change of it would do."""
        return True

    def attribute_future(self) -> NoReturn:
        """Not implemented, as for Captum's own one-pass methods."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    def compute_convergence_delta(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not on offer: what ended on prefix tokens and biases is not in the attributions."""
        raise NotImplementedError(
            "the delta needs what ended on prefix tokens and biases, which no attribution holds; use "
            "LNStatAttribution(..., rule='evidence').attribute(..., return_convergence_delta=True)"
        )
