"""Sources of candidates. A source offers ``lookup``; see ``base.py``."""
