"""Search of a store cut into ranges of rows, each searched by a worker on this or another machine."""
