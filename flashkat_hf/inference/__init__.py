"""A model asked about any number of pictures: labels or features of each, in a Parquet file."""
