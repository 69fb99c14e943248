"""What `report` shows, and how."""
