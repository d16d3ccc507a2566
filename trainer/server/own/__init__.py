"""What the page of this server asks for: plain configurations, and all that a run folder shows."""
