"""Files, processes, threads and hardware: services that every command needs, whatever its method."""
