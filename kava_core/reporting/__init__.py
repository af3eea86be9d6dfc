"""Reports: the comparison of a pipeline's systems as a table, figures and one page."""
