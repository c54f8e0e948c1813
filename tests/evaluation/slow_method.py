"""An attribution class of somebody else's, found by its import path; slow, so that a run can be stopped inside it."""

import time


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
