"""S3: URIs, the client, its errors, downloads and uploads."""
