"""sdclr: which learning rate, for how long, on what schedule, for my images and my model."""

__version__ = "0.1.0"
