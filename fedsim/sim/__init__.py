"""The discrete-event simulation: server and client processes, links, fleet, trace."""
