"""S3: what a URI means, the client, what its errors mean, files down and up."""
