"""A report: many explained images on one page, in one file that asks nothing of a network."""
