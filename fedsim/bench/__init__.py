"""`fedsim bench`: how fast this host trains clients and plays rounds, against plain loops in the same process."""
