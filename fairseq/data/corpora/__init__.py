"""Public corpora: where they are, their checksums, and how they are unpacked."""
