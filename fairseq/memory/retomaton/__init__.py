"""RetoMaton: pointers between rows, clusters of keys, and a reader that searches only when both run dry."""
