"""Files, processes, threads and hardware: what every command needs and no method is about."""
