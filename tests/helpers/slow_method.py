"""A model and methods of somebody else's, found by their import paths; slow, so that a run can be stopped inside."""

import time

from timm.models.vision_transformer import VisionTransformer


def tiny_model():
    return VisionTransformer(img_size=224, patch_size=56, embed_dim=8, depth=1, num_heads=1, num_classes=3)


class Slow:
    def __init__(self, forward_func, seconds=0.0):
        self.seconds = seconds

    def attribute(self, inputs, target=None, sign=1):
        time.sleep(self.seconds)
        return sign * inputs * (1 + target.reshape(-1, 1, 1, 1))


class Picky(Slow):
    """Fails on some images and not on others."""

    def attribute(self, inputs, target=None):
        if float(inputs.mean()) < -0.4:
            raise ValueError("too dark to say")
        return super().attribute(inputs, target)
