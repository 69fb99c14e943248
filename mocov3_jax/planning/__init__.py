"""Plans what a run would cost on accelerators that this machine lacks."""
