"""edgelora: from a small team's own data to a fine-tuned model that runs on a phone, a browser or a small CPU."""

__version__ = "0.1.0"
