"""S3: the client, its errors, downloads and uploads."""
