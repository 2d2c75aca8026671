"""One launch interface: the same job in this process, on local Ray workers or on a cluster."""
