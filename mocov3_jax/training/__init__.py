"""Training: assembling a run, and the sequence of events in it."""
