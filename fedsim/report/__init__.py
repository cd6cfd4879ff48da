"""One page on a sweep: offline, self-contained, readable without scripts. See `fedsim.report.page.write_report`."""
