"""Graph and hardware -> the best Plan, with proof."""
