"""One call for a picture: a model and an image in, a map, a prediction and pictures out."""

from captum_lnstat.explanation.explanation import Explanation, Explanations

__all__ = ["Explanation", "Explanations"]
