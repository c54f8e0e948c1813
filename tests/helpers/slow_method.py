"""A model and methods of somebody else's, found by their import paths."""

import os
import time

from timm.models.vision_transformer import VisionTransformer


def tiny_model():
    return VisionTransformer(img_size=224, patch_size=56, embed_dim=8, depth=1, num_heads=1, num_classes=3)


class Plain:
    """Quick; but a process whose rank is HELD stays in one of its calls until it is killed."""

    def __init__(self, forward_func, call=4):
        self.before = call

    def attribute(self, inputs, target=None, sign=1):
        self.before -= 1
        if self.before == 0 and os.environ.get("HELD") == os.environ.get("RANK", "0"):
            time.sleep(600)
        return sign * inputs * (1 + target.reshape(-1, 1, 1, 1))


class Picky(Plain):
    """Fails on some images and not on others."""

    def attribute(self, inputs, target=None):
        if float(inputs.mean()) < -0.4:
            raise ValueError("too dark to say")
        return super().attribute(inputs, target)
