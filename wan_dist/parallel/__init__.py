"""Everything that knows there is more than one rank: groups, and one file for each way to use them."""
