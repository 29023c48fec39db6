"""mclip: train small, fast image-text models from big ones, reproducibly."""

__version__ = "0.1.0"
