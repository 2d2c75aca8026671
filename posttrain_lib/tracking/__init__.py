"""Where the figures of a running job go: one small interface, one file per host in ``adapters/tracker_*``."""
