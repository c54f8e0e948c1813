"""A model and its images: checkpoints, preprocessing, class names, and the crop that the model saw."""
