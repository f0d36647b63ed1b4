"""`ddfup benchmark`: degrade true depth, upsample it with networks and classical methods, measure. A leaf."""
