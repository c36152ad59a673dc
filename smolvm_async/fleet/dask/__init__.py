"""A fleet on the workers of a Dask cluster."""
