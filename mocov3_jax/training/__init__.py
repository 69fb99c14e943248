"""How a run trains: what it assembles, in which order things happen."""
