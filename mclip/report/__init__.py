"""What the report shows: comparisons, claims with intervals, plots, and the site's pages."""
