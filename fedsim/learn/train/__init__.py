"""A local job, and the reference trainer."""
