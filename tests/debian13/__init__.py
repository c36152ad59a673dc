"""The library on Debian 13."""
