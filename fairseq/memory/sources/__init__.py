"""Where candidates come from. A source offers ``lookup``; see ``base.py``."""
