"""Pictures of views, attention, neighbours and features."""
