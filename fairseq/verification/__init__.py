"""Recognises every kind of file this toolkit writes, and compares its content with the saved checksums."""
