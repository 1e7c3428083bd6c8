"""Disk, memory and time that a datastore and its index need, estimated before anything is built."""
