"""Device-independent work, device profiles, and the seconds and joules that follow."""
